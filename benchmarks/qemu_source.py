"""``qemu``: how fast does a live image of a VM arrive, against a reader that throws the same stream away?

The VM has memory full of random bytes and does nothing. In turns, QEMU sends a background snapshot to a plain reader
and to ``postcopy source qemu``. Both are timed from the connection to the last page, QEMU's own work included. The
first page is usable when the source serves; that is timed from the start of the command.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .bench import Bench, BenchmarkFailed
from .figures import Pair, Row, ratio_row, value_row

QEMU = "qemu-system-x86_64"
WITHIN = 60.0
SNAPSHOT = [{"capability": "background-snapshot", "state": True}]


def run(bench: Bench) -> list[Row]:
    """The rate of a live image, and the time to its first page."""
    try:
        from postcopy_sources.qemu.qmp import Monitor
    except ImportError as error:
        raise BenchmarkFailed(f"qemu.qmp is missing: {error}") from None
    if shutil.which(QEMU) is None:
        raise BenchmarkFailed(f"there is no {QEMU} here")
    length = bench.scale.of(512 << 20, 64 << 20)
    pairs: list[Pair] = []
    ready: list[float] = []
    with tempfile.TemporaryDirectory(prefix="pcq-", dir="/dev/shm") as directory:
        vm = _start(Path(directory), length)
        try:
            for number in range(bench.scale.pairs):
                bench.say(f"qemu: round {number + 1} of {bench.scale.pairs}")
                with Monitor(f"{directory}/qmp") as monitor:
                    plain = _thrown_away(monitor, directory)
                ours, first = _ours(directory)
                pairs.append((length / ours / 1e6, length / plain / 1e6))
                ready.append(first * 1e3)
        finally:
            vm.kill()
            vm.wait()
    name = f"live image of a VM of {length >> 20} MiB, against a reader that keeps nothing"
    rate = ratio_row(name, pairs, 0.9, unit="MB/s", labels=("ours", "reader"), least=True)
    return [rate, value_row("from the command to the first page of a VM", ready, "ms")]


def _start(directory: Path, length: int) -> subprocess.Popen[bytes]:
    with (directory / "ram").open("wb") as file:
        for _ in range(length >> 20):
            file.write(os.urandom(1 << 20))
    options = f"-nodefaults -display none -accel tcg -m {length >> 20}M -machine pc,memory-backend=m -object "
    options += f"memory-backend-file,id=m,mem-path={directory}/ram,share=on,size={length} "
    options += f"-qmp unix:{directory}/qmp,server=on,wait=off"
    vm = subprocess.Popen([QEMU, *options.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _until(lambda: (directory / "qmp").exists(), "QEMU's monitor")
    return vm


def _thrown_away(monitor: Any, directory: str) -> float:
    """Seconds from the connection to the end of the stream."""
    path = f"{directory}/plain"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        monitor.execute("migrate-set-capabilities", {"capabilities": SNAPSHOT})
        monitor.execute("migrate", {"uri": f"unix:{path}"})
        connection, _ = listener.accept()
    os.unlink(path)
    buffer, begun = bytearray(1 << 20), time.monotonic()
    with connection:
        while connection.recv_into(buffer):
            pass
    took = time.monotonic() - begun
    _until(lambda: monitor.execute("query-migrate")["status"] == "completed", "the end of the snapshot")
    return took


def _ours(directory: str) -> tuple[float, float]:
    """Seconds from the connection to the last page, and from the command to ready."""
    command = [sys.executable, "-m", "postcopy_sources", "qemu", "--listen", f"ipc://{directory}/s"]
    command += ["--migration", f"unix:{directory}/mig", "--qmp", f"{directory}/qmp"]
    began = time.monotonic()
    took = first = 0.0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as source:
        assert source.stderr is not None
        for line in source.stderr:
            if "ready:" in line:
                first = time.monotonic() - began
            if "are here, after" in line:
                took = float(line.split("after ")[1].split()[0])
                break
        source.terminate()
    if not took:
        raise BenchmarkFailed("postcopy source qemu has not got the image")
    return took, first


def _until(look: Any, what: str) -> None:
    limit = time.monotonic() + WITHIN
    while not look():
        if time.monotonic() > limit:
            raise BenchmarkFailed(f"{what} does not come within {WITHIN:g} s")
        time.sleep(0.01)
