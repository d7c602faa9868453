"""The saved wandb workspace: its panels show what a training logs, and what is missing is one line."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from typing import Any, ClassVar

import pytest

from cxrdist.errors import UserError
from cxrdist.training import dashboard

pytestmark = pytest.mark.fast

LOGGED = {
    "training loss": ["loss", "focal", "bce"],
    "validation macro AUROC": ["validation/auroc_macro"],
    "validation AUROC per label": ["validation/auroc/Nodule", "validation/auroc/50 % & more"],
    "validation loss": ["validation/loss"],
    "learning rate per group": ["lr/all", "lr/blocks.0"],
    "gradient norm": ["grad_norm"],
    "loss scale, skipped steps": ["loss_scale", "skipped"],
    "images/s": ["images_per_s", "rank0/images_per_s", "rank63/images_per_s"],
    "share of time waiting for data": ["wait_share", "shards_wait_share"],
}
OTHERS = ["epoch_loss", "step", "epoch", "kind", "validation/images", "rank0/wait_share", "rank0/memory_bytes"]


def test_each_panel_shows_its_series_and_no_other() -> None:
    everything = [name for names in LOGGED.values() for name in names] + OTHERS
    for title, pattern in dashboard.PANELS.items():
        assert [name for name in everything if re.fullmatch(pattern, name)] == LOGGED[title], title


def test_a_missing_library_or_project_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(UserError, match=dashboard.NEEDS):
        dashboard.main(["team/project"])
    for wrong in ("project", "a/b/c", "/b", "a/"):
        with pytest.raises(SystemExit):
            dashboard.main([wrong])
        assert f"error: {wrong!r} is not ENTITY/PROJECT" in capsys.readouterr().err


class Wandb(http.server.BaseHTTPRequestHandler):
    """Takes what wandb's library sends to save a view."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(asked)
        view = {"id": "1", "name": "nw-abc-v", "type": "", "displayName": "", "description": "", "spec": "{}"}
        viewer = {"id": "1", "username": "me", "entity": "team", "flags": "{}", "email": "", "admin": False}
        answer = {"viewer": viewer, "serverInfo": None, "upsertView": {"view": view, "inserted": True}}
        content = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_the_real_library_saves_the_view() -> None:
    pytest.importorskip("wandb_workspaces", reason=dashboard.NEEDS)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Wandb)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    key = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "0" * 40}
    words = [sys.executable, "-m", "cxrdist.training.dashboard", "team/project", "--name", "ours"]
    done = subprocess.run(words, env=os.environ | key, capture_output=True, text=True, timeout=120)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert re.search(r"^saved: http\S+/team/project\?nw=abc$", done.stdout, re.M)
    (asked,) = [one["variables"] for one in Wandb.asked if "spec" in one.get("variables", {})]
    assert (asked["entityName"], asked["projectName"], asked["displayName"]) == ("team", "project", "ours")
    section = json.loads(asked["spec"])["section"]
    panels = [panel["config"] for panel in section["panelBankConfig"]["sections"][0]["panels"]]
    assert [panel["chartTitle"] for panel in panels] == list(dashboard.PANELS)
    assert {panel["xAxis"] for panel in panels} == {"step"}
    for panel, names in zip(panels, LOGGED.values(), strict=True):
        shown = panel.get("metricRegex") or f"^{panel['metrics'][0]}$"
        assert all(re.search(shown, name) for name in names)
    assert section["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]
