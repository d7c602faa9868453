"""How often torch.compile had to compile: a batch of another size must not do so again and again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch._dynamo.utils import counters

LAUNCH_BOUND_BATCH = 8  # images a GPU: EVA-X-B's eager launches take 22.6 ms there, about as long as an H100's work


@contextmanager
def graphs_told(say: Callable[[str], None]) -> Iterator[None]:
    """At the end, say how many graphs were captured inside, of all models and batch sizes; nothing after an error.

    A model has one graph for its first batch size, one for every other, and one for a single image; training and
    validation each have their own, and DDP may split one.
    """
    before = _graphs_and_breaks()
    yield
    graphs, breaks = (now - then for now, then in zip(_graphs_and_breaks(), before, strict=True))
    say(f"torch.compile: {graphs} graphs, {breaks} graph breaks")


def _graphs_and_breaks() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
