"""Image folders and tables -> the rows of each split, every one of them with its file or the reason why it has none.

A row's image is the file at that path below the folder; where there is none, the one file that the name can mean: a
path that begins above or below the folder, or a name without folder or extension that one file alone has.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cxrdist.errors import UserError
from cxrdist.files import RECORD_FILE, is_utf8, own_files
from cxrdist.published import read_labels
from cxrdist.shards import dicom, store
from cxrdist.shards.convert import EXTENSIONS, Pixels
from cxrdist.shards.index import check_split_name
from cxrdist.shards.writer import Source, SplitJob
from cxrdist.tables import LabelTable, read_cells, read_template
from cxrdist.task import LAYOUTS, Task, name_problem

NUM_NAMED = 10  # rows without an image that are printed; the split's JSON lists all
MISSING = "not in the image folder"
DICOM_EXTENSIONS = (".dcm", ".dicom")
NUM_TRIED = 200  # rows that tell which column names the images


class ImageFile(NamedTuple):
    """A file: its path, its size in bytes, why it must not be read ('' if it may), whether it is a DICOM."""

    path: str = ""
    size: int = 0
    problem: str = MISSING
    is_dicom: bool = False


@dataclass(frozen=True, eq=False)
class Folder:
    """What lies below an image folder, by path relative to it: `images`, and files of other kinds, `others`."""

    images: dict[str, ImageFile]
    others: dict[str, ImageFile]

    @functools.cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """A file's name, and its name without extension, -> the files of that name."""
        found = collections.defaultdict[str, list[str]](list)
        for file in self.images:
            name = file.rpartition("/")[2]
            for key in {name, name.rpartition(".")[0]}:
                found[key].append(file)
        return found

    def file_of(self, name: str) -> str | None:
        """The file that a row's name means, or None."""
        if name in self.images or name in self.others:
            return name
        parts = name.split("/")
        tails = ("/".join(parts[start:]) for start in range(1, len(parts)))
        if tail := next((tail for tail in tails if tail in self.images), None):
            return tail
        candidates = self._by_name.get(parts[-1], [])
        if len(parts) > 1:
            candidates = [file for file in candidates if file.endswith(f"/{name}") or f"/{name}." in f"/{file}"]
        return candidates[0] if len(candidates) == 1 else None

    def __getitem__(self, file: str) -> ImageFile:
        return self.images.get(file) or self.others[file]


class Row(NamedTuple):
    """A row of a table; '' where it does not say."""

    image_name: str
    patient: str = ""
    study: str = ""
    view: str = ""
    sex: str = ""
    age: str = ""
    split: str = ""
    targets: tuple[float, ...] | None = None


def make_jobs(
    task: Task,
    out: Path,
    split: str | None,
    images: Sequence[Path | str],
    tables: Sequence[Path],
    pixels: Pixels,
    per_shard: int,
) -> list[SplitJob]:
    """One job per split. The tables are read and checked and the folders listed; no image is opened.

    images, tables: a table for each folder; or one table, or none, for all folders together. A folder given as text is
    the address of one in a store.
    split: the only one to make of those that the tables name; what rows are called that name none (default train).
    Raises UserError for what cannot be right.
    """
    check_split_name(split or "train")
    for folder in (folder for folder in images if isinstance(folder, Path) and folder.is_dir()):
        if out.is_dir() and out.samefile(folder):
            raise UserError(f"--out {out}: holds the images; give a folder of its own, such as shards/{task.folder}")
    pairs: list[tuple[tuple[Path | str, ...], tuple[Path, ...]]]
    pairs = [((folder,), (table,)) for folder, table in zip(images, tables, strict=False)]
    if len(images) != len(tables):
        pairs = [(tuple(images), tuple(tables))]
    if not tables and split in (None, "train", "valid"):
        needs = f"--split {split or 'train'} needs --csv FILE with the labels"
        raise UserError(f"{needs}; images to be scored are a split of another name, such as test")
    sources: dict[str, list[Source]] = {}
    of_name: dict[str, Path | str] = {}
    num_unused = 0
    for folders, csvs in pairs:
        listed = _together([list_images(folder) for folder in folders])
        where = ", ".join(map(str, folders))
        if csvs and task.format == "table" and not task.columns.image:
            columns = dataclasses.replace(task.columns, image=image_column(csvs[0], listed, where))
            task = dataclasses.replace(task, columns=columns)
        rows = rows_of_table(task, split, csvs[0]) if csvs else rows_of_files(task, listed, where)
        for row in rows:
            if of_name.setdefault(row.image_name, folders[0]) != folders[0]:
                both = f"{of_name[row.image_name]} and {folders[0]}"
                raise UserError(f"image {row.image_name!r} is in {both}: keep one, or give the folder above them")
        files = files_of(rows, listed, where, csvs)
        unused = listed.images.keys() - set(files.values())
        parts = by_split(rows, split, csvs)
        counts = ", ".join(f"{name} {len(found):,}" for name, found in parts.items())
        print(f"rows of {csvs[0] if csvs else where}: {counts}; images in {where}: {len(listed.images):,}")
        for name, found in parts.items():
            have = sources.setdefault(name, [])
            have += sources_of(task, name, found, files, listed, len(have))
        if unused:
            print(f"  images there without a row, not used: {len(unused):,} (first: {min(unused)})")
        num_unused += len(unused)
    provenance = {
        "csv": ", ".join(table.name for table in tables) or None,
        "csv_sha256": ", ".join(hashlib.sha256(table.read_bytes()).hexdigest() for table in tables) or None,
        "images_not_in_csv": num_unused,
    }
    return [SplitJob(out, task, name, found, pixels, per_shard, provenance) for name, found in sources.items()]


