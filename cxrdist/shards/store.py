"""A folder of source images in an object store -> what lies in it, and the bytes of one image at a time.

Through fsspec: s3:// (s3fs) and gs:// (gcsfs), which find endpoint and credentials where their own tools do, such as
the environment, a profile, the machine's role. An address holds none of them, and no message does.
"""

import errno
import functools
import os
import time
import urllib.error
from pathlib import Path
from typing import Any

from cxrdist.errors import UserError

EXTRAS = {"s3": "s3", "gs": "gs"}  # protocol: the extra of this project that installs what fsspec needs
READ_S = 120.0  # for one object; whatever takes longer is tried again
PAUSES_S = (1.0, 2.0, 4.0)  # between the tries
KEPT = "finished shards are kept: run the same command again"


def folder_or_url(text: str) -> Path | str:
    """A local folder as Path, or the address of a folder in a store. UserError for one that cannot be listed."""
    protocol, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if protocol not in EXTRAS or "::" in rest:
        known = " or ".join(f"{name}://" for name in EXTRAS)
        raise UserError(f"{text}: images are read from a folder, {known} (a web server does not list its files)")
    if set("@?#") & set(rest) or not rest.strip("/"):
        raise UserError(f"{protocol}:// takes BUCKET/FOLDER; credentials belong into the environment or a profile")
    return text.rstrip("/")


def is_remote(path: str) -> bool:
    return path.startswith(tuple(f"{protocol}://" for protocol in EXTRAS))


def list_files(url: str) -> dict[str, int]:
    """Bytes of each object below `url`, by its path relative to it. UserError where it cannot be listed."""
    system, root = _open(url)
    try:
        found = system.find(root, detail=True)
    except Exception as error:  # of the package's own kind
        raise UserError(f"{url}: cannot be listed ({reason(error)}); check the address and your access") from error
    start = len(root) + 1
    return {path[start:]: int(about["size"]) for path, about in found.items() if path[start:] and path[-1] != "/"}


def read(path: str, most: int) -> bytes:
    """The object at `path`, at most its first `most` bytes. What may pass is tried again.

    Raises FileNotFoundError or PermissionError where this object alone is gone or closed and the bucket can still be
    listed. UserError where the store does not answer, or lists nothing any more: no reason to leave an image out.
    """
    from fsspec.asyn import sync

    system, key = _open(path)
    for pause in (*PAUSES_S, None):
        try:
            content: bytes = sync(system.loop, system._cat_file, key, start=0, end=most, timeout=READ_S)
            return content
        except (FileNotFoundError, PermissionError) as error:
            _require_open(system, path, key)
            number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EACCES
            raise type(error)(number, os.strerror(number), path) from None
        except Exception as error:
            if getattr(error, "errno", None) == errno.EINVAL or getattr(error, "code", None) == 416:
                return b""  # an empty object has not even a first byte
            if pause is None:
                raise UserError(f"{path}: cannot be read ({reason(error)}); {KEPT}") from error
            time.sleep(pause)
    raise AssertionError


def _require_open(system: Any, path: str, key: str) -> None:
    """UserError when the bucket is gone, or lists nothing to us any more: every other image would seem gone, too."""
    try:
        system.find(key)
    except Exception as error:
        raise UserError(f"{path}: its bucket cannot be listed any more ({reason(error)}); {KEPT}") from error


def _open(path: str) -> tuple[Any, str]:
    protocol, _, key = path.partition("://")
    return _system(protocol), key


@functools.cache
def _system(protocol: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError:
        raise UserError(f"{protocol}:// needs: pip install 'cxrdist[{EXTRAS[protocol]}]'") from None
    except Exception as error:
        raise UserError(f"{protocol}:// cannot be used ({reason(error)}); check its settings") from error


def reason(error: BaseException) -> str:
    """What an error of a remote says, in one line."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {' '.join(str(error.reason).split())}"[:200]
    said = str(error.reason if isinstance(error, urllib.error.URLError) else error)
    return f"{type(error).__name__}: {' '.join(said.split())}"[:200]
