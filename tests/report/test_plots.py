"""Pictures of a page: no visible point is lost, every colour is seen by everyone, and no text becomes markup."""

import base64
import io
import itertools
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from cxrdist.report import curves, plots
from cxrdist.report.style import DARK, DASHES, LIGHT, NUM_COLOURS, STYLE
from cxrdist.scoring import metrics

pytestmark = pytest.mark.fast
PALETTES = {"light": LIGHT, "dark": DARK}
# What each kind of colour vision makes of linear RGB. Source: Machado, Oliveira and Fernandes 2009, severity 1.
VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour):
    levels = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """Source: WCAG 2.1."""
    dark, light = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(0, 1)
    f = np.array([np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz / [0.9505, 1, 1.089]])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("mode", PALETTES)
def test_lines_and_texts_stand_out_from_their_ground(mode):
    palette = PALETTES[mode]
    for name in (*(f"c{place}" for place in range(NUM_COLOURS)), "mark"):
        assert contrast(palette[name], palette["paper"]) >= 3, name
    texts = [(ink, ground) for ink in ("ink", "soft", "accent") for ground in ("paper", "page")]
    texts += [("top-ink", "top"), ("top-soft", "top"), ("ink", "warn"), ("good", "paper")]
    for ink, ground in texts:
        assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)
    heat, paper = (np.array(list(map(int, palette["heat"].split(",")))), palette["paper"])
    half = (heat + [int(paper[place : place + 2], 16) for place in (1, 3, 5)]) // 2  # the fullest cell with a number
    assert contrast(palette["ink"], "#" + "".join(f"{level:02x}" for level in half)) >= 4.5


@pytest.mark.parametrize("mode", PALETTES)
def test_no_two_curves_look_alike_to_anyone(mode):
    colours = [linear(PALETTES[mode][f"c{place}"]) for place in range(NUM_COLOURS)]
    for name, matrix in VISION.items():
        for one, other in itertools.combinations(colours, 2):
            assert np.linalg.norm(lab(np.array(matrix) @ one) - lab(np.array(matrix) @ other)) > 20, name
    assert len(set(DASHES)) == NUM_COLOURS


def test_a_browser_without_variables_has_the_light_colours():
    assert set(LIGHT) == set(DARK)
    used = re.findall(r"([\w-]+): ([^:;{}]*var\(--[^;{}]*);", STYLE)
    assert len(used) > 40
    for name, value in used:
        assert (
            f"{name}: {re.sub(r'var[(]--([^)]*)[)]', lambda found: LIGHT[found[1]], value)}; {name}: {value};" in STYLE
        )


def area(x, y):
    return float(np.trapezoid(y, x))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("curve", [metrics.roc_curve, metrics.precision_recall_curve])
def test_curves_of_100_000_images_are_a_few_thousand_points_of_the_same_area(curve, share):
    rng = np.random.default_rng(0)
    targets = (rng.random(100_000) < share).astype(float)
    x, y = curve(targets, targets + rng.normal(size=len(targets)))
    some_x, some_y = plots.thinned(x, y)
    assert abs(area(x, y) - area(some_x, some_y)) < 1e-3
    assert len(some_x) < 4000
    assert (some_x[[0, -1]] == x[[0, -1]]).all()
    assert (some_y[[0, -1]] == y[[0, -1]]).all()
    drawn = curves.roc("label", targets, [("a", targets), ("b", 1 - targets)], [1.0, 0.0], (math.nan, math.nan))
    assert len(drawn) < 20_000


def test_no_point_lies_far_from_the_thinned_line():
    rng = np.random.default_rng(1)
    x, y = np.linspace(0, 1, 20_000), rng.random(20_000).cumsum() / 20_000
    some_x, some_y = plots.thinned(x, y)
    assert len(some_x) < 1000
    assert np.abs(np.interp(x, some_x, some_y) - y).max() < 2 * math.sqrt(2) * plots.TOLERANCE


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_points_are_kept(count):
    x = np.linspace(0, 1, count)
    assert np.array_equal(plots.thinned(x, x**2)[0], x)


