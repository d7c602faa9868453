"""The model card of a bundle: what the model is, on what it was trained, how good it is, and what it is not for."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cxrdist.errors import UserError
from cxrdist.inference.members import Ensemble
from cxrdist.models import architecture_of
from cxrdist.recipes import Recipe
from cxrdist.runs.documents import Facts, StoredImages
from cxrdist.scoring.operating import Calibration
from cxrdist.task import Task

FRONT = """---
library_name: cxrdist
pipeline_tag: image-classification
license: other
license_name: see-licences-of-the-weights
tags:
- chest-x-ray
- radiology
- multi-label-classification
---
"""
USES = """## Intended use, and what it is not for

Research on chest X-rays like those that it was trained on: sorting, triage studies, baselines, teaching.

It is **not a medical device**. No diagnosis and no treatment may rest on it. It has not been validated on other
hospitals, devices, ages or prevalences than those of its training data; validate it on your own data first
(`cxrdist evaluate`). It says nothing of findings outside its labels, of lateral views unless those were trained on, or
of images that are no chest X-rays. A saliency map shows what moved a score, not where a disease is.
"""
ONNX = """## ONNX

`checkpointN.onnx` holds one checkpoint each (order: the table above), for the plain view: input `levels` (batch, 3, S,
S) float32 in [0, 255]; output `logits` (batch, labels). To prepare an image as it was in training:

```python
import cv2, numpy as np, onnxruntime
from PIL import Image
grey = Image.open("chest.png").convert("L").resize(({px}, {px}), Image.Resampling.BILINEAR)   # {fit}
levels = cv2.resize(np.asarray(grey), ({size}, {size}), interpolation=cv2.INTER_LINEAR)
batch = np.repeat(levels[None, None].astype(np.float32), 3, axis=1)
logits, = onnxruntime.InferenceSession("checkpoint0.onnx").run(["logits"], {{"levels": batch}})
```

