"""A trained model in use: images from anywhere -> what it says of them, exactly as inference on a shard set would.

`load` makes one of a bundle, a run or members; `Predictor.predict` takes paths, bytes or arrays.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.augment.views import make_views
from cxrdist.data.images import PUBLISHED, Levels, Pixels, Source, levels_of
from cxrdist.distributed.environment import usable_cores
from cxrdist.distributed.precision import DTYPES, autocast, hardware_of, resolve_precision
from cxrdist.documents import BUNDLE
from cxrdist.errors import UserError
from cxrdist.inference.bundle import load_bundle
from cxrdist.inference.members import Ensemble, MemberSpec, load_ensemble, parse_member, task_of_models
from cxrdist.inference.parts import Basis, Part, PartStore, joined, merge
from cxrdist.inference.passes import Member, columns_of, plan_passes
from cxrdist.inference.score import check_finite, member_table, run_passes
from cxrdist.models import architecture_of
from cxrdist.models.architecture import Maps
from cxrdist.runs.documents import StoredImages
from cxrdist.scoring.operating import FILE, Calibration, identity, read_calibration
from cxrdist.scoring.tables import Average, Probs, TableMeta, average
from cxrdist.task import Task

AS_PUBLISHED = StoredImages(**dataclasses.asdict(PUBLISHED))
BATCH_SIZE = {"cuda": 64, "cpu": 16}
KEEP_S = 30.0  # seconds of scoring that an interruption may cost


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of N images. Rows are the images in the order given, columns `labels`.

    probabilities: (N, K) float32 in [0, 1]. members: the same of each member by name. calibrated: (N, K) float32, or
    None without a calibration. decisions: (N, K) int8: 1 positive, 0 negative, -1 where the label has no threshold; or
    None. sources: paths, or image 1, 2, ... of bytes and arrays. unreadable: source -> reason; these have no row.
    """

    labels: tuple[str, ...]
    sources: tuple[str, ...]
    probabilities: Probs
    members: dict[str, Probs]
    calibrated: Probs | None = None
    decisions: NDArray[np.int8] | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sources)