@pytest.mark.parametrize(
    "values", [[], [0.0], [0.1, 0.7], [-1e15, 1e15], [5e-324, 0.0], [1.0, math.inf, math.nan], [1e15, 1e15 + 0.125]]
)
def test_an_axis_spans_its_values_and_has_a_few_round_ticks(values):
    axis = plots.axis_of("x", values)
    low, high = axis.ends
    assert low < high
    assert all(low <= value <= high for value in values if math.isfinite(value))
    assert 2 <= len(axis.ticks) <= 7
    assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in axis.ticks)
    assert "nan" not in plots.plot(axis, axis, [plots.Series(values, values, 0)], "", "")


def test_counts_have_ticks_up_to_the_highest():
    assert plots.count_axis("n", 0).ends[1] >= 1
    for most in (1, 9, 10, 11, 5_000, 10**9):
        axis = plots.count_axis("n", most)
        assert axis.ends[1] >= math.log10(most)
        assert 2 <= len(axis.ticks) <= 6


def test_a_picture_is_one_svg_in_which_a_name_is_text():
    hostile = "<script>alert(\"x\")</script> & 'quotes'"
    targets, probs = np.array([0.0, 1, 0, 1]), np.array([0.1, 0.4, 0.35, 0.8], np.float32)
    columns = [(hostile, probs)]
    for text in (
        curves.roc(hostile, targets, columns, [0.75], (0.5, 0.5)),
        curves.precision_recall(hostile, targets, columns, [0.8], (0.5, 0.5)),
        curves.calibration(hostile, targets, columns),
        curves.histogram(hostile, columns),
        plots.legend([hostile]),
    ):
        root = ElementTree.fromstring(text)
        assert not root.findall(".//script")
        values = [value for node in root.iter() for value in node.attrib.values()]
        assert any(hostile in text for text in [*root.itertext(), *values])


def test_a_label_without_a_score_has_its_place_without_a_curve():
    targets = np.array([0.0, 0.0, np.nan])
    text = curves.roc("label", targets, [("a", np.zeros(3, np.float32))], [math.nan], (math.nan, math.nan))
    assert 'class="line c0" d="M0 5H28"' in text, "its key"
    assert text.count('class="line c0"') == 1
    assert curves.calibration("label", np.full(3, np.nan), [("a", np.zeros(3, np.float32))])


def test_a_browser_without_svg_finds_the_picture_as_png():
    found = []

    class Images(HTMLParser):
        def handle_startendtag(self, tag, attributes):
            if tag == "image":
                found.append(dict(attributes))

    probs = np.array([0.1, 0.4, 0.35, 0.8], np.float32)
    Images().feed(curves.roc("<label>", np.array([0.0, 1, 0, 1]), [("a", probs)], [0.75], (math.nan, math.nan)))
    (image,) = found
    assert image["alt"] == "ROC curves of <label>"
    picture = Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))))
    assert picture.size == (plots.WIDTH, plots.HEIGHT)
    counts = picture.convert("RGB").getcolors(1000)
    inks = {colour for count, colour in counts if count > 50}
    assert tuple(int(LIGHT["c0"][place : place + 2], 16) for place in (1, 3, 5)) in inks


def test_intervals_lie_where_the_axis_says():
    low = plots.forest_low([(0.43, 0.6), (math.nan, math.nan), (0.8, 0.9)])
    assert low == 0.4
    assert plots.forest_low([(math.nan, math.nan)]) == 0.5
    ticks = {float(text): float(x) for x, text in re.findall(r'x="([\d.]+)%"[^>]*>([\d.]+)<', plots.forest_axis(low))}
    assert set(ticks) == {0.4, 0.6, 0.8, 1.0}
    row = plots.forest_row([0.6, math.nan], [(0.4, 0.8), (math.nan, math.nan)], low)
    assert row.count("<circle") == 1
    assert f'cx="{ticks[0.6]:.2f}%"' in row
    assert f'class="whole c0" stroke-width="2.5" x1="{ticks[0.4]:.2f}%" x2="{ticks[0.8]:.2f}%"' in row


def test_every_point_has_its_dot_also_where_three_lie_on_a_line():
    axis = plots.unit_axis("AUROC")
    values = [0.1, 0.2, 0.3, 0.4]
    assert plots.plot(axis, axis, [plots.Series(values, values, 0, ("line", "dot"))], "", "").count("<circle") == 4
