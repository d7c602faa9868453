"""`cxrdist app` in a real browser: what the page shows is what predict says, and nothing leaves this machine."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cxrdist
from cxrdist import app, export
from cxrdist.cli import run_entry
from cxrdist.inference.members import load_ensemble, parse_member
from cxrdist.inference.predictor import scores_of
from cxrdist.recipes import recipe_for
from cxrdist.scoring import operating
from cxrdist.task import TASKS
from tests.inference.test_predictor import write_dicom

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]


def in_a_browser(test: Any) -> Any:
    """Marks a test: Gradio and the browser alone take over ten seconds to start."""
    return pytest.mark.slow(pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")(test))


TAGS = "<img src=x onerror=\"document.title='run'\"> ${value} {{value}}"
LABELS = ("Lung Opacity", TAGS, "Pleural Effusion & more", "Never seen")
CONTRAST = """
(selector) => [...document.querySelectorAll(selector)].map((element) => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((level) => level / 255)
    .map((level) => level <= 0.03928 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4)
    .reduce((sum, level, place) => sum + level * [0.2126, 0.7152, 0.0722][place], 0);
  let behind = element;
  while (behind && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const both = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)].sort();
  return [element.className, (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05)];
})
"""


@pytest.fixture(scope="module")
def bundle(infer_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two members of four labels, one of which has no threshold; another holds what HTML and Gradio would run."""
    folder = tmp_path_factory.mktemp("model")
    task = dataclasses.replace(TASKS["b"], name="tags", labels=LABELS)
    small = {"eva_x": ("eva_x_tiny", 64, infer_world.EVA_X), "chexfound": ("chexfound", 80, infer_world.CHEXFOUND)}
    members = []
    for seed, (name, (recipe, size, widths)) in enumerate(small.items()):
        made = dataclasses.replace(recipe_for(recipe, "b"), image_size=size, model_kwargs=tuple(widths.items()))
        members.append(f"{name}={infer_world.make_run(folder / name, made, seed, task)}@1,2")
    rng = np.random.default_rng(0)
    probs = rng.random((60, len(LABELS))).astype(np.float32)
    targets = (rng.random(probs.shape) < probs).astype(float)
    targets[:, -1] = 0
    own = scores_of(load_ensemble([*map(parse_member, members)], task), "prob")
    fitted = operating.fit(probs, targets, np.arange(60), task=task, scores_of=own, num_resamples=20)
    (folder / "calibration.json").write_text(fitted.to_json())
    export.main([*members, "--out", str(folder / "bundle"), "--calibration", str(folder / "calibration.json")])
    return folder / "bundle"


@dataclasses.dataclass
class Server:
    url: str
    process: "subprocess.Popen[str]"
    temporary: Path  # where the process may leave files
    outside: socket.socket  # what every request to another host would come to

    def files(self) -> list[Path]:
        return [path for path in self.temporary.rglob("*") if path.is_file()]


@contextlib.contextmanager
def serving(bundle: Path, temporary: Path) -> Iterator[Server]:
    temporary.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as outside:
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        proxies = {f"{kind}_PROXY": proxy for kind in ("HTTP", "HTTPS", "ALL")} | {"NO_PROXY": "127.0.0.1,localhost"}
        env = (
            os.environ
            | proxies
            | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "True"}
        )
        command = [sys.executable, "-m", "cxrdist.app", "--bundle", str(bundle), "--port", "0", "--precision", "fp32"]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            found = next(filter(None, (re.match(r"page: (\S+) ", line) for line in process.stdout)), None)
            assert found is not None, process.communicate()
            yield Server(found[1], process, temporary, outside)
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(bundle, tmp_path_factory.mktemp("server") / "tmp") as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextlib.contextmanager
def opened(browser: Any, server: Server, width: int = 1200, scheme: str = "light") -> Iterator[Any]:
    """The page, which must not say an error on its console, nor ask another host for anything."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, wrong = context.new_page(), list[str]()
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    own = (f"{server.url}/", "data:", "blob:")
    page.on("request", lambda request: request.url.startswith(own) or wrong.append(request.url))
    page.on("filechooser", lambda _: None)  # Playwright sees them only some time after it was first asked for them
    page.goto(server.url)
    page.wait_for_selector(".cx-empty")
    yield page
    assert page.title() == "cxrdist"
    assert wrong == []
    context.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    with opened(browser, server) as found:
        yield found


@pytest.fixture(scope="module")
def xrays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same levels in the kinds of file that people have."""
    folder = tmp_path_factory.mktemp("xrays")
    coarse = np.random.default_rng(3).integers(0, 256, (12, 12), dtype=np.uint8)
    levels = np.asarray(Image.fromarray(coarse).resize((150, 190)))
    for name in ("chest.png", "chest.jpg", "chest.tiff"):
        Image.fromarray(levels).save(folder / name)
    Image.fromarray(levels.astype(np.uint16) * 200 + 7).save(folder / "deep.png")
    write_dicom(folder / "IM0001", levels)
    return {path.name: path for path in folder.iterdir()}