def _together(folders: list[Folder]) -> Folder:
    images = collections.ChainMap(*(folder.images for folder in folders))
    if len(images) != sum(len(folder.images) for folder in folders):
        names = itertools.chain.from_iterable(folder.images for folder in folders)
        twice = next(name for name, times in collections.Counter(names).items() if times > 1)
        raise UserError(f"{twice!r} is in several of the image folders; give the folder above them as --images")
    return Folder(dict(images), dict(collections.ChainMap(*(folder.others for folder in folders))))


def rows_of_table(task: Task, split: str | None, table: Path) -> list[Row]:
    """The rows of a label table or template, in its order; UserError as of `read_label_csv` and `read_template`."""
    of_template = {task.columns.image, *task.labels}
    is_template = task.format == "table" and read_cells(table, (), most=1).first.keys() <= of_template
    if split == "test" and (task.name in LAYOUTS or is_template):
        names = read_template(table, task).image_names
        return [Row(name, *(task.ids_in_name(name) or ())) for name in names]
    return rows_of_labels(read_labels(table, task), task)


def rows_of_labels(labels: LabelTable, task: Task) -> list[Row]:
    """The rows of a label table, whose notes are printed; a patient that is only the image's own name is left blank."""
    for note in labels.notes:
        print(note)
    about = [labels.about[field].tolist() for field in Row._fields[:-1]]
    return [
        row._replace(patient="") if row.patient == row.image_name and not task.columns.patient else row
        for row in itertools.starmap(Row, zip(*about, map(tuple, labels.targets.tolist()), strict=True))
    ]


def rows_of_files(task: Task, listed: Folder, where: str) -> list[Row]:
    """A row without targets for each image, sorted by name; UserError for a name that cannot be one."""
    for name in listed.images:
        if problem := name_problem(name):
            raise UserError(f"{where}: the name of {name!r} {problem}; rename it")
    return [Row(name, *(task.ids_in_name(name) or ())) for name in sorted(listed.images)]


def by_split(rows: list[Row], split: str | None, tables: Sequence[Path | str]) -> dict[str, list[Row]]:
    """The rows of each split that is to be made, in the order in which the splits come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.split or split or "train", []).append(row)
    if split is None:
        return found
    if split not in found:
        there = ", ".join(f"{name} ({len(rows):,})" for name, rows in found.items())
        raise UserError(f"--split {split}: {tables[0]} has none; its splits are {there}")
    return {split: found[split]}


def files_of(rows: list[Row], listed: Folder, where: str, tables: Sequence[Path]) -> dict[str, str]:
    """The file of each row that has one, by image name. UserError where none has, two rows share one, or it is a DICOM
    that cannot be read here.
    """
    files = {row.image_name: file for row in rows if (file := listed.file_of(row.image_name)) is not None}
    if not files:
        found = f"which holds {len(listed.images):,} images (first: {min(listed.images)!r})"
        wanted = f"none of the {len(rows):,} images of {tables[0]} (first: {rows[0].image_name!r})"
        raise UserError(f"{wanted} is in {where}, {found}; are --images and --csv of the same split?")
    name_of: dict[str, str] = {}
    for name, file in files.items():
        if name_of.setdefault(file, name) != name:
            raise UserError(f"{tables[0]}: images {name_of[file]!r} and {name!r} are the same file, {file} in {where}")
    dicoms = [file for file in name_of if listed[file].is_dicom]
    if dicoms and (remedy := dicom.dicom_available()):
        raise UserError(f"{where}: {len(dicoms):,} DICOM files (first: {dicoms[0]}); {remedy}")
    return files


def sources_of(
    task: Task, split: str, rows: list[Row], files: dict[str, str], listed: Folder, first_key: int
) -> list[Source]:
    """The sources of a split's rows, keyed from `first_key`; `files`: the file of each image name that has one."""
    known_bad = set(task.unreadable) if split != "test" else set()
    sources = []
    for key, row in enumerate(rows, start=first_key):
        path, size, problem, _ = listed[files[row.image_name]] if row.image_name in files else ImageFile()
        reason = f"known to be unreadable in task {task.name}" if row.image_name in known_bad else problem
        about = {field: getattr(row, field) for field in Row._fields if field not in ("image_name", "split")}
        sources.append(Source(key, row.image_name, path, size, reason, **about))
    if absent := [source.image_name for source in sources if source.reason == MISSING]:
        more = f" and {len(absent) - NUM_NAMED:,} more" if len(absent) > NUM_NAMED else ""
        print(f"  rows of {split} without an image there: {len(absent):,}: {', '.join(absent[:NUM_NAMED])}{more}")
    return sources


