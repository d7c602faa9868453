"""Everything that changes the result of a run, as frozen dataclasses: the published recipes and their variants.

A recipe is plain Python: one function per published result, variants by `dataclasses.replace`. It holds no task: a run
is recipe x shard set; the functions take a task's name for its published seeds alone. What changes only the speed
(GPUs, device batch size, precision, threads) is on the command line or in accel_configs/.
Source of every number: the published solution of Grand X-Ray Slam (2nd place division A, 3rd division B) and its logs.
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from cxrdist.documents import Document
from cxrdist.errors import UserError
from cxrdist.task import TASKS

FORMAT_VERSION = 2
DEFAULT_SEED = 22  # of the published recipes for every task without a published seed: division B's EVA-X
MAX_IMAGE_SIZE = 4096  # px
PUBLISHED_BATCH = 64  # images per optimizer step of both published runs
PUBLISHED_VIEWS = ("plain", "hflip", "center1.0", "center1.1", "bright0.95", "bright1.05")


@dataclass(frozen=True, kw_only=True)
class Group(Document):
    """Parameters whose name matches `pattern` (re.search on the module's own names); the first matching row wins."""

    pattern: str
    lr: float | None  # None: never updated
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Inference(Document):
    """What inference takes from a run unless it is told otherwise; it changes nothing that is learned."""

    views: tuple[str, ...] = ("plain",)  # test-time views
    member_epochs: tuple[int, ...] = (5, 6)  # epochs (from 1) whose EMA weights are averaged

    def __post_init__(self) -> None:
        if not self.views or not set(self.views) <= set(PUBLISHED_VIEWS):
            raise UserError(f"views={','.join(self.views)} is not valid: name some of {', '.join(PUBLISHED_VIEWS)}")
        if len(set(self.member_epochs)) < len(self.member_epochs):
            raise UserError(f"member_epochs={self.member_epochs} is not valid: an epoch is there twice")


@dataclass(frozen=True, kw_only=True)
class Recipe(Document):
    """One training run, and what inference takes from it. Raises UserError on an invalid combination."""

    name: str
    model: str  # an Architecture's name
    image_size: int  # px, after augmentation
    epochs: int
    seed: int
    global_batch_size: int  # images per optimizer step, over all GPUs and accumulation
    groups: tuple[Group, ...]
    ema_decay: float
    ema_ramp: bool = False  # decay of step t is min(ema_decay, (1 + t) / (10 + t)): for short runs
    betas: tuple[float, float] = (0.9, 0.999)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    clip_grad_norm: float | None = None
    loss: str = "focal_bce"  # a name in training.losses.LOSSES
    focal_weight: float = 0.7
    focal_alpha: float = 0.25  # a plain factor, not class-dependent
    focal_gamma: float = 2.0
    bce_weight: float = 0.3
    pos_weight_beta: float = 0.9999
    pos_weight_cap: float = 10.0
    augment: Literal["published", "crop_flip", "none"] = "published"
    holes: Literal["as_run", "as_asked"] = "as_run"  # coarse dropout: what the library cut, or the one hole asked for
    drop_rate: float = 0.1  # dropout inside the GLoRI decoder; EVA-X has none
    model_kwargs: tuple[tuple[str, int | float], ...] = ()  # size overrides for a small variant, sorted by name
    inference: Inference = field(default=Inference(), compare=False)

    def __post_init__(self) -> None:
        checks = {
            "name": re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name) is not None,
            "model": re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.model) is not None,
            "image_size": 0 < self.image_size <= MAX_IMAGE_SIZE,
            "epochs": self.epochs >= 1,
            "global_batch_size": self.global_batch_size >= 1,
            "ema_decay": 0.0 <= self.ema_decay < 1.0,
            "warmup_steps": self.warmup_steps >= 0,
            "clip_grad_norm": self.clip_grad_norm is None or self.clip_grad_norm > 0,
            "groups": len(self.groups) > 0,
            "seed": self.seed >= 0,
            "betas": len(self.betas) == 2 and all(0.0 <= beta < 1.0 for beta in self.betas),
            "focal_weight": 0.0 <= self.focal_weight < math.inf,
            "focal_alpha": 0.0 <= self.focal_alpha < math.inf,
            "focal_gamma": 0.0 <= self.focal_gamma < math.inf,
            "bce_weight": 0.0 <= self.bce_weight < math.inf,
            "pos_weight_beta": 0.0 <= self.pos_weight_beta < 1.0,
            "pos_weight_cap": 0.0 < self.pos_weight_cap < math.inf,
            "lr_schedule": self.lr_schedule in ("constant", "cosine"),
            "augment": self.augment in ("published", "crop_flip", "none"),
            "holes": self.holes in ("as_run", "as_asked"),
            "drop_rate": 0.0 <= self.drop_rate < 1.0,
        }
        for name, good in checks.items():
            if not good:
                raise UserError(f"recipe {self.name}: {name}={getattr(self, name)!r} is not valid")
        if not all(1 <= epoch <= self.epochs for epoch in self.inference.member_epochs):
            raise UserError(
                f"recipe {self.name}: member_epochs={self.inference.member_epochs!r} is not valid (epochs run from 1 "
                f"to {self.epochs})"
            )