class Predictor:
    """A model, or an average of several, ready for images. Made by `load`; can be pickled.

    Attributes:
        task: its labels and their order. members: with their checkpoints and views. stored: how images are prepared.
        calibration: None, or what turns probabilities into calibrated ones and decisions.
        device, precision: where it runs and how. notes: what its user should know, one line each.
    """

    def __init__(
        self,
        task: Task,
        ensemble: Ensemble,
        stored: StoredImages,
        *,
        how: Average = "prob",
        calibration: Calibration | None = None,
        device: str | torch.device | None = None,
        precision: str = "auto",
    ) -> None:
        if how == "rank":
            raise UserError("ranks are of many images, and this looks at one: average prob or logit")
        self.task, self.members, self.stored, self.how = task, ensemble.members, stored, how
        self.calibration, self.notes = calibration, list(ensemble.notes)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {device}: torch sees no GPU here; leave it out, or ask `cxrdist doctor` why")
        self.precision, _ = resolve_precision(precision, [hardware_of(self.device)])
        self._passes = plan_passes(self.members)
        self._models = {name: model.to(self.device) for name, model in ensemble.models.items()}
        for head in (head for item in self._passes for head in item.heads):
            architecture_of(head.model).hold_frozen(self._models[head.sha256], DTYPES[self.precision])

    @property
    def labels(self) -> tuple[str, ...]:
        return self.task.labels

    def predict(
        self,
        images: Sequence[Source] | Source,
        *,
        batch_size: int | None = None,
        skip_unreadable: bool = False,
        progress: Callable[[int], object] | None = None,
        keep: Path | None = None,
    ) -> Prediction:
        """What the model says of images: paths (JPEG, PNG, DICOM, ...), bytes of such files, or arrays.

        Arrays are (H, W) uint8 or uint16 levels, or (H, W, 3) uint8 RGB. batch_size: images at a time (16, on a GPU
        64). progress: called with the number of images after each batch. keep: a folder for what is scored, with which
        the same call resumes after an interruption; for paths only.
        Raises UserError for an image that cannot be read; with `skip_unreadable` it is in `unreadable` instead.
        """
        given = [images] if isinstance(images, str | Path | bytes | np.ndarray) else list(images)
        names = [str(item) if isinstance(item, str | Path) else f"image {i}" for i, item in enumerate(given, 1)]
        size = batch_size or BATCH_SIZE.get(self.device.type, 16)
        store = None if keep is None else PartStore(keep, self._basis(names, size))
        parts = [self._part(-1, {}), *(() if store is None else store.read_all().values())]
        done = {int(number) for part in parts for number in part.batches}
        new, written = list[Part](), time.monotonic()
        try:
            with concurrent.futures.ThreadPoolExecutor(min(usable_cores(), 16)) as threads:
                for number, start in enumerate(range(0, len(given), size)):
                    rows = range(start, min(start + size, len(given)))
                    if number not in done:
                        levels = threads.map(self._levels, given[start : start + size])
                        parts.append(part := self._part(number, dict(zip(rows, levels, strict=True))))
                        new.append(part)
                        if part.unreadable and not skip_unreadable:
                            row, reason = next(iter(part.unreadable.items()))
                            raise UserError(f"{names[row]}: {reason}; give an intact image")
                    if store is not None and time.monotonic() > written + KEEP_S:
                        store.write(joined(new), 0)
                        new, written = [], time.monotonic()
                    if progress is not None:
                        progress(len(rows))
        finally:
            if store is not None and new:
                store.write(joined(new), 0)
        logits, kept, unreadable = merge(parts, len(given), range(len(given)))
        bad = {names[row]: reason for row, reason in sorted(unreadable.items())}
        return self._averaged(logits, tuple(names[row] for row in kept), bad)

    def _part(self, number: int, levels: dict[int, Levels | str]) -> Part:
        """The logits of a batch's images by their rows."""
        unreadable = {row: pixels for row, pixels in levels.items() if isinstance(pixels, str)}
        readable = {row: pixels for row, pixels in levels.items() if not isinstance(pixels, str)}
        none = np.empty((len(columns_of(self._passes)), 0, self.task.num_labels), np.float32)
        logits = self._logits(list(readable.values())) if readable else none
        return Part(np.array([number]), np.array(list(readable), np.int64), logits, unreadable)

    def _basis(self, names: Sequence[str], size: int) -> Basis:
        """All that the logits of these files depend on."""
        files = [(name, (found := Path(name).stat()).st_size, found.st_mtime_ns) for name in names]
        images = hashlib.sha256(json.dumps([dataclasses.astuple(self.stored), files]).encode()).hexdigest()
        columns = tuple(columns_of(self._passes))
        return Basis(
            shards=images,
            rows="",
            columns=columns,
            device_batch_size=size,
            precision=self.precision,
            device=self.device.type,
        )

    def maps(self, image: Source, labels: Sequence[str], *, member: str | None = None) -> tuple[Maps, Levels]:
        """Where the model looked: (L, h, w) float32 maps >= 0 of the named labels, and the (S, S, 1 or 3) image.

        The map of a label shows what moved its score, not where a disease is. member: which one's first checkpoint is
        asked (default: the first member that has maps). UserError for an unknown label, or a model without maps.
        """
        if unknown := [label for label in labels if label not in self.labels]:
            raise UserError(f"{unknown[0]!r} is no label of this model: {', '.join(self.labels)}")
        chosen = self.mapped(member)
        levels = self.seen(image)
        checkpoint = chosen.checkpoints[0]
        architecture, model = architecture_of(checkpoint.model), self._models[checkpoint.sha256]
        assert architecture.saliency is not None
        _, inputs = next(make_views(self._batch([levels]), ("plain",), checkpoint.image_size, architecture.stats))
        maps = []
        with autocast(self.precision, self.device):
            for label in labels:
                place = np.array([self.labels.index(label)], dtype=np.int64)
                maps.append(architecture.saliency(model, inputs, place)[0])
        return np.stack(maps).astype(np.float32), levels

    def seen(self, image: Source) -> Levels:
        """(S, S, 1 or 3) uint8: the image as it is prepared for the model; UserError where it cannot be read."""
        levels = self._levels(image)
        if isinstance(levels, str):
            raise UserError(f"{image if isinstance(image, str | Path) else 'the image'}: {levels}")
        return levels

    def mapped(self, member: str | None = None) -> Member:
        """The member of that name, or the first one, whose model makes maps; UserError where there is none."""
        named = [each for each in self.members if member in (None, each.name)]
        with_maps = [each for each in named if architecture_of(each.checkpoints[0].model).saliency is not None]
        if not with_maps:
            there = ", ".join(each.name for each in self.members)
            what = f"member {member!r}" if member is not None else "this model"
            raise UserError(f"{what} makes no maps (members: {there})")
        return with_maps[0]

    def about_maps(self, member: str | None = None) -> tuple[str, str, bool]:
        """The title of a member's maps, what they are, and whether their model is known to have begun at random."""
        first = self.mapped(member).checkpoints[0]
        architecture = architecture_of(first.model)
        return architecture.saliency_title, architecture.saliency_about, first.from_random

    def _levels(self, image: Source) -> Levels | str:
        pixels = Pixels(self.stored.mode, self.stored.size_px, self.stored.fit)
        return levels_of(image, pixels, as_jpeg=self.stored.jpeg)

    def _batch(self, levels: Sequence[Levels]) -> torch.Tensor:
        """(B, C, S, S) uint8 on the device, C = 1 where all are grey, else 3: as a loader gives stored ones."""
        channels = max(each.shape[2] for each in levels)
        stacked = np.stack([np.broadcast_to(each, (*each.shape[:2], channels)) for each in levels])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous().to(self.device)

    def _logits(self, levels: Sequence[Levels]) -> NDArray[np.float32]:
        """(P, B, K) of every pass."""
        columns = run_passes(self._batch(levels), self._passes, self._models, self.precision)
        return torch.stack(columns).cpu().numpy()

    def _averaged(
        self, logits: NDArray[np.float32], sources: tuple[str, ...], unreadable: dict[str, str]
    ) -> Prediction:
        names = np.array(sources, dtype=object)
        check_finite(logits, self._passes, names, self.precision)
        meta, columns = TableMeta(task=self.task, average=self.how), columns_of(self._passes)
        tables = [member_table(member, logits, columns, names, meta) for member in self.members]
        probs = average([table.probs for table in tables], [member.weight for member in self.members], self.how)
        by_member = {table.name: table.probs for table in tables}
        found = Prediction(self.labels, sources, probs, by_member, unreadable=unreadable)
        if self.calibration is None:
            return found
        calibrated = self.calibration.apply(probs)
        return dataclasses.replace(found, calibrated=calibrated, decisions=self.calibration.decide(calibrated))


