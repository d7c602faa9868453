"""Training input: stored uint8 images to augmented, normalised ones, on the device the images are on.

A recipe's steps run in its order, each on the images for which its draw says so and on no other; after each an image is
256 grey levels, as in the published library. What is drawn for an image is a pure function of (seed, epoch, key, step).
"""

import bisect
import collections
import contextlib
import difflib
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import kornia.augmentation as K
import numpy as np
import torch
from kornia.augmentation import AugmentationBase2D, GeometricAugmentationBase2D, MixAugmentationBaseV2
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from cxrdist.augment.draws import Ints, seeded_on_host, uniforms
from cxrdist.augment.steps import PLACES, PUBLISHED, PublishedCrop, Size
from cxrdist.augment.views import IMAGENET, Stats, empty_batch, keep_freed_blocks, normalise, resize
from cxrdist.errors import UserError, one_line
from cxrdist.recipes import Step

Draws = Mapping[str, Any]  # kornia's names to what one image's parameters are: arrays or tensors (1, ...)
MIXES = ("RandomMixUpV2", "RandomCutMixV2")
CHANGES_SIZE = "it changes the size of an image, which the recipe's image_size sets"
REFUSED = {
    **dict.fromkeys(("Resize", "LongestMaxSize", "SmallestMaxSize", "PadTo", "CenterCrop"), CHANGES_SIZE),
    **dict.fromkeys(("RandomCrop", "RandomResizedCrop"), f"{CHANGES_SIZE}; `crop` is the published crop"),
    **dict.fromkeys(("Normalize", "Denormalize"), "images are normalised after the last step"),
    "RandomTransplantation": "it needs masks, and there are only images",
    **dict.fromkeys(("RandomMosaic", "PatchMix"), "it mixes images without their labels"),
}


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of a pipeline: a module that runs with p=1 on the images that its own stream of numbers chose."""

    name: str
    p: float
    module: nn.Module
    start: int = 1
    stream: str = ""
    one_by_one: bool = False  # its parameters of several images do not go into one call

    def draw(self, keys: Ints, seed: int, epoch: int, size: Size, channels: int = 1) -> tuple[Ints, list[Draws]]:
        """The rows of `keys` (B,) that take the step, and the parameters of each, on the host.

        A step of this project takes its parameters, arrays, from its stream; another one takes tensors, from torch's
        generator, seeded by the stream.
        """
        num = getattr(self.module, "num_values", 1)
        values = uniforms(seed, epoch, keys, 1 + num, start=self.start, stream=self.stream)
        rows = np.flatnonzero(values[:, 0] < self.p)
        if sample := getattr(self.module, "sample", None):
            params = sample(values[rows, 1:], size)
            return rows, [{name: each[i : i + 1] for name, each in params.items()} for i in range(len(rows))]
        return rows, [self._draw_stock(value, (channels, *size)) for value in values[rows, 1]]

    def _draw_stock(self, value: float, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        with seeded_on_host(value):
            params: dict[str, Tensor] = self.module.forward_parameters((1, *shape))  # type: ignore[operator]
        return params | {"seed": torch.tensor([value], dtype=torch.float64)}

    def __call__(self, levels: Tensor, params: Sequence[Draws]) -> Tensor:
        """(n, C, H, W) grey levels -> (n, C, S, S) float32 integer grey levels, with the parameters of each."""
        if self.one_by_one and len(levels) > 1:
            return torch.cat([self(levels[i : i + 1], params[i : i + 1]) for i in range(len(levels))])
        if on_levels := getattr(self.module, "on_levels", None):
            arrays = {name: np.concatenate([each[name] for each in params]) for name in params[0]}
            return on_levels(levels, arrays)  # type: ignore[no-any-return]
        joined = {name: torch.cat([each[name] for each in params]) for name in params[0]}
        seed = joined.pop("seed", None)
        joined["forward_input_shape"] = torch.tensor(levels.shape)
        joined = {name: each.float() if each.is_floating_point() else each for name, each in joined.items()}
        if isinstance(self.module, GeometricAugmentationBase2D):  # linear in the levels
            return self.module(levels, params=joined).round_().clamp_(0.0, 255.0)  # type: ignore[no-any-return]
        with contextlib.ExitStack() as stack:
            if seed is not None and self.one_by_one:  # some draw while they run
                stack.enter_context(seeded_on_host(float(seed)))
                if levels.is_cuda:
                    stack.enter_context(torch.random.fork_rng(devices=[levels.device]))
                    torch.cuda.manual_seed(int(float(seed) * 2.0**53))
            out = self.module(levels / 255.0, params=joined)
        return out.mul(255.0).round_().clamp_(0.0, 255.0)  # type: ignore[no-any-return]


def stages_of(steps: Sequence[Step], image_size: int, *, colour: bool | None = None) -> list[Stage]:
    """The stages of a recipe's `augment`, each tried once; MixUp and CutMix are `mixing`'s and left out.

    colour: whether the images have three channels; None to leave that open.
    Raises UserError for a step that is unknown, not valid, or that this pipeline cannot run, with the reason.
    """
    seen: collections.Counter[str] = collections.Counter()
    stages = []
    for index, step in enumerate(steps):
        if step.name in MIXES:
            if index < len(steps) - 1:
                raise UserError(f"--augment {step.name}: images are mixed after all other steps: make it the last one")
            continue
        if step.name == "crop" and (index or step.p < 1):
            raise UserError("--augment crop: it makes the model's size of the stored one: make it the first step, p=1")
        module = build(step, image_size)
        number, seen[step.name] = seen[step.name], seen[step.name] + 1
        own = step.name in PUBLISHED and not number
        place = {"start": PLACES[step.name]} if own else {"stream": f"{step.name}/{number}"}
        stages.append(_tried(Stage(step.name, step.p, module, **place), image_size, colour))  # type: ignore[arg-type]
    return stages


def build(step: Step, image_size: int) -> nn.Module:
    """The module of a step with p=1, its arguments typed from its signature; UserError says why there is none."""
    flag = f"--augment {step.name}"
    known = [*PUBLISHED, *(name for name in vars(K) if is_step(name))]
    if step.name in REFUSED:
        raise UserError(f"{flag}: not possible: {REFUSED[step.name]}")
    if step.name not in known:
        near = difflib.get_close_matches(step.name, known, 3, 0.4) or list(PUBLISHED)
        raise UserError(f"{flag}: no such step for images; {' or '.join(near)}? (kornia.augmentation has the list)")
    kind: Any = PUBLISHED.get(step.name) or getattr(K, step.name)
    hints = get_type_hints(kind.__init__)
    given = dict(step.args)
    settable = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    left_out = ("p", "size", "keepdim", "same_on_batch")
    parameters = {
        name: each.default
        for name, each in inspect.signature(kind).parameters.items()
        if each.kind in settable and name not in left_out
    }
    for name, value in given.items():
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, 1, 0.0) or [""]
            raise UserError(f"{flag}: it takes no {name!r}; {near[0]}? It takes {', '.join(parameters)}")
        try:
            given[name] = _typed(hints[name], value)
        except (ValidationError, TypeError, ValueError):
            raise UserError(f"{flag}: {name}={value!r} is not valid: {_type_text(hints[name])} is wanted") from None
    missing = [name for name, default in parameters.items() if default is inspect.Parameter.empty and name not in given]
    if missing:
        raise UserError(f"{flag}: it needs {', '.join(missing)}: write {step.name}:{missing[0]}=VALUE")
    given |= {"size": image_size} if kind is PublishedCrop else {"p": 1.0}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(**given)  # type: ignore[no-any-return]
    except ImportError as error:
        raise UserError(f"{flag}: it needs a package that is not installed: {one_line(str(error))}") from None
    except Exception as error:
        raise UserError(
            f"{flag}: {', '.join(f'{k}={v}' for k, v in step.args)} is refused: {one_line(str(error))}"
        ) from None


def _typed(hint: Any, value: Any) -> Any:
    """`value` as the annotation wants it; a list of numbers as a tensor where only that will do."""
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(value)
    except ValidationError:
        if "Tensor" not in str(hint) or isinstance(value, str):
            raise
        return torch.tensor(value)


def _type_text(hint: Any) -> str:
    return getattr(hint, "__name__", "") if isinstance(hint, type) else re.sub(r"(typing|torch)\.", "", str(hint))


def is_step(name: str) -> bool:
    """Whether `name` is a class of kornia.augmentation for two-dimensional images, not a base of others."""
    kind = getattr(K, name, None)
    return (
        inspect.isclass(kind)
        and issubclass(kind, AugmentationBase2D | MixAugmentationBaseV2)
        and not re.search("Base|3D", name)
    )


def _tried(stage: Stage, image_size: int, colour: bool | None) -> Stage:
    """The stage after a first run on noise, which shows whether it can run, on which images, and how."""
    keys, size = np.arange(2), (image_size, image_size)
    noise = torch.from_numpy(uniforms(0, 0, np.arange(2 * 3 * image_size), image_size)).mul(255).round_().float()
    noise = noise.view(2, 3, *size)
    problems = {}
    for channels in (3,) if colour else (1, 3):
        try:
            with torch.no_grad():
                always = Stage(stage.name, 2.0, stage.module, stage.start, stage.stream, one_by_one=True)
                _, params = always.draw(keys, 0, 0, size, channels)
                batch = noise[:, :channels]
                out = always(batch, params)
                if out.shape != batch.shape:
                    raise UserError(f"--augment {stage.name}: not possible: {CHANGES_SIZE}")
                together = _together(stage, batch, params)
        except UserError:
            raise
        except ImportError as error:
            raise UserError(
                f"--augment {stage.name}: it needs a package that is not here: {one_line(str(error))}"
            ) from None
        except Exception as error:
            problems[channels] = one_line(str(error))
            continue
        if colour is False and channels == 3:
            reason = f"it does not run on grey images ({problems[1]}); prepare the set with three channels (--mode rgb)"
            raise UserError(f"--augment {stage.name}: {reason}")
        return Stage(stage.name, stage.p, stage.module, stage.start, stage.stream, not torch.equal(together, out))
    raise UserError(f"--augment {stage.name}: not possible: {next(iter(problems.values()))}")


def _together(stage: Stage, batch: Tensor, params: Sequence[Draws]) -> Tensor:
    """Both images in one call, with torch's generator elsewhere; empty if the call fails."""
    try:
        with seeded_on_host(0.5):
            return stage(batch, params)
    except Exception:
        return torch.empty(0)


