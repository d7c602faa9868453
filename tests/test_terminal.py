"""What others wrote cannot steer the terminal; columns stand under each other in any script."""

import pytest

from cxrdist.terminal import BARS_ASCII, aligned, curve, fitted, printable, width

pytestmark = pytest.mark.fast


def test_nothing_that_steers_a_terminal_is_left() -> None:
    steering = "\x1b[2J\x9b31m\r\n\t\x07\x7f\u202e\u2066\u200b\ufeff\u2028\udc80\U000e0041"
    assert set(printable(steering)) <= set("?[2J31m")
    assert printable("Lungenödem 肺水肿 🫁") == "Lungenödem 肺水肿 🫁"


@pytest.mark.parametrize("text", ["short", "肺水肿和胸腔积液", "e\u0301" * 9, "a name that is longer than that"])
@pytest.mark.parametrize("columns", [1, 6, 7, 20])
def test_a_text_takes_the_columns_that_it_is_given(text: str, columns: int) -> None:
    assert width(fitted(text, columns)) == columns


def test_a_table_stands_in_columns() -> None:
    lines = aligned(["label", "AUROC"], [["肺水肿", "0.9"], ["a\x1b[31m", "0.12345"]])
    assert lines == ["label     AUROC", "肺水肿      0.9", "a?[31m  0.12345"]


def test_a_curve_shows_means_between_the_smallest_and_the_largest() -> None:
    assert curve([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert curve([0, 0, 7, 7], 2) == "▁█"
    assert curve([5.0, 5.0], 10) == "▁▁"
    assert curve([], 10) == curve([1.0], 0) == curve([1.0], -3) == ""
    assert set(curve([1, 2, 3], 3, ascii_only=True)) <= set(BARS_ASCII)
    assert len(curve(list(range(1000)), 17)) == 17
