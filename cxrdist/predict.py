"""What a trained model says of X-rays: a table of findings; no shards needed. Its flags: `cxrdist.flags.predict`."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cxrdist.cli import run_entry
from cxrdist.errors import UserError
from cxrdist.files import check_outputs, refuse_input, refuse_links, write_output
from cxrdist.flags.model import load_model
from cxrdist.flags.predict import parser
from cxrdist.inference.findings import NOT_CALIBRATED, is_positive, ranked, shown_prob
from cxrdist.inference.predictor import Prediction, Predictor
from cxrdist.report.page import WARNING
from cxrdist.report.saliency import FROM_RANDOM, overlay_png
from cxrdist.shards.sources import list_images

IN_FULL = 5  # images whose findings are all shown
SHOWN = 20  # findings of one image; --json lists all
ADDED = ("calibrated", "positive")


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    begun = time.monotonic()
    started_s = seconds_since_start()
    images = named_images(args.images)
    out = {flag: path for flag, path in (("--json", args.json), ("--csv", args.csv)) if path is not None}
    inputs = [path for path in (args.bundle, args.calibration, args.backbone) if path is not None]
    for flag, path in out.items():
        check_outputs([path], [*inputs, *images.values()], flag=flag)
    if args.maps is not None:
        check_maps(args.maps, args.images)
    flag, first = next(iter(out.items()), ("", None))
    keep = None if first is None else first.with_name(f"{first.name}.parts")
    if keep is not None:
        refuse_links(keep, flag=flag)
    model = load_model(args)
    if args.maps is not None:
        model.mapped()
    for note in model.notes:
        print(note)
    loaded = time.monotonic()
    found = predict(model, images, args.device_batch_size, keep)
    done = time.monotonic()
    if some := len(found) > 0:
        print(table(model, found))
    if args.csv is not None:
        write_output(args.csv, as_csv(found))
    if args.json is not None:
        write_output(args.json, as_json(model, found))
    maps = write_maps(model, images, found, args.maps) if some and args.maps is not None else 0
    if keep is not None:
        shutil.rmtree(keep, ignore_errors=True)
    for path in out.values():
        print(f"written: {path}")
    mapped_s = time.monotonic() - done
    shares = [f"start and imports {started_s:.1f} s", f"weights {loaded - begun:.1f} s"]
    shares += [f"images and model {done - loaded:.1f} s"]
    shares += [f"{maps} maps {mapped_s:.1f} s"] if args.maps is not None else []
    total = started_s + time.monotonic() - begun
    if some:
        took = f"{len(found):,} image{'s' * (len(found) != 1)} in {total:.1f} s"
        print(f"{took} on {model.device.type}, {model.precision}: {', '.join(shares)}")
        print(WARNING)
    if found.unreadable:
        name, reason = next(iter(found.unreadable.items()))
        what = f"{len(found.unreadable):,} of {len(images):,} images could not be read and have no result"
        raise UserError(f"{what}, e.g. {name}: {reason}; repair them or leave them out")


def check_maps(folder: Path, images: Sequence[Path]) -> None:
    """UserError, before a model is loaded, where maps must not be written."""
    refuse_links(folder, flag="--maps")
    for source in images:
        refuse_input(folder, source, "--maps")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--maps {folder}: is a file; give a folder")


def seconds_since_start() -> float:
    """Since this process began, imports included; 0 where the system does not say it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def named_images(given: Sequence[Path]) -> dict[str, Path]:
    """Files by the name that they get in the results: as typed, and below a folder relative to that."""
    found: dict[str, Path] = {}
    for path in given:
        if path.is_dir():
            listed = list_images(path).images
            if problems := [f"{path / name}: {file.problem}" for name, file in listed.items() if file.problem]:
                raise UserError(f"{problems[0]}; leave it out")
            files = {name: path / name for name in sorted(listed)}
        elif path.exists():
            files = {str(path): path}
        else:
            raise UserError(f"{path}: no such image or folder; check the path")
        if twice := [name for name in files if name in found]:
            raise UserError(f"{path}: two images would be called {twice[0]!r}; give them in two commands")
        found |= files
    return found


def predict(model: Predictor, images: dict[str, Path], batch_size: int | None, keep: Path | None) -> Prediction:
    """`Predictor.predict` with a progress bar; its sources are the names. keep: where an interrupted one resumes."""
    names = {str(path): name for name, path in images.items()}
    with tqdm(total=len(images), unit=" images", desc="predict", disable=len(images) <= SHOWN) as show:
        paths = list(images.values())
        found = model.predict(paths, batch_size=batch_size, skip_unreadable=True, progress=show.update, keep=keep)
    sources = tuple(names[source] for source in found.sources)
    unreadable = {names[source]: reason for source, reason in found.unreadable.items()}
    return dataclasses.replace(found, sources=sources, unreadable=unreadable)