class TrainingAugment:
    """The random augmentation of one run; what happens to an image is a pure function of (seed, epoch, key).

    Args:
        image_size: S, the model's, px.
        steps: of the recipe; without `crop` images are resized as for evaluation first.
        colour: as for `stages_of`, which names what cannot run. stats: mean and deviation of the model's input.
    """

    def __init__(
        self,
        image_size: int,
        steps: Sequence[Step],
        seed: int,
        *,
        colour: bool | None = None,
        stats: Stats = IMAGENET,
    ) -> None:
        self.image_size, self.seed, self.stats = image_size, seed, stats
        self.stages = stages_of(steps, image_size, colour=colour)
        keep_freed_blocks()

    def levels(self, images: Tensor, keys: Ints, epoch: int) -> Tensor:
        """The augmented batch before normalisation: (B, C, S, S) float32 integer grey levels in [0, 255]."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return torch.cat([levels for _, levels in self._parts(images, keys, epoch)])

    def __call__(self, images: Tensor, keys: Ints, epoch: int) -> Tensor:
        """Augment and normalise `images`, (B, 1 or 3, H, W) uint8 on any device, whose `keys`, (B,), are on the host.

        Returns: (B, 3, S, S) float32, normalised by `stats`, on the images' device.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            out = empty_batch((len(images), 3, self.image_size, self.image_size), images.device)
            for rows, levels in self._parts(images, keys, epoch):
                normalise(levels, out[rows], self.stats)
        return out

    def _parts(self, images: Tensor, keys: Ints, epoch: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the batch and their levels: one image at a time on a CPU, whose cache then holds the work."""
        num, size = len(images), self.image_size
        part = 1 if images.device.type == "cpu" else max(1, num)
        drawn = []
        for stage in self.stages:
            at = (images.shape[2], images.shape[3]) if stage.name == "crop" else (size, size)
            drawn.append(stage.draw(keys, self.seed, epoch, at, images.shape[1]))
        for start in range(0, num, part):
            stop = min(start + part, num)
            levels = images[start:stop]
            if not self.stages or self.stages[0].name != "crop":
                levels = resize(levels, size)
            for stage, (rows, params) in zip(self.stages, drawn, strict=True):
                low, high = bisect.bisect_left(rows, start), bisect.bisect_left(rows, stop)
                if high - low == stop - start:
                    levels = stage(levels, params[low:high])
                elif high > low:
                    index = torch.from_numpy(rows[low:high] - start)
                    if levels.device.type != "cpu":
                        index = index.pin_memory().to(levels.device, non_blocking=True)
                    levels.index_copy_(0, index, stage(levels.index_select(0, index), params[low:high]))
            yield slice(start, stop), levels
