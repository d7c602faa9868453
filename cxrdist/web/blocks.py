"""The page in Gradio: what stands where, and what happens on a drop, a choice and a comparison."""

import contextlib
import dataclasses
import threading
from pathlib import Path
from typing import Any

import gradio

from cxrdist.errors import UserError
from cxrdist.files import read_bytes
from cxrdist.inference.predictor import Predictor
from cxrdist.shards.dicom import MAX_BYTES
from cxrdist.web.findings import EMPTY, Look, findings_html, head_html, maps_html, message_html, told
from cxrdist.web.style import FINDINGS, GROUPS

SESSIONS = 16  # whose image is remembered, in memory; the oldest is forgotten first
WAITING = 32  # requests
Sent = tuple[str, bytes]


class Page:
    """What the events of the page do. One image at a time is in the model."""

    def __init__(self, model: Predictor) -> None:
        self.model, self.turn = model, threading.Lock()

    def drop(self, sent: Sent | None, first: str, second: str) -> tuple[None, Look | None, str, str, str]:
        """The drop zone empty again, the image with its findings and maps, and a line about it."""
        if sent is None:
            return None, None, EMPTY, "", ""
        name, content = sent
        try:
            with self.turn:
                found = self.model.predict(content, skip_unreadable=True)
            reason = next(iter(found.unreadable.values()), "")
        except UserError as error:
            reason = str(error)
        if reason:
            return None, None, EMPTY, "", message_html(f"{name}: {reason}", wrong=True)
        look = Look(name, content, found)
        return None, look, *self.compare(look, first, second), message_html(told(look))

    def choose(self, look: Look | None, first: str, second: str, event: gradio.EventData) -> tuple[Look | None, str]:
        place = event.place
        if look is None or not isinstance(place, int) or not 0 <= place < len(self.model.labels):
            return look, ""
        look = dataclasses.replace(look, chosen=place)
        return look, self.compare(look, first, second)[1]

    def compare(self, look: Look | None, first: str, second: str) -> tuple[str, str]:
        """Findings and maps, with the second member beside the first where there is one."""
        if look is None:
            return EMPTY, ""
        compared = [first, second] if second not in ("", first) else []
        with self.turn:
            return findings_html(self.model, look, compared), maps_html(self.model, look, compared or [first])


def received(payload: Any) -> Sent | None:
    """The name and the bytes of an upload, which is deleted; Gradio's own method keeps it, and changes the name."""
    if payload is None:
        return None
    path = Path(payload.path)
    try:
        return payload.orig_name or path.name, read_bytes(path, MAX_BYTES)
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # Gradio made one for it


def make_blocks(model: Predictor) -> gradio.Blocks:
    page, names = Page(model), [member.name for member in model.members]
    with contextlib.suppress(UserError):
        first_mapped = model.mapped().name
        names = [first_mapped, *(name for name in names if name != first_mapped)]
    blocks = gradio.Blocks(title="cxrdist", analytics_enabled=False, delete_cache=(600, 600))
    with blocks:
        look = gradio.State()
        html(head_html(model))
        with gradio.Row():
            with gradio.Column(scale=5, min_width=300, elem_classes="cx-left"):
                upload = gradio.File(label="X-ray (PNG, JPEG, TIFF or DICOM)", height=160, elem_id="cx-upload")
                status = html("")
                maps = html("", elem_id="cx-maps")
            with gradio.Column(scale=5, min_width=300):
                several = len(names) > 1
                first = gradio.Radio(names, value=names[0], label="Map by", visible=several)
                others = [("none", ""), *((name, name) for name in names)]
                second = gradio.Radio(others, value="", label="Compare with", visible=several)
                findings = html(EMPTY, js_on_load=FINDINGS, elem_id="cx-findings")
        # Gradio writes a .pyi file beside the source of a subclass, so its one method is replaced.
        upload.preprocess = received  # type: ignore[method-assign, assignment]
        members, shown = [first, second], [findings, maps]
        upload.upload(page.drop, [upload, *members], [upload, look, *shown, status], api_visibility="private")
        findings.select(page.choose, [look, *members], [look, maps], api_visibility="private")
        for control in members:
            control.change(page.compare, [look, *members], shown, api_visibility="private")
        blocks.load(None, js=GROUPS)
    blocks.state_session_capacity = SESSIONS
    blocks.queue(max_size=WAITING)
    return blocks


def html(value: str, **more: Any) -> gradio.HTML:
    return gradio.HTML(value, elem_classes="cx", apply_default_css=False, **({"js_on_load": None} | more))
