"""The socket of Firecracker's machines: who may connect, and several sockets."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from postcopy.errors import PostcopyError
from postcopy.firecracker import listener as listener_module
from postcopy.firecracker.listener import Listener

NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users can enter."""
    with tempfile.TemporaryDirectory(prefix="pcl-", dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def connect_as(user: int, path: Path) -> None:
    child = os.fork()
    if child == 0:
        os.setresuid(user, user, user)
        with socket.socket(socket.AF_UNIX) as peer:
            os._exit(peer.connect_ex(str(path)))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_is_refused_by_name(place: Path) -> None:
    path = place / "fc.sock"
    with closing(Listener([str(path)])) as listener:
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o666)
        connect_as(NOBODY, path)
        (said,) = listener.newcomers(10.0)
        assert said == f"a process of user {NOBODY} may not connect (--allow-uid {NOBODY} allows it)"
    with closing(Listener([str(path)], (NOBODY, NOBODY))) as listener:
        assert path.stat().st_uid == NOBODY
        connect_as(NOBODY, path)
        all_said = [one for _ in range(2) for one in listener.newcomers(1.0)]
        assert len(all_said) == 1 and "it sent nothing" in str(all_said[0])


def test_all_sockets_or_none(place: Path) -> None:
    paths = [str(place / name) for name in ("a", "b")]
    with closing(Listener(paths)), socket.socket(socket.AF_UNIX) as peer:
        peer.connect(paths[1])
        with pytest.raises(PostcopyError, match="another process does"):
            Listener([str(place / "c"), paths[0]])
        assert sorted(path.name for path in place.iterdir()) == ["a", "b"]
    assert not list(place.iterdir())


def test_a_machine_is_not_late_because_another_was_attached(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has said lies in its socket when the time is over."""
    monkeypatch.setattr(listener_module, "HANDSHAKE_SECONDS", 0.0)
    path = str(place / "a")
    with closing(Listener([path])) as listener, socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        peer.sendall(b"{}")
        (said,) = listener.newcomers(10.0)
        assert "does not begin with [" in str(said)
