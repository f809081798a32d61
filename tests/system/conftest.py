"""Servers and virtual machines that several test files use."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.qemu import Qemu, Vm, installed
from tests.system.stores import s3

__all__ = ["s3"]


# --- real QEMUs -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=("old", "new"))
def qemu(request: pytest.FixtureRequest) -> Qemu:
    """The system's QEMU, and the newer one that scripts/install unpacks."""
    return installed(new=request.param == "new")


@pytest.fixture
def newest() -> Qemu:
    return installed(new=True)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory with a short path, for a VM, sockets and logs; no socket of ours may be left."""
    path = Path(tempfile.mkdtemp(prefix="pq-", dir="/tmp"))
    try:
        yield path
        if request.node.get_closest_marker("leaves_files") is None:
            assert not [name for name in ("s", "mig", "r/door") if (path / name).exists()]
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def vm(qemu: Qemu, place: Path) -> Iterator[Vm]:
    with Vm(qemu, place / "vm") as vm:
        yield vm