def eva_x(task: str) -> Recipe:
    """EVA-X-B at 448 px, everything fine-tuned with layer-wise learning rates.

    Command: `accelerate launch -m cxrdist.train --div b`
    Published: 2 x T4, fp16, B 57.7 min an epoch (31.3 images/s), A 62.2 (28.8).
    Train loss by epoch: B .1086 .0982 .0947 .0915 .0879 .0831; A .1092 .0988 .0952 .0919 .0883 .0838.
    `cls_token` and `pos_embed` are in no group of the published run: never updated. In float32 the weight decay of
    every row is too small to change a weight; the rows are kept as published.
    """
    layer_lrs = (("[0-3]", 1e-6), ("[45]", 5e-6), ("[67]", 1e-5), ("[89]", 3e-5), ("1[01]", 5e-5))
    return Recipe(
        name="eva_x",
        model="eva_x",
        image_size=448,
        epochs=6,
        seed={"a": 48, "b": 22}.get(task, DEFAULT_SEED),
        global_batch_size=PUBLISHED_BATCH,
        groups=(
            Group(pattern=r"^(cls_token|pos_embed)$", lr=None),
            Group(pattern=r"^(patch_embed|rope)\.", lr=1e-6, weight_decay=1e-6),
            *(Group(pattern=rf"^blocks\.{layers}\.", lr=lr, weight_decay=1e-4) for layers, lr in layer_lrs),
            Group(pattern=r"^fc_norm\.", lr=5e-5, weight_decay=1e-4),
            Group(pattern=r"^head\.", lr=8e-5, weight_decay=0.0),
        ),
        ema_decay=0.9997,
        inference=Inference(views=PUBLISHED_VIEWS),
    )


def chexfound(task: str) -> Recipe:
    """CheXFound ViT-L/16 at 512 px, frozen, with a trained GLoRI head.

    Command: `accelerate launch -m cxrdist.train --div b --model chexfound`
    Published: 2 x T4, fp16, 172-174 min an epoch (10.4 images/s).
    Train loss by epoch: B .1082 .0992 .0976 .0961 .0949 .0939; A .1096 .0999 .0982 .0966 .0954 .0944.
    """
    return Recipe(
        name="chexfound",
        model="chexfound",
        image_size=512,
        epochs=6,
        seed={"a": 42, "b": 32}.get(task, DEFAULT_SEED),
        global_batch_size=PUBLISHED_BATCH,
        groups=(
            Group(pattern=r"^backbone\.", lr=None),
            Group(pattern=r"^glori\.", lr=2e-4, weight_decay=1e-5),
        ),
        ema_decay=0.99967,
    )


def eva_x_224(task: str) -> Recipe:
    """The third member that the published team tried and dropped: EVA-X-B at 224 px."""
    return dataclasses.replace(eva_x(task), name="eva_x_224", image_size=224)