def drop(page: Any, file: Any, name: str) -> None:
    page.set_input_files("input[type=file]", file)
    page.get_by_role("heading", name=f"Findings in {name}", exact=True).wait_for()


def numbers(rows: Any, attribute: str = "data-probability") -> dict[str, float]:
    return {row.get_attribute("data-label"): float(row.get_attribute(attribute)) for row in rows.all()}


def choose(page: Any, label: str) -> None:
    page.locator(".cx-row").filter(has=page.get_by_text(label, exact=True)).click()
    page.get_by_role("heading", name=label, exact=True).wait_for()


def pictures(page: Any, count: int) -> list[str]:
    page.wait_for_function(f"document.querySelectorAll('#cx-maps img').length === {count}")
    found = page.locator("#cx-maps img")
    assert all(found.evaluate_all("(all) => all.map((each) => each.complete && each.naturalWidth === 600)"))
    return found.evaluate_all("(all) => all.map((each) => each.src)")


@in_a_browser
@pytest.mark.parametrize("name", ["chest.png", "chest.jpg", "chest.tiff", "deep.png", "IM0001"])
def test_the_page_says_what_predict_says(name, page, server, bundle, xrays) -> None:
    drop(page, xrays[name], name)
    found = cxrdist.load(bundle, precision="fp32").predict(xrays[name])
    rows = page.locator(".cx-row")
    raw, shown = numbers(rows), numbers(rows, "data-shown")
    assert raw == pytest.approx(dict(zip(LABELS, found.probabilities[0].tolist(), strict=True)), abs=1e-6)
    assert shown == pytest.approx(dict(zip(LABELS, found.calibrated[0].tolist(), strict=True)), abs=1e-6)
    positive = rows.filter(has=page.locator(".cx-positive")).evaluate_all(
        "(all) => all.map((each) => each.dataset.label)"
    )
    assert set(positive) == {label for label, decided in zip(LABELS, found.decisions[0], strict=True) if decided == 1}
    assert [*map("{:.3f}".format, shown.values())] == page.locator(".cx-row .cx-number").all_inner_texts()
    assert server.files() == []


@in_a_browser
def test_bars_have_thresholds_with_their_intervals(page, bundle, xrays) -> None:
    drop(page, xrays["chest.png"], "chest.png")
    fitted = cxrdist.load(bundle).calibration
    for each in fitted.labels[:3]:
        row = page.locator(".cx-row").filter(has=page.get_by_text(each.label, exact=True))
        low, high = each.sensitivity_interval
        assert f"sensitivity {each.sensitivity:.2f} ({low:.2f} to {high:.2f})" in row.inner_text()
        assert f"threshold {each.threshold:.2f} (" in row.inner_text()
        bar, tick = row.locator(".cx-bar").bounding_box(), row.locator(".cx-tick").bounding_box()
        place = (tick["x"] + tick["width"] / 2 - bar["x"]) / bar["width"]
        assert place == pytest.approx(each.threshold, abs=0.01)
        band = row.locator(".cx-band").bounding_box()
        assert (band["x"] - bar["x"]) / bar["width"] == pytest.approx(each.threshold_interval[0], abs=0.01)
    without = page.locator(".cx-row").filter(has=page.get_by_text("Never seen"))
    assert "no threshold" in without.inner_text()
    assert without.locator(".cx-tick").count() == 0


@in_a_browser
def test_a_chosen_finding_shows_its_own_map(page, xrays) -> None:
    drop(page, xrays["chest.png"], "chest.png")
    (plain,) = pictures(page, 1)
    choose(page, TAGS)
    first = pictures(page, 2)
    choose(page, "Lung Opacity")
    second = pictures(page, 2)
    assert first[0] == second[0] == plain
    assert len({plain, first[1], second[1]}) == 3
    assert page.locator('.cx-row[aria-pressed="true"]').get_attribute("data-label") == "Lung Opacity"


