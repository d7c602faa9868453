import pytest

from cxrdist.bench.__main__ import main
from cxrdist.bench.timing import Row, as_json, interleaved, rows_of, table

pytestmark = pytest.mark.fast


def test_variants_take_turns_and_ratios_are_medians_within_a_round():
    now = 0.0
    calls: list[str] = []

    def work(name: str, seconds: float) -> int:
        nonlocal now
        now += seconds
        calls.append(name)
        return 8

    variants = {"slow": lambda: work("slow", 4.0), "fast": lambda: work("fast", len(calls) // 2 + 1.0)}
    speeds = interleaved(variants, rounds=8, clock=lambda: now, warm_up=False)
    rounds = list(zip(calls[::2], calls[1::2], strict=True))
    assert set(rounds) == {("slow", "fast"), ("fast", "slow")}
    assert speeds == {"slow": [2.0] * 8, "fast": [8 / seconds for seconds in range(1, 9)]}
    speeds = {name: values[1:4:2] for name, values in speeds.items()}  # slow 2 and 2, fast 4 and 2
    rows = rows_of("decode", speeds, baseline="slow", limit="fast", notes={"fast": "bound"})
    assert rows[1] == Row("decode", "fast", 3.0, 1.5, 1.0, "bound")
    assert rows[0].ratio_to_limit == pytest.approx(0.75)
    assert "1.5" in table(rows)
    assert set(as_json(rows)[0]) >= {"stage", "variant", "images_per_s", "ratio_to_baseline", "ratio_to_limit"}


def test_unknown_benchmark_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["dta"])
    assert "invalid choice: 'dta'" in capsys.readouterr().err
