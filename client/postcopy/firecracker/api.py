"""Firecracker's API, as far as a restore needs it: HTTP over a Unix socket, one request."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from ..errors import PostcopyError

LONGEST_ANSWER = 1 << 16


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def load_snapshot(path: str, snapshot: str, backend: str, *, resume: bool, timeout: float) -> None:
    """``PUT /snapshot/load`` at the API socket ``path``. It is answered when the machine has its memory, so the
    page-fault handler at ``backend`` serves meanwhile. Raises PostcopyError with Firecracker's own words."""
    body = {
        "snapshot_path": snapshot,
        "mem_backend": {"backend_type": "Uffd", "backend_path": backend},
        "resume_vm": resume,
    }
    connection = _Connection(path, timeout)
    try:
        connection.request("PUT", "/snapshot/load", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read(LONGEST_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PostcopyError(f"Firecracker's API at {path}: {reason}") from None
    finally:
        connection.close()
    if answer.status >= 300:
        raise PostcopyError(f"Firecracker cannot load {snapshot}: {_fault(said) or answer.reason}")


def _fault(said: bytes) -> str:
    try:
        body: Any = json.loads(said)
    except ValueError:
        return ""
    message = body.get("fault_message") if isinstance(body, dict) else None
    return " ".join(str(message).split()) if message else ""