def demo_eva_x(task: str) -> Recipe:
    """EVA-X-Ti cut to six blocks, from random weights, on the demo's phantoms: about a minute on two CPU cores.

    Command: `./launch.sh demo`. Held-out macro AUROC 0.92 on phantoms.
    From random weights the published learning rates learn nothing; steps matter more than pixels or depth.
    """
    return dataclasses.replace(
        eva_x(task),
        name="demo_eva_x",
        model="eva_x_tiny",
        image_size=112,
        epochs=30,
        global_batch_size=16,
        groups=(Group(pattern=r"", lr=5e-4, weight_decay=0.02),),
        lr_schedule="cosine",
        warmup_steps=40,
        clip_grad_norm=1.0,
        ema_decay=0.98,
        ema_ramp=True,
        augment="crop_flip",
        model_kwargs=(("depth", 6),),
        inference=Inference(views=PUBLISHED_VIEWS, member_epochs=(29, 30)),
    )


def demo_chexfound(task: str) -> Recipe:
    """A four-block random frozen backbone with a trained GLoRI head, on the demo's phantoms: a minute on two CPU cores.

    Command: `./launch.sh demo`. Held-out macro AUROC 0.86 on phantoms.
    LayerScale is 1: at its usual 1e-5 the random blocks pass the patch embedding on unchanged.
    """
    return dataclasses.replace(
        chexfound(task),
        name="demo_chexfound",
        image_size=160,
        epochs=36,
        global_batch_size=16,
        groups=(
            Group(pattern=r"^backbone\.", lr=None),
            Group(pattern=r"^glori\.", lr=1e-3, weight_decay=1e-5),
        ),
        lr_schedule="cosine",
        warmup_steps=20,
        clip_grad_norm=1.0,
        ema_decay=0.98,
        ema_ramp=True,
        augment="crop_flip",
        model_kwargs=(("decoder_dim", 192), ("depth", 4), ("embed_dim", 192), ("init_values", 1.0), ("num_heads", 3)),
        inference=Inference(member_epochs=(35, 36)),
    )


def eva_x_small(task: str) -> Recipe:
    """EVA-X-S with the published recipe of EVA-X-B."""
    return dataclasses.replace(eva_x(task), name="eva_x_small", model="eva_x_small")


def eva_x_tiny(task: str) -> Recipe:
    """EVA-X-Ti with the published recipe of EVA-X-B."""
    return dataclasses.replace(eva_x(task), name="eva_x_tiny", model="eva_x_tiny")


RECIPES: dict[str, Callable[[str], Recipe]] = {
    "eva_x": eva_x,
    "chexfound": chexfound,
    "eva_x_224": eva_x_224,
    "eva_x_small": eva_x_small,
    "eva_x_tiny": eva_x_tiny,
    "demo_eva_x": demo_eva_x,
    "demo_chexfound": demo_chexfound,
}


def recipe_for(model: str, task: str) -> Recipe:
    """The recipe that `--model` stands for, with the seed published for that task; UserError for an unknown name."""
    if model not in RECIPES:
        raise UserError(f"--model {model!r} is unknown; one of {', '.join(RECIPES)}")
    return RECIPES[model](task)


def with_global_batch_size(recipe: Recipe, global_batch_size: int) -> Recipe:
    """The recipe at another global batch, its EMA spanning the same number of images: decay^(new / old).

    Without it a decay made for 64 images a step leaves 83 % of the initial weights after 6 epochs at 1024.
    """
    scale = global_batch_size / recipe.global_batch_size
    return dataclasses.replace(recipe, global_batch_size=global_batch_size, ema_decay=recipe.ema_decay**scale)


def with_scaled_lrs(recipe: Recipe, ratio: float, rule: Literal["none", "sqrt", "linear"]) -> Recipe:
    """The recipe with its learning rates times `ratio` (of global batches) or its root; unchanged for "none"."""
    if rule == "none" or ratio == 1.0:
        return recipe
    factor = ratio if rule == "linear" else ratio**0.5
    groups = (dataclasses.replace(group, lr=None if group.lr is None else group.lr * factor) for group in recipe.groups)
    return dataclasses.replace(recipe, groups=tuple(groups))


