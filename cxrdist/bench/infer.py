"""Inference as planned here against the published way, on small models with the published ratio of costs.

The published way is re-created from the published solution: every pass decodes all images again, each of the six views
of EVA-X is a pass (two of them are equal), and the frozen backbone of CheXFound runs once per head: 12 + 2 passes. Both
ways use the same weights, images, batches, precision and loader, and are counted where they run: passes at the models'
patch embedding, decodes at the loader. The limit is what the counts allow: the published way's measured time per pass,
times 10 + 1. A CheXFound pass cost 4 EVA-X passes in the published run; the measured ratio is printed.
"""

import argparse
import contextlib
import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from cxrdist.augment.views import make_views
from cxrdist.bench.timing import Row
from cxrdist.data.loader import Loader
from cxrdist.data.order import eval_batches
from cxrdist.inference.members import Ensemble, checkpoint_of
from cxrdist.inference.passes import Member, Pass, columns_of, num_naive_passes, plan_passes
from cxrdist.inference.score import score
from cxrdist.models import architecture_of
from cxrdist.recipes import PUBLISHED_VIEWS, recipe_for
from cxrdist.scoring.tables import Probs, average, sigmoid
from cxrdist.shards.convert import Pixels
from cxrdist.shards.index import ShardIndex, open_index
from cxrdist.shards.writer import Source, SplitJob, write_split
from cxrdist.task import TASKS

PUBLISHED_MINUTES = {"eva_x": 20.4, "chexfound": 81.0}  # one pass over 47,927 images on two T4s
EVA_X = {"embed_dim": 192, "depth": 6, "num_heads": 3}
CHEXFOUND = {"embed_dim": 384, "depth": 7, "num_heads": 6, "init_values": 1.0, "decoder_dim": 64}
EVA_X_PX, CHEXFOUND_PX = 224, 256
TASK = TASKS["b"]


@dataclasses.dataclass
class Counts:
    """What one way did: seconds by model, backbone passes and decodes, both per image of the set."""

    seconds: dict[str, float]
    passes: float = 0.0
    decodes: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-images", type=int, default=16, metavar="N", help="synthetic images (default 16)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images of a batch (default 8)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each way (default 5)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")


