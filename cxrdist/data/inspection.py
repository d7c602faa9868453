"""What is suspicious in a shard set: repeated, blank, tiny or turned images, contradictory ids, patients in two splits.

Findings are advice: each says what was counted, why it matters and what to do. The index answers most questions; one
pass over the pixels, each image decoded at an eighth of its size, finds blank images and near duplicates.
"""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from cxrdist.data.reader import ShardReader
from cxrdist.distributed.environment import usable_cores
from cxrdist.errors import UserError
from cxrdist.shards.columns import Targets, Texts
from cxrdist.shards.index import AdoptedMeta, ShardIndex
from cxrdist.task import MIN_CASES

Ids = NDArray[np.int64]

MAX_EXAMPLES = 6  # of a finding
IMAGES_PER_EXAMPLE = 4
IMAGES_AT_ONCE = 64  # of a thread's task
ROWS_AT_ONCE = 2**16  # of the labels
# Images are compared by two difference hashes: is a cell of a coarse mean image brighter than its left neighbour by
# more than MARGIN grey levels (without it, noise decides in black borders)? Bits that differ between an image and its
# copy (JPEG quality 40 and 70, brightness, contrast, gamma, half size; median / 95 % / largest), and between two
# patients (smallest; all pairs of 180 real X-rays and of 598 phantoms):
#     64 bits      0 / 2 / 6         real  3   phantoms   1    5 in 10,000 pairs of two patients are within 3
#     256 bits     1 / 8 / 25        real 24   phantoms  16
#     1,024 bits  12 / 32 / 74       real 178  phantoms 113    no pair is below 100
# 64 bits alone would flag 10 million pairs of 200,000 images: they only choose the candidates, 1,024 bits decide.
COARSE_CELLS, FINE_CELLS = 8, 32  # hashes of 8 x 8 and 32 x 32 bits
MARGIN = 1
MAX_COARSE, MAX_FINE = 3, 48
# Two hashes with at most 3 different bits agree in at least 3 of 6 bands. Images are compared that share 3 bands, one
# of 20 keys of 31 to 33 bits: 20 sorts instead of all pairs.
BANDS = (11, 11, 11, 11, 10, 10)
# Images compared with one, of those that share a key with it: keeps the search linear, 7 s for 200,000 hashes drawn
# like the real set's, 22 s for 400,000. It found 997 and 990 of 1,000 planted copies; 400 neighbours find 1,000 and 999
# in twice the time.
MAX_NEIGHBOURS = 100
# The 1st and 99th percentile of the grey levels. Over 180 real X-rays the 1st is at most 95, the 99th at least 148, and
# they are at least 105 apart.
DARK, BRIGHT, FLAT = 24, 231, 24
MAX_ASPECT = 2.0  # of the longer and the shorter side; 1.37 at most in the real set


@dataclass(frozen=True)
class Example:
    note: str
    images: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finding:
    """`count` is of `unit`, whose first s makes a plural; images are positions in a `Splits`."""

    title: str
    count: int
    unit: str
    why: str
    remedy: str
    examples: tuple[Example, ...]

    @property
    def amount(self) -> str:
        return f"{self.count:,} {self.unit if self.count > 1 else self.unit.replace('s', '', 1)}"


