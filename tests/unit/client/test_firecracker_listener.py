"""The socket of Firecracker's machines: who may connect, and several sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from postcopy.errors import PostcopyError
from postcopy.firecracker.listener import Listener

CONNECT = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users can enter."""
    with tempfile.TemporaryDirectory(prefix="pcl-", dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_is_refused_by_name(place: Path) -> None:
    path = place / "fc.sock"
    with closing(Listener([str(path)])) as listener:
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o666)
        subprocess.run([sys.executable, "-c", CONNECT, str(path)], check=True, user=NOBODY, group=NOBODY, timeout=60)
        (said,) = listener.newcomers(10.0)
        assert said == f"a process of user {NOBODY} may not connect (--allow-uid {NOBODY} allows it)"
    with closing(Listener([str(path)], (NOBODY, NOBODY))) as listener:
        assert path.stat().st_uid == NOBODY
        subprocess.run([sys.executable, "-c", CONNECT, str(path)], check=True, user=NOBODY, group=NOBODY, timeout=60)
        said = [one for _ in range(2) for one in listener.newcomers(1.0)]
        assert len(said) == 1 and "it sent nothing" in str(said[0])


def test_all_sockets_or_none(place: Path) -> None:
    paths = [str(place / name) for name in ("a", "b")]
    with closing(Listener(paths)), socket.socket(socket.AF_UNIX) as peer:
        peer.connect(paths[1])
        with pytest.raises(PostcopyError, match="another process does"):
            Listener([str(place / "c"), paths[0]])
        assert sorted(path.name for path in place.iterdir()) == ["a", "b"]
    assert not list(place.iterdir())