def table(model: Predictor, found: Prediction) -> str:
    """The findings for people: of a few images all, of more the positive or likely ones."""
    lines = []
    for row, name in enumerate(found.sources):
        order = ranked(found, row)
        if len(found) > IN_FULL:
            chosen = [label for label in order if is_positive(found, row, label)]
            told = ", ".join(f"{found.labels[label]} {shown_prob(found, row, label):.2f}" for label in chosen)
            top = f"none (highest: {found.labels[order[0]]} {shown_prob(found, row, order[0]):.2f})"
            lines.append(f"{name}: {told or top}")
            continue
        width = max(len(label) for label in found.labels) + 2
        head = f"  {'finding':<{width}}probability"
        lines.append(f"{name}\n{head}{'' if found.calibrated is None else '  calibrated  threshold'}")
        for label in order[:SHOWN]:
            line = f"  {found.labels[label]:<{width}}{found.probabilities[row, label]:>11.3f}"
            if found.calibrated is not None and model.calibration is not None:
                threshold = model.calibration.thresholds[label]
                line += f"{found.calibrated[row, label]:>12.3f}{threshold:>11.3f}".replace("nan", "  -")
                line += "  positive" if is_positive(found, row, label) else ""
            lines.append(line)
        if len(order) > SHOWN:
            lines.append(f"  and {len(order) - SHOWN} more: --json and --csv list all")
    if model.calibration is None:
        lines.append(NOT_CALIBRATED)
    return "\n".join(lines)


def as_csv(found: Prediction) -> str:
    """A score table; after its columns those of calibrated probabilities and decisions, where there are any."""
    buffer, labels = io.StringIO(), list(found.labels)
    rows = csv.writer(buffer, lineterminator="\n")
    more = [] if found.calibrated is None else [f"{label} {kind}" for kind in ADDED for label in labels]
    rows.writerow(["image_name", *labels, *more])
    for row, name in enumerate(found.sources):
        cells = [str(value) for value in found.probabilities[row]]
        if found.calibrated is not None and found.decisions is not None:
            cells += [str(value) for value in found.calibrated[row]]
            cells += ["" if decision < 0 else str(decision) for decision in found.decisions[row]]
        rows.writerow([name, *cells])
    return buffer.getvalue()


def as_json(model: Predictor, found: Prediction) -> str:
    """Every finding of every image with all that is known of it."""
    thresholds = None if model.calibration is None else model.calibration.thresholds
    images = []
    for row, name in enumerate(found.sources):
        findings = {}
        for place, label in enumerate(found.labels):
            about: dict[str, float | bool | None] = {"probability": float(found.probabilities[row, place])}
            if found.calibrated is not None and found.decisions is not None and thresholds is not None:
                known = not np.isnan(thresholds[place])
                about["calibrated"] = float(found.calibrated[row, place])
                about["threshold"] = float(thresholds[place]) if known else None
                about["positive"] = bool(found.decisions[row, place] == 1) if known else None
            findings[label] = about
        images.append({"image": name, "findings": findings})
    members = [member.name for member in model.members]
    whole = {"notice": WARNING, "members": members, "images": images, "unreadable": found.unreadable}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def write_maps(model: Predictor, images: dict[str, Path], found: Prediction, folder: Path) -> int:
    """A PNG for each positive or likely finding of each image that a model can map; returns how many."""
    wanted = [
        (name, row, [label for label in ranked(found, row) if is_positive(found, row, label)])
        for row, name in enumerate(found.sources)
    ]
    paths = {
        (name, label): folder / map_name(name, found.labels[label]) for name, _, order in wanted for label in order
    }
    check_outputs(paths.values(), images.values(), flag="--maps", folder=folder)
    note = FROM_RANDOM if model.about_maps()[2] else ""
    for name, row, order in tqdm(wanted, unit=" images", desc="maps", disable=len(wanted) <= SHOWN):
        if not order:
            continue
        maps, levels = model.maps(images[name], [found.labels[label] for label in order])
        for label, heat in zip(order, maps, strict=True):
            caption = f"{found.labels[label]} {shown_prob(found, row, label):.2f}"
            write_output(paths[name, label], overlay_png(levels, heat, caption, note))
    told = f"{len(paths)} in {folder}" if paths else "none, no finding is positive"
    print(f"maps: {told}{f'. {note}' if note else ''}")
    return len(paths)


def map_name(name: str, label: str) -> str:
    """The file name of a map, of safe letters."""
    return "--".join(re.sub(r"[^A-Za-z0-9._-]+", "_", part).strip("._") or "_" for part in (name, label)) + ".png"


if __name__ == "__main__":
    raise SystemExit(run_entry(main, again="run the same command again"))
