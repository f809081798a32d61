"""Real vhost-user back-ends as Debian has them, started for a test and ended with it."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from postcopy.vhost_user.channel import is_listening
from tests.system.service import until

SECTOR = 512


def disk_bytes(sectors: int) -> bytes:
    """Every sector is full of its own number."""
    return b"".join(struct.pack("<Q", n) * (SECTOR // 8) for n in range(sectors))


@dataclass
class Program:
    """A running back-end."""

    process: subprocess.Popen[bytes]
    socket: Path
    disk: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self, number: int = 9) -> None:
        self.process.send_signal(number)
        self.process.wait(20)


@contextmanager
def running(command: list[str], path: Path, disk: Path, user: int | None = None) -> Iterator[Program]:
    assert shutil.which(command[0]), f"{command[0]} is missing: scripts/install"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, user=user)
        try:

            def ready() -> bool:
                assert process.poll() is None, _tell(log)
                return is_listening(str(path))

            until(ready, f"{command[0]} listens", 30)
            yield Program(process, path, disk)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
            if process.stdin is not None:
                process.stdin.close()
            path.unlink(missing_ok=True)


def _tell(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]
    return str(log.read()[-2000:])  # type: ignore[attr-defined]


@contextmanager
def storage_daemon(
    directory: Path, sectors: int = 2048, queues: int = 1, name: str = "blk", user: int | None = None
) -> Iterator[Program]:
    """qemu-storage-daemon with one writable virtio-blk export, on libvhost-user."""
    disk, path = directory / f"{name}.img", directory / f"{name}.sock"
    disk.write_bytes(disk_bytes(sectors))
    if user is not None:
        os.chown(disk, user, user)
    export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path},writable=on,num-queues={queues}"
    command = ["qemu-storage-daemon", "--blockdev", f"driver=file,filename={disk},node-name=f"]
    command += ["--blockdev", "driver=raw,file=f,node-name=d", "--export", export]
    with running(command, path, disk, user) as program:
        yield program


@contextmanager
def dpdk(directory: Path, *options: str) -> Iterator[Program]:
    """DPDK's testpmd with one vhost-user port, on rte_vhost, without huge pages or devices."""
    path = directory / "pmd.sock"
    device = f"net_vhost0,iface={path},queues=1,postcopy-support=1"
    command = ["dpdk-testpmd", "--no-huge", "-m", "128", "--no-pci", "--no-shconf", "-l", "0,1", "--vdev", device]
    with running([*command, "--", "-i", "--total-num-mbufs=2048", *options], path, path) as program:
        yield program


@contextmanager
def storage_daemons(directory: Path, count: int) -> Iterator[list[Path]]:
    """One qemu-storage-daemon with many exports of one disk, read-only."""
    disk, paths = directory / "many.img", [directory / f"many{n}.sock" for n in range(count)]
    disk.write_bytes(disk_bytes(2048))
    command = ["qemu-storage-daemon", "--blockdev", f"driver=file,filename={disk},node-name=f,read-only=on"]
    command += ["--blockdev", "driver=raw,file=f,node-name=d,read-only=on"]
    for n, path in enumerate(paths):
        command += ["--export", f"type=vhost-user-blk,id=e{n},node-name=d,addr.type=unix,addr.path={path}"]
    with running(command, paths[-1], disk):
        yield paths
