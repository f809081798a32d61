"""On what was it measured: facts that a reader needs before comparing a figure with one of his own."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Facts = dict[str, Any]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def facts() -> Facts:
    """Processor, kernel, Python, packages, commit, load: what was true when the figures were taken."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "virtual": "hypervisor" in _cpuinfo("flags").split(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("postcopy", "pyzmq", "msgpack")},
        "commit": _commit(),
        "load": list(os.getloadavg()),
        # A session is a scheduling group of its own where this is 1: who hands over to whom then costs more.
        "autogroup": _words("/proc/sys/kernel/sched_autogroup_enabled"),
        "huge_pages": _words("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    }


def in_words(found: Facts) -> str:
    """The facts in one line for people."""
    kind = "virtual machine" if found["virtual"] else "machine"
    return (
        f"{found['processor']} ({kind}, {found['processors']} CPUs, {found['memory_bytes'] >> 30} GiB), "
        f"Linux {found['kernel'].partition('-')[0]}, Python {found['python']}, commit {found['commit']}, "
        f"{found['time'][:10]}"
    )


def _cpuinfo(field: str) -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


def _processor() -> str:
    return _cpuinfo("model name") or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _words(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""