def run(args: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(args.device)
    ensemble = _members(device)
    passes = plan_passes(ensemble.members)
    with tempfile.TemporaryDirectory(prefix="cxrdist-bench-") as folder, torch.no_grad():
        index = _write_shards(Path(folder), args.num_images)
        batches = list(eval_batches(np.arange(len(index), dtype=np.int64), args.batch_size, 0, 1))
        ways = {"published": lambda: _published(index, batches, ensemble, device)}
        ways["planned"] = lambda: _planned(index, batches, ensemble, passes, device)
        tables: dict[str, Probs] = {}
        rounds: list[dict[str, tuple[float, Counts]]] = []
        for number in range(args.rounds + 1):
            measured = {}
            for name in sorted(ways, reverse=number % 2 == 0):
                start = time.perf_counter()
                tables[name], counts = ways[name]()
                measured[name] = (time.perf_counter() - start, counts)
            rounds.append(measured)
    return _rows(rounds[1:], tables, ensemble, len(index))


def _rows(
    rounds: Sequence[dict[str, tuple[float, Counts]]], tables: dict[str, Probs], ensemble: Ensemble, num_images: int
) -> list[Row]:
    gains, ceilings, ratios = [], [], []
    for measured in rounds:
        seconds, counts = measured["published"]
        eva_x, chexfound = counts.seconds["eva_x"] / 12, counts.seconds["chexfound"] / 2
        gains.append(seconds / measured["planned"][0])
        ceilings.append(seconds / (10 * eva_x + chexfound))
        ratios.append(chexfound / eva_x)
    difference = float(np.abs(tables["published"] - tables["planned"]).max())
    gain, ceiling = statistics.median(gains), statistics.median(ceilings)
    share = statistics.median(one / other for one, other in zip(gains, ceilings, strict=True))
    published, planned = (rounds[-1][name][1] for name in ("published", "planned"))
    naive = PUBLISHED_MINUTES["eva_x"] * 12 + PUBLISHED_MINUTES["chexfound"] * 2
    best = PUBLISHED_MINUTES["eva_x"] * 10 + PUBLISHED_MINUTES["chexfound"]
    speeds = {
        name: num_images / statistics.median(item[name][0] for item in rounds) for name in ("published", "planned")
    }
    notes = {
        "published": f"{published.passes:g} passes (12 + 2), {published.decodes:g} decodes an image",
        "planned": f"{planned.passes:g} passes (10 + 1), {planned.decodes:g} decode an image; tables differ by "
        f"{difference:.1e} (float32)",
    }
    assert num_naive_passes(ensemble.members) == published.passes
    return [
        Row("inference", "published", speeds["published"], 1.0, None, notes["published"]),
        Row("inference", "planned", speeds["planned"], gain, share, notes["planned"]),
        Row(
            "inference", "limit", None, ceiling, None, f"a CheXFound pass costs {statistics.median(ratios):.2f} EVA-X's"
        ),
        Row(
            "inference", "limit, published costs", None, naive / best, None, "costs 20.4 and 81 min a pass: ratio 3.97"
        ),
    ]


def _published(
    index: ShardIndex, batches: Sequence[NDArray[np.int64]], ensemble: Ensemble, device: torch.device
) -> tuple[Probs, Counts]:
    """One pass after the other, each from the JPEGs on; its own copy of every model, backbones included."""
    counts = Counts({"eva_x": 0.0, "chexfound": 0.0})
    tables = []
    for member in ensemble.members:
        for item in member.checkpoints:
            model = ensemble.models[item.sha256]
            views = PUBLISHED_VIEWS if member.name == "eva_x" else ("plain",)
            probs = []
            for view in views:
                start = time.perf_counter()
                with _counted([model], counts, len(index)), Loader(index, device) as loader:
                    logits = []
                    for batch in loader.batches(batches):
                        counts.decodes += len(batch.rows) / len(index)
                        _, inputs = next(make_views(batch.images, (view,), item.image_size))
                        logits.append(model(inputs))
                    probs.append(sigmoid(torch.cat(logits).float().cpu().numpy()))
                counts.seconds[member.name] += time.perf_counter() - start
            tables.append(average(probs))
    return average(tables), counts


def _planned(
    index: ShardIndex,
    batches: Sequence[NDArray[np.int64]],
    ensemble: Ensemble,
    passes: Sequence[Pass],
    device: torch.device,
) -> tuple[Probs, Counts]:
    """As `cxrdist.infer` does it."""
    counts = Counts({})
    with _counted(ensemble.models.values(), counts, len(index)), Loader(index, device) as loader:
        columns = []
        for _, rows, logits in score(loader, batches, passes, ensemble.models, "fp32"):
            counts.decodes += len(rows) / len(index)
            columns.append(logits)
        table = torch.cat(columns, dim=1).cpu().numpy()
    place = {name: number for number, name in enumerate(columns_of(passes))}
    members = []
    for member in ensemble.members:
        checkpoints = []
        for item in member.checkpoints:
            views = [sigmoid(table[place[item.sha256, item.image_size, view]]) for view in item.views]
            checkpoints.append(average(views, list(item.views.values())))
        members.append(average(checkpoints))
    return average(members), counts


@contextlib.contextmanager
def _counted(models: Any, counts: Counts, num_images: int) -> Iterator[None]:
    """Count images that pass a backbone's patch embedding; a module that several models share counts once."""

    def count(_: nn.Module, inputs: Any) -> None:
        counts.passes += len(inputs[0]) / num_images

    backbones = [getattr(model, "backbone", model) for model in models]
    embeddings = {id(backbone): backbone.patch_embed for backbone in backbones}
    handles = [embedding.register_forward_pre_hook(count) for embedding in embeddings.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _members(device: torch.device) -> Ensemble:
    """The published four checkpoints in small: two epochs of EVA-X, two heads on one frozen backbone."""
    ensemble = Ensemble()
    settings: tuple[tuple[str, str, int, dict[str, Any], tuple[str, ...]], ...] = (
        ("eva_x", "eva_x_tiny", EVA_X_PX, EVA_X, PUBLISHED_VIEWS),
        ("chexfound", "chexfound", CHEXFOUND_PX, CHEXFOUND, ("plain",)),
    )
    for name, kind, image_size, sizes, views in settings:
        recipe = dataclasses.replace(recipe_for(kind, TASK.name), image_size=image_size)
        architecture = architecture_of(recipe.model)
        first = architecture.build(image_size, TASK.num_labels, **sizes).eval()
        second = copy.deepcopy(first)
        trained = set(architecture.trainable_names(second))
        for parameter in (values for own, values in second.named_parameters() if own in trained):
            parameter.data += 0.02 * torch.randn_like(parameter)
        checkpoints = []
        for epoch, model in ((5, first), (6, second)):
            item = checkpoint_of(f"{name}@{epoch}", recipe, model, views)
            ensemble.models[item.sha256] = model.to(device)
            checkpoints.append(item)
        ensemble.members.append(Member(name, tuple(checkpoints)))
    return ensemble


def _write_shards(folder: Path, num_images: int) -> ShardIndex:
    rng = np.random.default_rng(0)
    sources = []
    for number in range(num_images):
        path = folder / "images" / f"{number:08d}_001_001.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8))
        coarse.resize((600, 600), Image.Resampling.BICUBIC).save(path, quality=95)
        sources.append(Source(number, path.name, str(path), path.stat().st_size, "", f"{number:08d}", "001"))
    write_split(SplitJob(folder / "div_b", TASK, "test", sources, Pixels(), 1000, {}))
    return open_index(folder / "div_b", "test", TASK)