@in_a_browser
def test_two_members_are_compared_with_their_bars_and_maps(page, bundle, xrays) -> None:
    drop(page, xrays["chest.png"], "chest.png")
    choose(page, "Lung Opacity")
    of_eva_x = pictures(page, 2)[1]
    page.get_by_role("group", name="Compare with").get_by_label("chexfound").check()
    plain, one, two = pictures(page, 3)
    assert one == of_eva_x
    found = cxrdist.load(bundle, precision="fp32").predict(xrays["chest.png"])
    for name in ("eva_x", "chexfound"):
        for label, score in zip(LABELS, found.members[name][0].tolist(), strict=True):
            bar = (
                page.locator(".cx-row").filter(has=page.get_by_text(label, exact=True)).locator(f"[data-member={name}]")
            )
            assert float(bar.get_attribute("data-probability")) == pytest.approx(score, abs=1e-6)
    page.get_by_role("group", name="Map by").get_by_label("chexfound").check()
    page.wait_for_function("document.querySelectorAll('.cx-member').length === 0")  # with itself is no comparison
    assert pictures(page, 2) == [plain, two]


@in_a_browser
def test_a_wrong_file_is_named_in_one_line_with_the_reason(page, server, xrays) -> None:
    drop(page, xrays["chest.png"], "chest.png")
    choose(page, "Lung Opacity")
    page.set_input_files("input[type=file]", {"name": f"{TAGS}.png", "mimeType": "image/png", "buffer": b"nothing"})
    page.wait_for_selector(".cx-wrong")
    assert (
        page.get_by_role("status").filter(has_text="cannot").inner_text() == f"{TAGS}.png: cannot identify image file"
    )
    assert page.locator(".cx-row, #cx-maps img").count() == 0
    good = {"name": f"{TAGS}.png", "mimeType": "image/png", "buffer": xrays["chest.png"].read_bytes()}
    drop(page, good, f"{TAGS}.png")
    assert server.files() == []


@in_a_browser
def test_all_can_be_done_with_the_keyboard(page, xrays) -> None:
    page.keyboard.press("Tab")
    with page.expect_file_chooser() as asked:
        page.keyboard.press("Enter")
    asked.value.set_files(xrays["chest.png"])
    page.wait_for_selector(".cx-row:focus")  # the first finding
    page.keyboard.press("Tab")
    label = page.locator(".cx-row").nth(1).get_attribute("data-label")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=label, exact=True).wait_for()
    pictures(page, 2)
    assert page.locator(".cx-row:focus").get_attribute("data-label") == label
    page.keyboard.press("Shift+Tab")  # the first finding
    page.keyboard.press("Shift+Tab")  # the last member to compare with
    page.keyboard.press("Space")
    assert page.get_by_role("group", name="Compare with").get_by_label("chexfound").is_checked()
    pictures(page, 3)


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll_and_its_text_is_legible(scheme, browser, server, xrays) -> None:
    with opened(browser, server, 400, scheme) as page:
        name = f"{'long' * 30}.png"
        drop(page, {"name": name, "mimeType": "image/png", "buffer": xrays["chest.png"].read_bytes()}, name)
        page.get_by_role("group", name="Compare with").get_by_label("chexfound").check()
        choose(page, TAGS)
        pictures(page, 3)
        assert page.evaluate("document.documentElement.scrollWidth") == 400
        text = ".cx h1, .cx h2, .cx p, .cx figcaption, .cx-name, .cx-number, .cx-small, .cx-positive, .cx-keys li"
        page.wait_for_function("document.querySelectorAll('.cx .pending').length === 0")
        ratios = page.evaluate(CONTRAST, text)
        assert len(ratios) > 20
        assert min(ratio for _, ratio in ratios) >= 4.5, ratios
        assert page.locator("#cx-maps").is_visible()


@in_a_browser
def test_another_hosts_name_is_not_answered_and_no_other_host_was_asked(server) -> None:
    for host, status in (("evil.example", 400), ("localhost", 200)):
        request = urllib.request.Request(server.url, headers={"Host": f"{host}:{server.url.rpartition(':')[2]}"})
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=30) as answer:
            assert (answer.status, status) == (200, 200)
            assert b'"max_file_size":536870912' in answer.read().replace(b" ", b"")
            continue
        assert status == 400
    server.outside.settimeout(0.2)
    with pytest.raises(TimeoutError):
        server.outside.accept()


