"""A real Linux in a VM, of which the example finds the kernel and every process while it runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.qemu import await_line, installed, qemu_source
from tests.system.service import ROOT, Service, environment, until

GUEST = ROOT / ".venv" / "guest"
INIT = b"""#!/bin/busybox sh
/bin/busybox mkdir /proc
/bin/busybox mount -t proc proc /proc
/bin/busybox sleep 100000 &
/bin/busybox cat /proc/version
/bin/busybox ps -o pid,comm
/bin/busybox echo ready
while true; do /bin/busybox sleep 1000; done
"""


def archive(*files: tuple[str, int, bytes]) -> bytes:
    """An initial RAM disk (cpio, newc) of these names, modes and contents."""
    made = b""
    for number, (name, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        named = name.encode() + b"\0"
        head = b"070701" + b"".join(
            b"%08x" % field for field in (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(named), 0)
        )
        for part in (head + named, data):
            made += part.ljust(-(-len(part) // 4) * 4, b"\0")
    return made


@pytest.mark.usefixtures("require_userfaultfd")
def test_the_example_finds_kernel_and_processes(place: Path) -> None:
    kernels = list(GUEST.glob("boot/vmlinuz*"))
    if not kernels:
        pytest.skip("no kernel for a guest: scripts/install --test could not unpack one")
    busybox = (GUEST / "bin" / "busybox").read_bytes()
    (place / "initrd").write_bytes(
        archive(("bin", 0o40755, b""), ("bin/busybox", 0o100755, busybox), ("init", 0o100755, INIT))
    )
    words = [*installed(new=False).command, "-accel", "tcg", "-m", "128M", "-nodefaults", "-display", "none"]
    words += ["-kernel", str(kernels[0]), "-initrd", f"{place}/initrd", "-append", "console=ttyS0 quiet"]
    words += ["-serial", f"file:{place}/console", "-qmp", f"unix:{place}/qmp,server=on,wait=off"]
    console = place / "console"
    with subprocess.Popen(words) as vm:
        try:
            until(lambda: console.exists() and "ready" in console.read_text(), "Linux runs", 240)
            with qemu_source(place, "--migration", f"unix:{place}/mig", "--qmp", f"{place}/qmp"):
                await_line(place, "ready")
                with Service(place / "r", f"ram=ipc://{place}/s/pc.ram"):
                    environ = environment(POSTCOPY_RUNTIME_DIR=str(place / "r"))
                    command = [sys.executable, str(ROOT / "examples" / "vm_memory.py"), "ram"]
                    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
        finally:
            vm.kill()
    assert ended.returncode == 0, ended.stderr
    said = console.read_text()
    version = re.search(r"Linux version .*", said)
    assert version and ended.stdout.splitlines()[0] == version[0].strip()
    seen = dict(re.findall(r"^ +(\d+)  (.*)$", ended.stdout, re.MULTILINE))
    there = dict(re.findall(r"^ *(\d+) ([\w/:]+)\s*$", said, re.MULTILINE))
    ended_since = {number for number in there if number not in seen}  # ps itself
    assert len(ended_since) <= 2 and len(seen) > 20 and seen["2"] == "kthreadd"
    for number in there.keys() & seen.keys():
        assert seen[number] == there[number] or "kworker" in seen[number], (seen, said)
