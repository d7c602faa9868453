"""Timing that holds on a shared machine: variants take turns, and medians of ratios within a turn are reported."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FAILED = "failed"  # stage of a row that says what could not be done: the command then ends with 1


@dataclass(frozen=True)
class Row:
    """One line of a benchmark.

    ratio_to_baseline: speed against what people use today (above 1 is faster). ratio_to_limit: against what the
    hardware could do (at most about 1). None where a row has no such partner.
    """

    stage: str
    variant: str
    images_per_s: float | None
    ratio_to_baseline: float | None = None
    ratio_to_limit: float | None = None
    note: str = ""


def interleaved(
    variants: Mapping[str, Callable[[], int]],
    *,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Images per second of each variant in each round, in round order.

    Every round runs each variant once, in a shuffled order: load from elsewhere, and the caches as the variant before
    left them, hit all alike.
    A variant does its work when called and returns the number of images. `clock=time.process_time` counts the CPU
    seconds of all threads of this process instead: images per core-second, steady also while others use the machine.
    """
    names = list(variants)
    if warm_up:
        for name in names:
            variants[name]()
    speeds: dict[str, list[float]] = {name: [] for name in names}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(names, len(names)):
            start = clock()
            num_images = variants[name]()
            speeds[name].append(num_images / (clock() - start))
    return speeds


def median_ratio(speeds: Sequence[float], reference: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(speeds, reference, strict=True))


def rows_of(
    stage: str,
    speeds: Mapping[str, Sequence[float]],
    *,
    baseline: str | None = None,
    limit: str | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """One Row per variant of `interleaved`'s result, against the variants named `baseline` and `limit`."""
    return [
        Row(
            stage,
            name,
            statistics.median(values),
            median_ratio(values, speeds[baseline]) if baseline else None,
            median_ratio(values, speeds[limit]) if limit else None,
            (notes or {}).get(name, ""),
        )
        for name, values in speeds.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    head = ("stage", "variant", "images/s", "x baseline", "x limit", "note")
    lines = [head] + [
        (
            row.stage,
            row.variant,
            *(_number(value) for value in (row.images_per_s, row.ratio_to_baseline, row.ratio_to_limit)),
            row.note,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    numeric = (2, 3, 4)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as the list that `--json` writes."""
    return [asdict(row) for row in rows]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