@in_a_browser
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_quietly_and_leaves_nothing(how, browser, bundle, xrays, tmp_path) -> None:
    with serving(bundle, tmp_path / "tmp") as server, opened(browser, server) as page:
        drop(page, xrays["chest.png"], "chest.png")
        uploaded = page.evaluate(
            "(async () => { const form = new FormData(); form.append('files', new File(['x'], 'left.png'));"
            "return (await fetch('/gradio_api/upload', { method: 'POST', body: form })).status })()"
        )
        assert uploaded == 200
        assert [path.name for path in server.files()] == ["left.png"]  # of an upload that nothing came after
        server.process.send_signal(how)
        out, err = server.process.communicate(timeout=60)
        assert server.process.returncode == 0
        assert (out.strip(), err) == ("ended; no image was kept", "")
        assert list(server.temporary.iterdir()) == []


def test_what_files_and_tasks_name_is_shown_as_it_is(bundle, xrays) -> None:
    from cxrdist.web.findings import Look, findings_html, head_html, maps_html, message_html

    model, content = cxrdist.load(bundle, precision="fp32"), xrays["chest.png"].read_bytes()
    look = Look(TAGS, content, model.predict(content), chosen=1)
    html = head_html(model) + message_html(TAGS) + findings_html(model, look, ["eva_x", "chexfound"])
    html += maps_html(model, look, ["eva_x"])
    seen, shown, labels = set[str](), list[str](), list[Any]()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            seen.update([tag, *(name for name, _ in attrs)])
            labels.extend(value for name, value in attrs if name == "data-label")

        def handle_data(self, data: str) -> None:
            shown.append(data)

    Reader().feed(html)
    assert set(labels) == set(LABELS)
    assert shown.count(TAGS) == 3  # the message, its row and the title of its map
    assert f"Findings in {TAGS}" in shown
    assert not seen & {"script", "onerror"}
    assert "${" not in html
    assert "{{" not in html


def test_maps_of_a_member_that_started_from_random_weights_say_so(bundle, xrays) -> None:
    from cxrdist.report.saliency import FROM_RANDOM
    from cxrdist.web.findings import Look, maps_html

    model, content = cxrdist.load(bundle, precision="fp32"), xrays["chest.png"].read_bytes()
    look = Look("chest.png", content, model.predict(content), chosen=1)
    for name in ("eva_x", "chexfound"):  # the backbone of the second is random, and the bundle knows it
        assert (FROM_RANDOM in maps_html(model, look, [name])) is (name == "chexfound")


def test_one_image_at_a_time_is_in_the_model(bundle, xrays, monkeypatch) -> None:
    pytest.importorskip("gradio")
    from cxrdist.web.blocks import Page

    model, held = cxrdist.load(bundle), list[bool]()
    page = Page(model)
    for name in ("predict", "maps"):
        own = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *a, own=own, **k: (held.append(page.turn.locked()), own(*a, **k))[1])
    look = page.drop(("chest.png", xrays["chest.png"].read_bytes()), "eva_x", "chexfound")[1]
    page.compare(dataclasses.replace(look, chosen=0), "eva_x", "chexfound")
    assert held == [True] * 3
    assert not page.turn.locked()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "{busy}"], "cannot listen there"),
        (["--host", "no.such.host.invalid", "--port", "0"], "cannot listen there"),
        (["--port", "70000"], "give 0 to 65535"),
    ],
)
def test_a_mistake_is_one_line(arguments, told, bundle, capsys) -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        texts = [text.format(busy=busy.getsockname()[1]) for text in arguments]
        assert run_entry(lambda: app.main(["--bundle", str(bundle), *texts])) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0]


def test_without_gradio_it_says_what_to_install(bundle, monkeypatch, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_entry(lambda: app.main(["--bundle", str(bundle)])) == 2
    assert capsys.readouterr().err == "error: the page needs Gradio: pip install 'cxrdist[app]'\n"


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False)])
def test_a_page_that_others_can_reach_is_warned_of(host, warned, bundle, monkeypatch, capsys) -> None:
    pytest.importorskip("gradio")
    monkeypatch.setattr("cxrdist.web.serve.serve", lambda *_: None)
    app.main(["--bundle", str(bundle), "--host", host, "--port", "0"])
    assert ("anyone who can reach this machine can send images" in capsys.readouterr().out) == warned