The average over views, checkpoints and members, the calibration, 16-bit images and DICOMs are `cxrdist predict`'s.
"""


def model_card(
    task: Task,
    ensemble: Ensemble,
    stored: StoredImages,
    calibration: Calibration | None,
    metrics: bytes | None = None,
    source: Path | None = None,
    *,
    onnx: bool = False,
) -> str:
    """README.md of a bundle. metrics: the JSON that `evaluate` wrote to `source`; UserError where it is another."""
    parts = [
        f"{FRONT}\n# Chest X-ray findings: {task.name}\n",
        f"{task.num_labels} findings: {', '.join(_escaped(label) for label in task.labels)}.\n",
        "```bash\npip install CXRDIST   # a folder or wheel of cxrdist\ncxrdist predict chest.png --bundle .\n```\n",
        "## Models\n",
        "| checkpoint | member (weight) | architecture | px | views | weights |\n|---|---|---|---|---|---|",
    ]
    number = 0
    for member in ensemble.members:
        for item in member.checkpoints:
            views = ", ".join(item.views)
            kind = {"ema": "EMA", "raw": "raw", "": "as stored"}[item.weights]
            name = f"{_escaped(member.name)} ({member.weight:g})"
            parts.append(f"| {number} | {name} | {_escaped(item.model)} | {item.image_size} | {views} | {kind} |")
            number += 1
    fit = "both sides squashed to it" if stored.fit == "squash" else "aspect kept, padded with black"
    parts.append(f"\nAn image becomes {stored.size_px} px ({fit}), then each model's own size.\n\n## Training data\n")
    parts += data_lines(ensemble)
    parts += ["\n## Recipes\n", *(recipe_line(recipe) for recipe in dict.fromkeys(ensemble.recipes.values()))]
    if metrics is not None:
        parts += ["\n## Evaluation\n", *metric_lines(metrics, source)]
    parts += ["\n## Calibration\n", *calibration_lines(calibration), "", USES]
    if onnx:
        size = ensemble.members[0].checkpoints[0].image_size
        parts.append(ONNX.format(px=stored.size_px, fit=fit, size=size))
    parts += ["## Licences of the weights\n", *licence_lines(ensemble)]
    return "\n".join(parts) + "\n"


def data_lines(ensemble: Ensemble) -> Iterator[str]:
    """Counts of the data behind each checkpoint, equal ones once."""
    facts = [origin.facts for origin in ensemble.origins.values()]
    known: list[Facts] = []
    for each in facts:
        if each is not None and each not in known:
            known.append(each)
    for each in known:
        held = (
            "" if each.validate_fold is None else f", of which fold {each.validate_fold} of {each.folds} was held out"
        )
        yield (
            f"- {each.images:,} images of task {_escaped(each.task)}, split {each.split}{held}. Positives of all: "
            + ", ".join(f"{_escaped(label)} {count:,.7g}" for label, count in each.positives.items())
        )
    if None in facts or not known:
        yield "- Not known for weights that came as a bare file."


def recipe_line(recipe: Recipe) -> str:
    return (
        f"- {_escaped(recipe.name)}: {recipe.epochs} epochs, {recipe.global_batch_size} images a step, "
        f"loss {recipe.loss}, trained: {recipe.train}; all fields in config.json."
    )


def metric_lines(content: bytes, source: Path | None) -> Iterator[str]:
    """AUROC of each label with its interval, from metrics.json."""
    try:
        found = json.loads(content)
        score, labels, positives = found["scores"][0], found["labels"], found["positives"]
        yield (
            f"On {found['num_images']:,} images of {found['num_patients']:,} patients; 95 % intervals from resampled "
            f"patients. Macro AUROC {_number(score['macro_auroc'])} ({_ends(score['macro_interval'])}).\n"
        )
        yield "| label | positives | AUROC | 95 % |\n|---|---|---|---|"
        for label, count, value, ends in zip(labels, positives, score["auroc"], score["auroc_interval"], strict=True):
            yield f"| {_escaped(label)} | {count:,.7g} | {_number(value)} | {_ends(ends)} |"
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise UserError(
            f"--metrics {source}: is no metrics.json of `cxrdist evaluate`; give OUT/metrics.json"
        ) from None


def calibration_lines(calibration: Calibration | None) -> Iterator[str]:
    if calibration is None:
        yield "None: the scores are not probabilities to be read as such, and there are no thresholds."
        return
    kind = "out-of-fold scores" if calibration.out_of_fold else f"split {calibration.split or '?'}"
    counts = f"{calibration.images:,} images of {calibration.patients:,} patients"
    yield f"Fitted on {kind}: {counts}; {calibration.method}, thresholds by {calibration.rule}.\n"
    yield "| label | threshold | sensitivity | specificity |\n|---|---|---|---|"
    for each in calibration.labels:
        cells = [
            f"{_number(value)} ({_ends(ends)})"
            for value, ends in (
                (each.threshold, each.threshold_interval),
                (each.sensitivity, each.sensitivity_interval),
                (each.specificity, each.specificity_interval),
            )
        ]
        yield f"| {_escaped(each.label)}{' (line of all labels)' if each.shared else ''} | {' | '.join(cells)} |"


def licence_lines(ensemble: Ensemble) -> Iterator[str]:
    """Of the weights that training started from; a model is not named whose checkpoints all began from random ones."""
    found = [item for member in ensemble.members for item in member.checkpoints]
    started = dict.fromkeys(item.model for item in found if not item.from_random)
    if not started:
        yield "- Training started from random weights: these are under the terms of who trained them, and of the data."
        return
    for name in started:
        official = architecture_of(name).official
        where = "ask the authors of the weights that training started from" if official is None else official.terms
        yield f"- {_escaped(name)}: {where}"
    yield "- What was trained on top of them is under the terms of who trained it, and of the data."


def _escaped(text: str) -> str:
    """Text that markdown shows as it is, in one cell."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>|#" else letter for letter in " ".join(text.split()))


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _ends(ends: Any) -> str:
    return "-" if ends is None or ends[0] is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