def image_column(table: Path, listed: Folder, where: str) -> str:
    """The column whose cells name files of the folder, judged by the first rows. UserError where none does."""
    counts = {
        name: sum(not name_problem(cell) and listed.file_of(cell) is not None for cell in column)
        for name, column in read_cells(table, most=NUM_TRIED).columns.items()
    }
    column = max(counts, key=counts.__getitem__)
    if not counts[column]:
        first = f"(first image: {min(listed.images)!r}; columns: {', '.join([*counts][:20])})"
        raise UserError(f"{table}: no column names images of {where} {first}; give --image-column, or other --images")
    print(f"{table}: column {column!r} names the images (--image-column says another)")
    return column


def list_images(folder: Path | str) -> Folder:
    """Files below `folder` (a text: the address of one in a store): images by extension (any case) or DICOM content,
    and others.

    A link that leaves the folder, and anything that is not a regular file, is listed with its problem and never opened;
    linked folders are not entered. In a store the name alone tells what is a DICOM. Raises UserError for a folder that
    is missing or holds no image.
    """
    listed = _list_folder(folder) if isinstance(folder, Path) else _list_store(folder)
    if listed.others:
        kinds = collections.Counter(os.path.splitext(name)[1].lower() or "no extension" for name in listed.others)
        found = ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common(NUM_NAMED))
        print(f"{folder}: files that are no images, not used: {found}; first: {min(listed.others)}")
    if not listed.images:
        found = ""
        if isinstance(folder, Path) and any(folder.iterdir()):
            found = f"; it holds the folder {min(os.listdir(folder))!r}"
        raise UserError(f"{folder}: no {', '.join(EXTENSIONS)} file in this image folder or below{found}; name another")
    return listed


def _list_store(url: str) -> Folder:
    listed = Folder({}, {})
    for name, size in store.list_files(url).items():
        is_dicom = name.lower().endswith(DICOM_EXTENSIONS)
        is_image = name.lower().endswith(EXTENSIONS)
        (listed.images if is_image else listed.others)[name] = ImageFile(f"{url}/{name}", size, "", is_dicom)
    return listed


def _list_folder(folder: Path) -> Folder:
    if not folder.is_dir():
        what = "is a file; --images takes the folder of the images" if folder.is_file() else "no such image folder"
        raise UserError(f"--images {folder}: {what}{'' if folder.is_file() else '; check the path'}")
    root = folder.resolve()
    listed = Folder({}, {})
    folders, linked = [""], list[str]()
    while folders:
        inside = folders.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                name = inside + entry.name
                if not is_utf8(name):
                    raise UserError(f"{folder}: the name {name!a} in it is not UTF-8; rename it")
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
                elif entry.is_dir():
                    linked.append(name)
                else:
                    file = _image_file(entry, root)
                    is_image = file.is_dicom or name.lower().endswith(EXTENSIONS)
                    (listed.images if is_image else listed.others)[name] = file
    if linked:
        print(f"{folder}: linked folders, not entered: {len(linked):,} (first: {min(linked)!r})")
    _leave_out_own(folder, listed)
    return listed


def _leave_out_own(folder: Path, listed: Folder) -> None:
    """Take what cxrdist itself wrote into these folders, as maps of `cxrdist predict`, out of the list."""
    own = list[str]()
    for record in [name for name in listed.others if name.rpartition("/")[2] == RECORD_FILE]:
        inside = record.removesuffix(RECORD_FILE)
        own += [inside + name for name in own_files(folder / inside)]
        del listed.others[record]
    for name in own:
        listed.images.pop(name, None)
        listed.others.pop(name, None)
    if own:
        print(f"{folder}: files that cxrdist wrote, not used: {len(own):,} (first: {min(own)})")


def _image_file(entry: "os.DirEntry[str]", root: Path) -> ImageFile:
    if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
        return ImageFile(entry.path, problem="a symbolic link that leaves the image folder is not followed")
    if not entry.is_file():
        return ImageFile(entry.path, problem="not a regular file")
    is_dicom = entry.name.lower().endswith(DICOM_EXTENSIONS)
    if not is_dicom and not entry.name.lower().endswith(EXTENSIONS):
        with contextlib.suppress(OSError), open(entry.path, "rb") as file:  # scanners name files by number
            is_dicom = file.read(132)[128:] == b"DICM"
    return ImageFile(entry.path, entry.stat().st_size, "", is_dicom)
