"""A shard set of several shards and a web server that counts, slows and fails, for the tests of streaming."""

import contextlib
import http.server
import os
import shutil
import ssl
import stat
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxrdist.shards.convert import Pixels
from cxrdist.shards.writer import Source, SplitJob, write_split
from cxrdist.task import TASKS, Task


def write_set(folder: Path, split: str = "train", num_shards: int = 12, per_shard: int = 8, task: Task = TASKS["b"]):
    """A split of grey images of 384 px, in shards of that many; patients of four images."""
    rng = np.random.default_rng(sum(split.encode()))
    sources = []
    for number in range(num_shards * per_shard):
        path = folder.parent / f"images-{split}" / f"{number // 4:08d}_001_{number % 4:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 255, (12, 12), dtype=np.uint8))
        small.resize((384, 384), Image.Resampling.BILINEAR).save(path, compress_level=1)
        targets = tuple(float(value) for value in rng.random(task.num_labels) < 0.4)
        about = ("", f"{number // 4:08d}", "001")
        sources.append(Source(number, path.name, str(path), path.stat().st_size, *about, targets=targets))
    write_split(SplitJob(folder, task, split, sources, Pixels(size_px=384), per_shard, {}))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.folder`, with Range. `server.sent`: bytes by name; `server.faults`: (what happens, how often)."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        name = self.path.rsplit("/", 1)[-1]
        server.asked[name] += 1
        fault, left = server.faults.get(name, ("", 0))
        if left:
            server.faults[name] = (fault, left - 1)
        file = server.folder / name
        if not left:
            fault = ""
        if not file.is_file() or fault.isdigit():
            self.send_error(int(fault or 404))
            return
        content = file.read_bytes()
        if fault == "corrupt":
            content = bytes(len(content))
        begin, end = 0, len(content)
        if (asked := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(end, int(last) + 1 if last else end)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - begin))
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.end_headers()
        with contextlib.suppress(OSError):
            for start in range(begin, end, 2**14):
                if fault == "stall" and start > begin:
                    time.sleep(server.stall_s)
                    fault = ""
                part = content[start : min(end, start + 2**14)]
                if server.bytes_per_s:
                    server.wait_for(len(part))
                self.wfile.write(part)
                server.sent[name] += len(part)


def certificate(file: Path, address: str = "127.0.0.1") -> Path:
    """Writes a key and a certificate for an HTTPS server at `address`; clients take it as SSL_CERT_FILE."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl for a certificate")
    subject = ("-subj", "/CN=localhost", "-addext", f"subjectAltName=IP:{address}")
    made = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject)
    subprocess.run([*made, "-keyout", file, "-out", file], check=True, capture_output=True)
    return file


class Server(http.server.ThreadingHTTPServer):
    """bytes_per_s: of all answers together; None as fast as it goes."""

    daemon_threads = True

    def __init__(self, folder: Path, certificate: Path | None = None, address: str = "127.0.0.1") -> None:
        """certificate: of an HTTPS server, with its key; None: HTTP."""
        super().__init__((address, 0), Handler)
        self.scheme = "http"
        if certificate is not None:
            self.scheme, context = "https", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.folder, self.faults = folder, {}
        self.asked, self.sent = Counter(), Counter()
        self.bytes_per_s, self.stall_s = None, 60.0
        self._lock, self._free_at = threading.Lock(), 0.0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.server_address[0]}:{self.server_port}/set"

    def tar_bytes(self) -> int:
        return sum(count for name, count in self.sent.items() if name.endswith(".tar"))

    def wait_for(self, num_bytes: int) -> None:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + num_bytes / self.bytes_per_s
            pause = self._free_at - time.monotonic()
        time.sleep(max(0.0, pause))


class Watch:
    """The most bytes that the files of a folder held, looked at again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.002):
            total = 0
            for folder, _, names in os.walk(self.folder):  # leaves out a folder that goes meanwhile; glob would raise
                if Path(folder) in (self.folder, self.folder / "uses"):
                    continue
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        about = Path(folder, name).stat()
                        total += about.st_size if stat.S_ISREG(about.st_mode) else 0
            self.most = max(self.most, total)
