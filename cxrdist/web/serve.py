"""The page on a port of this machine: no request to another host, nothing of an upload left behind."""

import ipaddress
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cxrdist.errors import UserError
from cxrdist.inference.predictor import Predictor
from cxrdist.shards.dicom import MAX_BYTES
from cxrdist.web.style import CSS

LOOPBACK = "127.0.0.1"
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif")
POLICY = (  # what a browser may fetch for the page; Gradio runs inline scripts and makes functions of texts
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any free one. UserError where it cannot."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        why = f"cannot listen there ({error.strerror or error})"
        raise UserError(f"--host {host} --port {port}: {why}; give another --host or --port") from None


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(model: Predictor, listening: socket.socket, host: str) -> None:
    """The page until Ctrl-C or SIGTERM, which raise KeyboardInterrupt here when all uploads are deleted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="cxrdist-app-") as folder:
        for name in [name for name in os.environ if name.startswith("GRADIO_")]:
            del os.environ[name]  # of other pages: shares, allowed folders, monitoring
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        config = uvicorn.Config(make_app(model, host, Path(folder)), log_level="error", timeout_graceful_shutdown=1)
        print(f"page: {address_of(listening)} (Ctrl-C ends it)", flush=True)
        Quiet(config).run(sockets=[listening])


class Quiet(uvicorn.Server):
    """Pages that are still open are cut off without a word."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def make_app(model: Predictor, host: str, folder: Path) -> Any:
    """The ASGI application; Gradio is imported here, when its environment is set."""
    import gradio

    from cxrdist.web.blocks import make_blocks

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if is_loopback(host):  # a page elsewhere whose name leads here is not answered
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", LOOPBACK, host, f"[{host}]"])
    app.add_middleware(WithHeaders)
    return gradio.mount_gradio_app(
        app,
        make_blocks(model),
        path="/",
        footer_links=[],
        run_history=False,  # it would keep results in the browser
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        blocked_paths=[str(folder)],
        show_error=False,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gradio.themes.Default(primary_hue="blue", font=FONTS, font_mono=("ui-monospace", "monospace")),
        css=CSS,
    )


class WithHeaders:
    """ASGI middleware: `HEADERS` on every answer."""

    def __init__(self, app: Callable[[Any, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        async def send_more(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        await self.app(scope, receive, send_more)