def to_json(recipe: Recipe) -> str:
    """The recipe as JSON text; floats survive the round trip exactly."""
    return json.dumps({"format_version": FORMAT_VERSION} | dataclasses.asdict(recipe), indent=1)


def from_json(content: bytes | str, source: object = "recipe") -> Recipe:
    """The recipe in JSON `content`, of format version 1, too; UserError names `source` and the field that is wrong."""
    return _read(content, source)[0]


def task_of_version_1(content: bytes | str, source: object) -> str | None:
    """The name of the task that a recipe of version 1 held; None for a later one."""
    return _read(content, source)[1]


def _read(content: bytes | str, source: object) -> tuple[Recipe, str | None]:
    remedy = "it is damaged or of another version of cxrdist"
    try:
        data = json.loads(content)
        version = data.pop("format_version", 1)
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{source} is not a recipe: {remedy}") from None
    task = None
    if version == 1:
        task = data.pop("div", None)
        if task not in TASKS:
            raise UserError(f"{source} is not a recipe: {remedy}")
        data["inference"] = {name: data.pop(name) for name in ("views", "member_epochs") if name in data}
    elif version != FORMAT_VERSION:
        raise UserError(f"{source}: format version {version!r}, this cxrdist reads {FORMAT_VERSION}")
    try:
        return Recipe.from_json(json.dumps(data), source), task
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None


def with_overrides(recipe: Recipe, overrides: list[str]) -> Recipe:
    """The recipe with `field=value` texts applied, each typed from its field.

    `global_batch_size` also scales `ema_decay` (see `with_global_batch_size`) unless that is set too.
    Raises UserError for an unknown field, a value of another type, or a field that is not one value.
    """
    own, of_inference = typing.get_type_hints(Recipe), typing.get_type_hints(Inference)
    kinds = {name: kind for name, kind in (own | of_inference).items() if name in SETTABLE}
    values: dict[str, Any] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: write it as FIELD=VALUE, e.g. --set ema_decay=0.9995")
        if name not in kinds:
            raise UserError(f"--set {name}: no such recipe field; one of {', '.join(sorted(kinds))}")
        values[name] = _parse(name, value, kinds[name])
    if "global_batch_size" in values and "ema_decay" not in values and values["global_batch_size"] >= 1:
        recipe = with_global_batch_size(recipe, values.pop("global_batch_size"))
    inference = {name: values.pop(name) for name in of_inference if name in values}
    return dataclasses.replace(recipe, **values, inference=dataclasses.replace(recipe.inference, **inference))


SETTABLE = {item.name for kind in (Recipe, Inference) for item in dataclasses.fields(kind)} - {"groups", "inference"}


def _parse(name: str, text: str, kind: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    try:
        if origin is Literal:
            if text not in args:
                raise ValueError(f"one of {', '.join(args)}")
            return text
        if origin is types.UnionType:
            return None if text.lower() == "none" else _parse(name, text, args[0])
        if origin is tuple and name != "model_kwargs":
            return tuple(_parse(name, part, args[0]) for part in text.split(","))
        if name == "model_kwargs":
            pairs = (part.split("=" if "=" in part else ":", 1) for part in text.split(",") if part)
            return tuple(sorted((key, float(v) if "." in v or "e" in v else int(v)) for key, v in pairs))
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise ValueError("true or false")
            return text.lower() == "true"
        return kind(text)
    except ValueError as error:
        wanted = getattr(kind, "__name__", str(kind))
        raise UserError(f"--set {name}={text}: needs {wanted} ({error})") from None


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`field: old -> new` for every field of what is learned in which two recipes differ; empty when equal."""
    names = [item.name for item in dataclasses.fields(Recipe) if item.compare]
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in names)
    return [f"{name}: {before!r} -> {after!r}" for name, before, after in pairs if before != after]
