"""The report in a browser: labels open, tables are sorted, maps are shown large; no error, no request to any host."""

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from cxrdist import evaluate
from cxrdist.data.inspection import Splits
from cxrdist.report.dataset import write_dataset_report
from cxrdist.report.style import DARK, LIGHT
from cxrdist.shards.columns import Targets, Texts
from cxrdist.shards.index import open_index
from cxrdist.task import Task

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
HOSTILE = "<img src=x onerror=alert(1)>" + "averylongname" * 5


@pytest.fixture(scope="module")
def report(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with images and maps, of two tables and a run."""
    out = tmp_path_factory.mktemp("browser")
    world.run(out)
    rows = [{"kind": "train", "step": i + 1, "epoch": 1 + i // 5, "loss": 1 / (1 + i)} for i in range(10)]
    run = shutil.copytree(world.eva_x, out / "run")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = [str(out / "scores" / f"{name}.csv") for name in ("eva_x", "chexfound")]
    more = ("--run", str(run), "--shards", str(world.shards), "--out", str(out / "report"), "--resamples", "20")
    evaluate.main(["--scores", *scores, "--csv", str(world.truth), *more])
    return out / "report" / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        with playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox) as found:
            yield found


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """`opened(path, **context)`: the page, of which at the end no error and no request is known."""
    contexts, problems = [], []

    def requested(request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            problems.append(request.url)

    def opened(path: Path, *, width: int = 1200, **more: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **more))
        page = contexts[-1].new_page()
        page.on("request", requested)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def fits(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_a_label_leads_to_its_curves_and_images(report: Path, opened: Any) -> None:
    page = opened(report)
    link = page.locator("table.scores a").nth(4)
    panel = page.locator("details").nth(4)
    assert panel.get_attribute("open") is None
    link.click()
    page.wait_for_function("document.querySelectorAll('details')[4].open")
    assert panel.locator("summary b").inner_text() == link.inner_text()
    assert panel.locator("svg.plot").count() == 3
    assert panel.locator("svg.plot").first.is_visible()
    assert panel.locator("img").count() >= 4
    assert page.evaluate("document.querySelectorAll('details')[4].getBoundingClientRect().top") < 200
    page.locator("summary").nth(4).click()
    link.click()  # the address stays the same
    page.wait_for_function("document.querySelectorAll('details')[4].open")


def test_the_label_table_is_sorted_by_keys_and_says_how_and_its_total_stays(report: Path, opened: Any) -> None:
    page = opened(report)
    table = page.locator("table.scores").first

    def column(place: int) -> list[str]:
        return [text.split("\n")[0] for text in table.locator(f"tbody td:nth-child({place})").all_inner_texts()]

    usual = column(1)
    head = table.locator("th").nth(2)
    for order, wanted in (
        ("descending", lambda values: sorted(values, reverse=True)),
        ("ascending", sorted),
    ):
        head.locator("button").focus()
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == order
        values = [float(text) for text in column(3) if text != "-"]
        assert values == wanted(values)
        assert len(set(values)) > 3
        assert "-" not in column(3)[: len(values)], "unknown values are last"
    assert column(1) != usual
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "none"
    assert column(1) == usual
    table.locator("th").nth(0).locator("button").click()
    table.locator("th").nth(0).locator("button").click()
    assert column(1) == sorted(usual, reverse=True)
    assert table.locator("tfoot td").first.inner_text().startswith("macro")
    assert table.locator("th").nth(1).locator("button").count() == 0, "the bars have no order of their own"
    assert table.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1


@pytest.mark.parametrize("key", ["click", "Enter"])
def test_a_map_is_shown_large_and_closed_again(report: Path, opened: Any, key: str) -> None:
    page = opened(report)
    pair = page.locator("details[open] .pair").first
    pair.click() if key == "click" else pair.press(key)
    dialog = page.locator("dialog[open]")
    assert dialog.locator("img").count() == 2
    assert dialog.locator("img").nth(1).get_attribute("alt").startswith("map of ")
    assert dialog.locator("img").nth(1).bounding_box()["width"] > pair.locator("img").nth(1).bounding_box()["width"]
    page.keyboard.press("Escape")
    assert dialog.count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_every_curve_without_scrolling_sideways(report: Path, opened: Any, scheme: str) -> None:
    page = opened(report, width=400, color_scheme=scheme)
    assert fits(page)
    page.locator(".tools button").click()
    assert page.locator("details[open]").count() == page.locator("details").count() == 14
    assert fits(page)
    plot = page.locator("svg.plot").first
    assert plot.bounding_box()["width"] > 300
    palette = {"light": LIGHT, "dark": DARK}[scheme]
    colours = page.evaluate("""() => [getComputedStyle(document.querySelector("section")).backgroundColor,
                                      getComputedStyle(document.querySelector("svg.plot .line.c0")).stroke]""")
    for name, found in zip(("paper", "c0"), colours, strict=True):
        assert found == f"rgb({', '.join(str(int(palette[name][place : place + 2], 16)) for place in (1, 3, 5))})"
    texts = "Math.min(...Array.from(document.querySelectorAll('svg.plot text'), t => t.getBoundingClientRect().height))"
    assert page.evaluate(texts) >= 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_that_is_cut_has_a_shade_at_the_edge_until_it_is_scrolled_to_its_end(
    report: Path, opened: Any, scheme: str
) -> None:
    paper = ImageColor.getrgb({"light": LIGHT, "dark": DARK}[scheme]["paper"])

    def shaded(box: Any) -> bool:
        """Whether most of the last pixels of its lines are not of the paper's colour."""
        pixels = np.asarray(Image.open(io.BytesIO(box.screenshot())).convert("RGB"))[:, -2]
        return bool((pixels != paper).any(axis=1).mean() > 0.5)

    for width in (400, 1200):
        box = opened(report, width=width, color_scheme=scheme).locator(".scroll:has(table.scores)").first
        assert shaded(box) == (width == 400)
        box.evaluate("box => { box.scrollLeft = 10000; }")
        assert not shaded(box)


def test_no_text_of_a_picture_covers_a_curve(report: Path, opened: Any) -> None:
    page = opened(report)
    page.locator(".tools button").click()
    covered = page.evaluate("""() => Array.from(document.querySelectorAll("svg.plot")).filter(svg => {
        const boxes = Array.from(svg.querySelectorAll("text"), text => text.getBoundingClientRect());
        return Array.from(svg.querySelectorAll(".line, .dot, .ring"), mark => mark.getBoundingClientRect()).some(mark =>
          boxes.some(box => box.left < mark.right && mark.left < box.right && box.top < mark.bottom
                            && mark.top < box.bottom - 3)); }).length""")
    assert page.locator("svg.plot .line").count() > 50
    assert covered == 0


def test_paper_shows_every_label(report: Path, opened: Any) -> None:
    page = opened(report, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("nav").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 39, 51)", "dark ink, whatever the screen"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("svg.plot").last.is_visible()
    assert page.locator("details[open]").count() == 14
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 1


def test_without_script_every_picture_and_table_is_there(report: Path, opened: Any) -> None:
    page = opened(report, java_script_enabled=False)
    assert page.locator("th button").count() == 0
    assert page.locator("table.scores tbody tr").count() == 14
    page.locator("summary").nth(3).click()
    assert page.locator("details").nth(3).locator("svg.plot").first.is_visible()
    assert page.locator("details").nth(3).locator("img").first.is_visible()


@pytest.mark.parametrize("width", [400, 1200])
def test_names_with_markup_and_without_end_are_text_within_the_page(
    tmp_path: Path, uneven_shards: Path, opened: Any, width: int
) -> None:
    rng = np.random.default_rng(0)
    index = open_index(uneven_shards, "train")
    names = Texts([f"{row} {HOSTILE}" for row in range(len(index))])
    task = Task(name="own", labels=(HOSTILE, "b"))
    targets = (rng.random((len(index), 2)) < 0.4).astype(np.float32)
    meta = dataclasses.replace(index.meta, task=task)
    index = dataclasses.replace(index, image_names=names, task=task, meta=meta, targets=Targets(targets.T))
    write_dataset_report(tmp_path / "set.html", Splits([index]), ())
    page = opened(tmp_path / "set.html", width=width, color_scheme="dark")
    assert fits(page)
    assert page.locator("section").first.evaluate("one => getComputedStyle(one).backgroundColor") == "rgb(22, 29, 39)"
    page.locator("table.sortable th button").first.click()
    write_hostile_report(tmp_path, task, targets)
    page = opened(tmp_path / "report" / "report.html", width=width)
    assert fits(page)
    assert page.locator("summary b").first.inner_text() == HOSTILE
    assert page.locator("img").count() == 0


def write_hostile_report(folder: Path, task: Task, targets: np.ndarray) -> None:
    import pandas as pd

    from cxrdist.scoring.tables import ScoreTable, TableMeta, write_table

    names = np.array([f"{row} {HOSTILE}" for row in range(len(targets))], dtype=object)
    probs = np.random.default_rng(1).random(targets.shape, dtype=np.float32)
    write_table(folder / "m.csv", ScoreTable(names, probs, TableMeta(member=HOSTILE, task=task)))
    frame = pd.DataFrame({task.columns.image: names})
    for place, label in enumerate(task.labels):
        frame[label] = targets[:, place].astype(int)
    frame.to_csv(folder / "labels.csv", index=False)
    more = ("--out", str(folder / "report"), "--resamples", "5", "--title", HOSTILE)
    evaluate.main(["--scores", str(folder / "m.csv"), "--csv", str(folder / "labels.csv"), *more])
