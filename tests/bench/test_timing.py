import pytest

from cxrdist.bench.__main__ import main
from cxrdist.bench.timing import Row, as_json, interleaved, rows_of, table

pytestmark = pytest.mark.fast


def test_variants_take_turns_and_ratios_are_medians_within_a_round():
    ticks = iter([0.0, 1.0, 0.0, 2.0] * 2)
    calls: list[str] = []
    variants = {"slow": lambda: calls.append("slow") or 4, "fast": lambda: calls.append("fast") or 8}
    speeds = interleaved(variants, rounds=2, clock=lambda: next(ticks), warm_up=False)
    assert calls == ["slow", "fast", "fast", "slow"]
    assert speeds == {"slow": [4.0, 2.0], "fast": [4.0, 8.0]}
    rows = rows_of("decode", speeds, baseline="slow", limit="fast", notes={"fast": "bound"})
    assert rows[1] == Row("decode", "fast", 6.0, 2.5, 1.0, "bound")
    assert rows[0].ratio_to_limit == pytest.approx(0.625)
    assert "2.5" in table(rows)
    assert set(as_json(rows)[0]) >= {"stage", "variant", "images_per_s", "ratio_to_baseline", "ratio_to_limit"}


def test_unknown_benchmark_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["dta"])
    assert "invalid choice: 'dta'" in capsys.readouterr().err