def load(
    source: str | Path | Sequence[str],
    *,
    task: Task | None = None,
    how: Average | None = None,
    calibration: str | Path | None = None,
    backbone: str | Path | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> Predictor:
    """A model from a bundle's folder, a run folder, or members ("NAME=RUN@5,6:tta", as `--member` takes them).

    task: of weight files, which do not say it. how: members are averaged, prob (default) or logit. A bundle says both.
    calibration: a `calibration.json` (default: the bundle's, or one in a run's folder that was fitted on these scores).
    backbone: where to look first for a frozen backbone. device: default the GPU, else the CPU. precision: auto, bf16,
    fp16 or fp32. Raises UserError for what is missing, damaged or does not fit together.
    """
    place = None if backbone is None else Path(backbone)
    if isinstance(source, str | Path) and (Path(source) / BUNDLE).is_file():
        if task is not None or how is not None:
            raise UserError(f"{source}: a bundle says its task and how it averages; give neither")
        bundle = load_bundle(Path(source), place)
        given = bundle.calibration if calibration is None else read_calibration(Path(calibration))
        if given is not None:
            given.require(scores_of(bundle.ensemble, bundle.how), calibration or source)
        return Predictor(
            *(bundle.task, bundle.ensemble, bundle.stored),
            how=bundle.how,
            calibration=given,
            device=device,
            precision=precision,
        )
    texts = [member_text(source)] if isinstance(source, str | Path) else list(source)
    specs = [parse_member(text) for text in texts]
    runs = runs_of(specs)
    task, how = task_of_models(specs, task), how or "prob"
    ensemble = load_ensemble(specs, task, place)
    found = find_calibration(ensemble, runs, how, None if calibration is None else Path(calibration))
    stored, note = stored_of(ensemble)
    predictor = Predictor(task, ensemble, stored, how=how, calibration=found, device=device, precision=precision)
    predictor.notes += [note] if note else []
    return predictor


def runs_of(specs: Sequence[MemberSpec]) -> list[Path]:
    """The run folders among the members' sources."""
    return [spec.source for spec in specs if spec.source.is_dir()]


def scores_of(ensemble: Ensemble, how: Average) -> str:
    """The `identity` of what these members' average says."""
    return identity([(member.weight, member.checkpoints) for member in ensemble.members], how)


def find_calibration(
    ensemble: Ensemble, runs: Sequence[Path], how: Average, given: Path | None = None
) -> Calibration | None:
    """The calibration `given`, else the first in a run folder that was fitted on these members' scores, else None."""
    own = scores_of(ensemble, how)
    if given is not None:
        calibration = read_calibration(given)
        calibration.require(own, given)
        return calibration
    there = (run / FILE for run in dict.fromkeys(runs) if (run / FILE).is_file())
    return next((each for each in map(Calibration.read, there) if each.scores_of == own), None)


def stored_of(ensemble: Ensemble) -> tuple[StoredImages, str]:
    """How the members' training images were prepared, and a note where they do not say it. UserError: differently."""
    facts = {origin.label: origin.facts for origin in ensemble.origins.values()}
    said = {label: found.stored for label, found in facts.items() if found is not None and found.stored is not None}
    if not said:
        return (
            AS_PUBLISHED,
            "the weights do not say how their images were prepared: as published (600 px, squashed) is taken",
        )
    (first, stored), *others = said.items()
    if different := [label for label, each in others if each != stored]:
        raise UserError(f"{first} and {different[0]} were trained on images prepared differently; use one of them")
    return stored, ""


def member_text(source: str | Path) -> str:
    """`--member` for a bare run folder or weight file: a member of its own name. UserError where neither is there."""
    text = str(source)
    if "=" in text or not (Path(text).exists() or "@" in text):
        if "=" not in text:
            raise UserError(f"{text}: no such bundle, run folder or weight file; check the path")
        return text
    stem = Path(text.partition("@")[0]).stem
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in stem)
    return f"{name.lstrip('._-') or 'model'}={text}"
