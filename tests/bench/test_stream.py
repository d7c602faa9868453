import argparse
import re

import pytest

from cxrdist.bench import order, stream

pytestmark = pytest.mark.fast


def parsed(module, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


def test_the_share_of_waiting_is_printed_for_each_link_and_the_set_is_fetched_once():
    words = ["--links", "5", "1000", "--num-shards", "8", "--per-shard", "4", "--window", "2", "--batch-size", "4"]
    local, slow, fast = stream.run(parsed(stream, *words, "--images-per-s", "40"))
    assert local.variant == "local disk"
    for row in (slow, fast):
        assert "fetched 1.000 of the set, cache 0.5" in row.note
        assert re.match(r"waiting [\d.]+% \([\d.]+% for shards\), start [\d.]+ s; ", row.note)


def test_windows_are_less_random_the_smaller_they_are():
    words = ["--shards", "16", "--per-shard", "50", "--windows", "16", "4", "1"]
    rows = [row for row in order.run(parsed(order, *words)) if row.stage == "neighbours"]
    apart = [float(re.search(r"apart|end up ([\d.]+)", row.note)[1]) for row in rows]
    assert apart[0] == apart[1] > apart[2] > apart[3]
    assert apart[0] == pytest.approx(1 / 3, abs=0.02)