class Splits:
    """The splits of one shard set as one table: image `starts[s] + row` is the row of split s."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self.indexes = tuple(indexes)
        self.task = self.indexes[0].task
        for index in self.indexes:
            if differences := self.task.differences(index.task):
                raise UserError(f"{index.folder}: its splits are not of one task ({'; '.join(differences)})")
        self.starts = np.cumsum([0, *map(len, self.indexes)])
        self.names = self.texts("image_names")
        ids = self.texts("patients")  # an image whose patient nothing says has its own name as id
        self.patients = Texts(pc.if_else(pc.equal(ids.array, self.names.array), "", ids.array))
        self._readers = [ShardReader(index) for index in self.indexes]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, image: int) -> tuple[int, int]:
        """(split number, row) of an image."""
        split = int(np.searchsorted(self.starts, image, side="right")) - 1
        return split, image - int(self.starts[split])

    def texts(self, field: str) -> Texts:
        columns = [getattr(index, field) for index in self.indexes]
        return columns[0] if len(columns) == 1 else Texts(pa.concat_arrays([column.array for column in columns]))

    def column(self, field: str) -> NDArray[Any]:
        return np.concatenate([getattr(index, field) for index in self.indexes])

    @property
    def split_ids(self) -> Ids:
        return np.repeat(np.arange(len(self.indexes)), np.diff(self.starts))

    @property
    def sizes_known(self) -> bool:
        """Whether the set knows its source files' sizes and rotations; version 1 does not."""
        return bool(self.column("widths").any())

    def split_name(self, image: int) -> str:
        return self.indexes[self.place(image)[0]].split

    def targets(self, image: int) -> NDArray[np.float32] | None:
        split, row = self.place(image)
        targets = self.indexes[split].targets
        return None if targets is None else targets[row]

    def read(self, image: int) -> bytes:
        """The JPEG, compared with its hash; UserError where it is damaged."""
        split, row = self.place(image)
        return self._readers[split].read(row)

    def small(self, image: int, min_side: int, kind: str = "GRAY") -> NDArray[np.uint8]:
        """(h, w, channels) pixels, as few as the decoder offers with sides of at least min_side; UserError: damaged."""
        data, (split, row) = self.read(image), self.place(image)
        meta = self.indexes[split].meta
        try:
            if isinstance(meta, AdoptedMeta):  # of any size and kind: decoded in full
                channels = 3 if kind == "RGB" else int(self.indexes[split].channels[row])
                pixels = np.empty((meta.size_px, meta.size_px, channels), np.uint8)
                self._readers[split].decode(data, pixels)
                grey = kind == "GRAY" and channels == 3
                return np.asarray(Image.fromarray(pixels).convert("L"))[..., None] if grey else pixels
            return np.asarray(simplejpeg.decode_jpeg(data, kind, min_height=min_side, min_width=min_side, min_factor=8))
        except ValueError as error:
            what = f"cannot be decoded ({error}); {meta.make_again}"
            raise UserError(f"{self._readers[split].where(row)}: {what}") from None

    def thumbnail(self, image: int, side: int) -> bytes:
        """A JPEG of side x side pixels, without anything but pixels in it."""
        split, row = self.place(image)
        grey = self.indexes[split].channels[row] == 1
        pixels = self.small(image, side, "GRAY" if grey else "RGB")
        picture = Image.fromarray(pixels[..., 0] if grey else pixels)
        buffer = io.BytesIO()
        picture.resize((side, side), Image.Resampling.BOX, reducing_gap=None).save(buffer, "JPEG", quality=72)
        return buffer.getvalue()


@dataclass(frozen=True, eq=False)
class Pixels:
    """What the pass over the pixels keeps, 138 bytes an image.

    coarse: (N,) uint64 and fine: (N, 16) uint64, the difference hashes. dark, bright: (N,) uint8, the 1st and 99th
    percentile of the grey levels.
    """

    coarse: NDArray[np.uint64]
    fine: NDArray[np.uint64]
    dark: NDArray[np.uint8]
    bright: NDArray[np.uint8]


def look(splits: Splits, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> Pixels:
    """Decode each image once, small, in threads. UserError for the first that is damaged.

    With reading, checking and hashing, the speed is 0.9 to 1.0 of a bare decode at full size.
    `progress` may wrap the images in a progress bar.
    """
    size = len(splits)
    fine = np.empty((size, FINE_CELLS**2 // 64), np.uint64)
    pixels = Pixels(np.empty(size, np.uint64), fine, np.empty(size, np.uint8), np.empty(size, np.uint8))

    def work(start: int) -> range:
        images = range(start, min(start + IMAGES_AT_ONCE, size))
        for image in images:
            grey = splits.small(image, FINE_CELLS * 2)[..., 0]
            pixels.coarse[image] = difference_hash(grey, COARSE_CELLS)[0]
            pixels.fine[image] = difference_hash(grey, FINE_CELLS)
            below = np.bincount(grey.ravel(), minlength=256).cumsum()
            pixels.dark[image], pixels.bright[image] = np.searchsorted(below, (0.01 * grey.size, 0.99 * grey.size))
        return images

    pool = ThreadPoolExecutor(usable_cores())
    try:
        for _ in progress(itertools.chain.from_iterable(pool.map(work, range(0, size, IMAGES_AT_ONCE)))):
            pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # when interrupted, threads end after their 64 images
    return pixels


def difference_hash(grey: NDArray[np.uint8], cells: int) -> NDArray[np.uint64]:
    """(cells^2 / 64,) uint64: a bit for each pair of neighbours in a row of cells x (cells + 1) means."""
    height, width = grey.shape
    tops, lefts = np.arange(cells) * height // cells, np.arange(cells + 1) * width // (cells + 1)
    sums = np.add.reduceat(np.add.reduceat(grey, tops, axis=0, dtype=np.uint32), lefts, axis=1)
    means = sums / np.outer(np.diff(tops, append=height), np.diff(lefts, append=width))
    return np.packbits(means[:, 1:] > means[:, :-1] + MARGIN).view(np.uint64)


def near_pairs(coarse: NDArray[np.uint64], fine: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (P, 2) of positions whose hashes differ in few bits, the most similar first, and their distances (P,)."""
    bands = [(coarse >> np.uint64(shift)) % np.uint64(2**bits) for shift, bits in zip(_shifts(), BANDS, strict=True)]
    size = len(coarse)
    found = np.empty(0, np.int64)  # first * size + second
    for chosen in itertools.combinations(range(len(BANDS)), len(BANDS) - MAX_COARSE):
        key = np.zeros(size, np.uint64)
        for band in chosen:
            key = key << np.uint64(BANDS[band]) | bands[band]
        order = np.argsort(key, kind="stable")
        key = key[order]
        near = [found]
        for step in range(1, min(MAX_NEIGHBOURS, size - 1) + 1):
            same = np.flatnonzero(key[step:] == key[:-step])
            if not len(same):
                break
            pairs = np.stack([order[same], order[same + step]], axis=1)  # the first is the smaller: the sort is stable
            pairs = pairs[np.bitwise_count(coarse[pairs[:, 0]] ^ coarse[pairs[:, 1]]) <= MAX_COARSE]
            pairs = pairs[_distances(fine, pairs) <= MAX_FINE]
            near.append(pairs[:, 0] * size + pairs[:, 1])
        found = np.unique(np.concatenate(near))
    pairs = np.stack(np.divmod(found, size), axis=1)
    distances = _distances(fine, pairs)
    order = np.argsort(distances, kind="stable")
    return pairs[order], distances[order]


def _shifts() -> Iterator[int]:
    return itertools.accumulate(BANDS[:-1], initial=0)


def _distances(fine: NDArray[np.uint64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    distances: NDArray[np.int64] = np.bitwise_count(fine[pairs[:, 0]] ^ fine[pairs[:, 1]]).sum(axis=1, dtype=np.int64)
    return distances


@dataclass(frozen=True)
class LabelCounts:
    """(K,) of one split. positive: 0.5 and more; soft: between 0 and 1; prevalence: the mean of the observed cells."""

    observed: NDArray[np.int64]
    positive: NDArray[np.int64]
    soft: NDArray[np.int64]
    total: NDArray[np.float64]


def label_counts(targets: Targets) -> LabelCounts:
    """In pieces: all cells of a large set would not fit beside it."""
    zeros = np.zeros(targets.shape[1], np.int64)
    counts = LabelCounts(zeros, zeros.copy(), zeros.copy(), zeros.astype(np.float64))
    for start in range(0, len(targets), ROWS_AT_ONCE):
        cells = targets[start : start + ROWS_AT_ONCE]
        counts.observed[:] += (~np.isnan(cells)).sum(axis=0)
        counts.positive[:] += (cells >= 0.5).sum(axis=0)
        counts.soft[:] += ((cells > 0) & (cells < 1)).sum(axis=0)
        counts.total[:] += np.nansum(cells, axis=0, dtype=np.float64)
    return counts


def findings(splits: Splits, pixels: Pixels) -> list[Finding]:
    """All that is suspicious, worst first; empty for a set without a doubt."""
    found = [
        *_repeated(splits),
        *_patients_in_two_splits(splits),
        *_near_duplicates(splits, pixels),
        *_ids_against_names(splits),
        *_contradictory_sex(splits),
        *_blank(splits, pixels),
        *_odd_sources(splits),
        *_one_sided_labels(splits),
        *_few_cases(splits),
    ]
    return [finding for finding in found if finding.count]


def _images(
    splits: Splits, title: str, chosen: NDArray[Any], why: str, remedy: str, note: Callable[[int], str]
) -> Finding:
    """A finding about single images: those where `chosen` is true."""
    images = np.flatnonzero(chosen).tolist()
    examples = tuple(Example(note(image), (image,)) for image in images[: 2 * MAX_EXAMPLES])
    return Finding(title, len(images), "images", why, remedy, examples)


def _groups(digests: NDArray[np.uint8]) -> list[list[int]]:
    """The images of each SHA-256 that several have."""
    words = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort(words.T)
    starts = np.flatnonzero(np.append(True, (words[order[1:]] != words[order[:-1]]).any(axis=1)))
    sizes = np.diff(starts, append=len(order))
    return [sorted(order[start : start + size].tolist()) for start, size in zip(starts, sizes, strict=True) if size > 1]


def _repeated(splits: Splits) -> Iterator[Finding]:
    groups = sorted(_groups(splits.column("digests")))
    patients = [len({splits.patients[image] for image in group} - {""}) for group in groups]  # "": unknown
    parts = [len({splits.place(image)[0] for image in group}) for group in groups]
    labels = [_differ([splits.targets(image) for image in group]) for group in groups]
    kinds = {
        "Equal images under different patients": (
            [number > 1 for number in patients],
            "At least one of the ids is wrong. A split by patient may put one picture on both sides, and scores on "
            "held-out patients are then too good.",
            "Find out whose image it is and correct or remove the other rows of the table.",
        ),
        "Equal images with different labels": (
            labels,
            "The same pixels cannot be positive and negative: at least one row is wrong, and the model is told both.",
            "Correct the labels, or keep one row of each group.",
        ),
        "Equal images in several splits": (
            [number > 1 for number in parts],
            "The model is judged on images that it was trained on.",
            "Remove the image from the training split.",
        ),
        "Images stored more than once": (
            [patient <= 1 == part and not label for patient, part, label in zip(patients, parts, labels, strict=True)],
            "The same patient, split and labels: harmless but for weight, as the image counts several times.",
            "Keep one row of each group.",
        ),
    }
    for title, (chosen, why, remedy) in kinds.items():
        there = [group for group, choose in zip(groups, chosen, strict=True) if choose]
        examples = tuple(
            Example(_where(splits, group), tuple(group[:IMAGES_PER_EXAMPLE])) for group in there[:MAX_EXAMPLES]
        )
        yield Finding(title, len(there), "groups of images", why, remedy, examples)


def with_several(codes: NDArray[np.integer[Any]], kinds: Ids) -> Ids:
    """The codes, sorted, that occur with more than one kind. codes, kinds: (N,), 0 or more."""
    num_kinds = int(kinds.max(initial=0)) + 1
    pairs = np.unique(codes.astype(np.int64) * num_kinds + kinds)
    return np.flatnonzero(np.bincount(pairs // num_kinds) > 1)


def _differ(targets: list[NDArray[np.float32] | None]) -> bool:
    known = [target for target in targets if target is not None]
    return any(not np.array_equal(known[0], target, equal_nan=True) for target in known[1:])


def _where(splits: Splits, images: Sequence[int]) -> str:
    names = sorted({splits.split_name(image) for image in images})
    patients = sorted({splits.patients[image] for image in images})
    shown = ", ".join(patient or "(blank)" for patient in patients[:IMAGES_PER_EXAMPLE])
    more = ", ..." if len(patients) > IMAGES_PER_EXAMPLE else ""
    return f"{len(images)} images; patients {shown}{more}; in {', '.join(names)}"


def _patients_in_two_splits(splits: Splits) -> Iterator[Finding]:
    codes, patients = splits.patients.codes()
    several = with_several(codes, splits.split_ids)
    several = np.array([code for code in several if patients[code]], np.int64)
    examples = []
    for code in several[:MAX_EXAMPLES]:
        images = np.flatnonzero(codes == code)
        _, first = np.unique(splits.split_ids[images], return_index=True)
        shown = images[first[:IMAGES_PER_EXAMPLE]].tolist()
        examples.append(Example(_where(splits, images.tolist()), tuple(shown)))
    why = "The model is judged on patients it has seen in training; scores are too good."
    remedy = "Split by patient: give all images of a patient to one split."
    yield Finding("Patients in several splits", len(several), "patients", why, remedy, tuple(examples))


def _near_duplicates(splits: Splits, pixels: Pixels) -> Iterator[Finding]:
    words = np.ascontiguousarray(splits.column("digests")).view(np.uint64)
    blank = np.logical_or.reduce(list(_blank_masks(pixels).values()))
    _, first = np.unique(words[:, 0], return_index=True)  # equal images are a finding of their own
    chosen = np.sort(first[~blank[first]])
    pairs, distances = near_pairs(pixels.coarse[chosen], pixels.fine[chosen])
    pairs = chosen[pairs]
    (codes, patients), parts = splits.patients.codes(), splits.split_ids
    known = np.array([bool(patient) for patient in patients])[codes][pairs].all(1)
    strange = known & (codes[pairs[:, 0]] != codes[pairs[:, 1]])
    crossing = parts[pairs[:, 0]] != parts[pairs[:, 1]]
    for title, there, why, remedy in (
        (
            "Nearly equal images under different patients",
            strange,
            "Probably one picture, saved twice (other JPEG quality, size or brightness), under two ids.",
            "Compare the pairs by eye; correct the ids or remove one image of each true pair.",
        ),
        (
            "Nearly equal images of one patient in several splits",
            ~strange & crossing,
            "Probably one picture, saved twice, in training and test.",
            "Remove it from one of the splits.",
        ),
        (
            "Nearly equal images of one patient",
            ~strange & ~crossing,
            "Probably one picture, saved twice; it counts twice.",
            "Keep one of them, if they are the same picture.",
        ),
    ):
        shown = [
            Example(f"{_where(splits, pair)}; {distance} of {FINE_CELLS**2:,} bits differ", tuple(pair))
            for pair, distance in zip(pairs[there][:MAX_EXAMPLES].tolist(), distances[there].tolist(), strict=False)
        ]
        yield Finding(title, int(there.sum()), "pairs of images", why, remedy, tuple(shown))


def _ids_against_names(splits: Splits) -> Iterator[Finding]:
    task, studies = splits.task, splits.texts("studies")
    wrong = np.zeros(len(splits), bool)
    if task.names:
        for image, (name, patient, study) in enumerate(zip(splits.names, splits.patients, studies, strict=True)):
            said = task.ids_in_name(name)
            if said is not None:
                wrong[image] = patient not in ("", said[0]) or study not in ("", said[1])
    why = "The table's patient or study is not the one in the image's name. Folds and studies follow the table."
    remedy = "Find out which is right; a shifted column contradicts in nearly every row."

    def note(image: int) -> str:
        patient, study = task.ids_in_name(splits.names[image]) or ("", "")
        return f"name: {patient} / {study}; table: {splits.patients[image]} / {studies[image]}"

    yield _images(splits, "Ids that contradict the image's name", wrong, why, remedy, note)


def _contradictory_sex(splits: Splits) -> Iterator[Finding]:
    sexes = splits.texts("sexes")
    sex, texts = sexes.codes()
    meaning = np.array([_sex(text) for text in texts])[sex]  # 0 unknown
    codes, patients = splits.patients.codes()
    known = (meaning > 0) & np.array([bool(patient) for patient in patients])[codes]
    several = with_several(codes[known], meaning[known])
    examples = []
    for code in several[:MAX_EXAMPLES]:
        images = np.flatnonzero((codes == code) & known)
        _, first = np.unique(meaning[images], return_index=True)
        shown = images[first].tolist()
        note = f"patient {patients[code]}: " + ", ".join(sexes[image] for image in shown)
        examples.append(Example(note, tuple(shown)))
    why = "One id with two sexes is often two people."
    remedy = "Check the ids; two people under one id make patients' folds coarser, not wrong."
    yield Finding("Patients with contradictory sex", len(several), "patients", why, remedy, tuple(examples))


def _sex(text: str) -> int:
    """1 male, 2 female, 0 unknown."""
    return {"m": 1, "f": 2, "w": 2}.get(text.strip()[:1].lower(), 0)


def _blank_masks(pixels: Pixels) -> dict[str, NDArray[np.bool_]]:
    dark, bright = pixels.bright <= DARK, pixels.dark >= BRIGHT
    uniform = pixels.bright.astype(np.int64) - pixels.dark < FLAT
    return {
        "Nearly black images": dark,
        "Nearly white images": bright & ~dark,
        "Nearly uniform images": uniform & ~dark & ~bright,
    }


def _blank(splits: Splits, pixels: Pixels) -> Iterator[Finding]:
    why = "There is no picture in it: a failed export or window, or a test exposure. Its labels teach nothing."
    remedy = "Export it again, or leave it out of the table."
    for title, chosen in _blank_masks(pixels).items():
        yield _images(
            splits, title, chosen, why, remedy,
            lambda image: f"98 % of its grey levels lie from {pixels.dark[image]} to {pixels.bright[image]}",
        )  # fmt: skip


def _odd_sources(splits: Splits) -> Iterator[Finding]:
    width, height = (splits.column(name).astype(np.int64) for name in ("widths", "heights"))
    short, long = np.minimum(width, height), np.maximum(width, height)
    stored = np.repeat([index.size_px for index in splits.indexes], np.diff(splits.starts))
    orientation = splits.column("orientations")

    def size(image: int) -> str:
        return f"{width[image]} x {height[image]} px"

    yield _images(
        splits,
        "Tiny source images",
        (short > 0) & (2 * short < stored),
        "They were enlarged more than twofold. Thumbnails and previews look like this; small findings are lost.",
        "Look for the full images, or leave these out.",
        size,
    )
    yield _images(
        splits,
        "Extreme aspect ratios",
        (short > 0) & (long > MAX_ASPECT * short),
        f"One side is more than {MAX_ASPECT:g} times the other: often not a chest, or several pictures side by side.",
        "Look at them; `preprocess --fit pad` keeps the aspect ratio.",
        size,
    )
    yield _images(
        splits,
        "Images with an EXIF rotation",
        orientation > 1,
        "Their header tells a viewer to turn or mirror them, which nobody does here or in training. A radiograph from "
        "an archive has no such tag: these were edited or photographed.",
        "See whether they stand upright here; if not, turn the source files' pixels and run preprocess again.",
        lambda image: f"EXIF orientation {orientation[image]}",
    )


def _one_sided_labels(splits: Splits) -> Iterator[Finding]:
    counts = {index.split: label_counts(index.targets) for index in splits.indexes if index.targets is not None}
    for kind in ("positive", "negative"):
        missing = []
        for split, of in counts.items():
            number = of.positive if kind == "positive" else of.observed - of.positive
            missing += [(split, splits.task.labels[place]) for place in np.flatnonzero(number == 0)]
        why = f"Without a {kind} image nothing can be learned about a label, and its AUROC is not defined."
        remedy = "Check the label's column and spelling in the table; or leave the label out of the task."
        examples = tuple(Example(f"{label} in {split}") for split, label in missing[: 10 * MAX_EXAMPLES])
        yield Finding(f"Labels without a {kind} image", len(missing), "labels in a split", why, remedy, examples)


def _few_cases(splits: Splits) -> Iterator[Finding]:
    few = []
    for index in splits.indexes:
        if index.targets is None:
            continue
        counts = label_counts(index.targets)
        numbers = zip(splits.task.labels, counts.positive.tolist(), counts.observed.tolist(), strict=True)
        few += [
            Example(f"{label} in {index.split}: {some:,} positive, {seen - some:,} negative")
            for label, some, seen in numbers
            if 0 < min(some, seen - some) < MIN_CASES
        ]
    why = "So few teach little about a label, and its AUROC on them, or on a part of them, is mostly chance."
    remedy = "Add images of these, merge the label with a related one, or read its scores with care."
    title = f"Labels with fewer than {MIN_CASES} positive or negative images"
    yield Finding(title, len(few), "labels in a split", why, remedy, tuple(few[: 10 * MAX_EXAMPLES]))
