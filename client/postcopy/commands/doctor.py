"""``postcopy doctor``: what works on this machine, what does not, and the remedy. Changes nothing."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec

from ..errors import PostcopyError
from .options import Json

GOOD, LIMITED, BAD = "good", "limited", "bad"

_OLDEST = (5, 14)  # MADV_POPULATE_READ
_POISON = (6, 6)
_WHOLE_LANDLOCK = 6
_WANTED_FILES = 4096
_DEVICE = "/dev/userfaultfd"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: ``state`` is good, limited (fewer features) or bad; ``remedy`` may be empty."""

    name: str
    state: str
    found: str
    remedy: str = ""


def doctor(as_json: Json = False) -> None:
    """Check kernel, permissions, limits and packages, with remedies. Exit 1 when clients cannot work here."""
    findings = examine()
    if as_json:
        healthy = not any(finding.state == BAD for finding in findings)
        print(json.dumps({"ok": healthy, "checks": [asdict(finding) for finding in findings]}))
    else:
        _show(findings)
    if bad := [finding.name for finding in findings if finding.state == BAD]:
        raise PostcopyError(f"does not work here: {', '.join(bad)}")


def examine() -> list[Finding]:
    """All findings. A check that raises an error is a finding too."""
    findings: list[Finding] = []
    for check in (_kernel, _userfaultfd, _device, _sysctl, _memory, _limits, _processes, _walls, _packages):
        try:
            findings += check()
        except Exception as error:
            findings.append(Finding(check.__name__.strip("_"), BAD, f"{type(error).__name__}: {error}"))
    return findings


def _kernel() -> Iterator[Finding]:
    release = os.uname().release
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if version < _OLDEST:
        yield Finding("kernel", BAD, release, "Linux 5.14 or newer is needed")
    elif version < _POISON:
        yield Finding("kernel", LIMITED, release, "from Linux 6.6 on a lost page is an error instead of a wait")
    else:
        yield Finding("kernel", GOOD, f"{release} {os.uname().machine}")


def _userfaultfd() -> Iterator[Finding]:
    from postcopy_kernel.userfaultfd import Feature, probe_features

    try:
        features = probe_features()
    except OSError as error:
        remedy = "a client can still attach where the supervisor passes on the device"
        yield Finding("userfaultfd", LIMITED, error.strerror or str(error), remedy)
        return
    names = [feature.name.lower() for feature in Feature if feature in features and feature.name]
    needed = Feature.MISSING_SHMEM
    state = GOOD if needed in features else BAD
    yield Finding("userfaultfd", state, f"{len(names)} features: {', '.join(names)}")


def _device() -> Iterator[Finding]:
    remedy = f"for a supervisor that is not root, and for its clients: chgrp and chmod {_DEVICE}. With CAP_SYS_PTRACE "
    remedy += "instead, each client needs that right too"
    if not os.path.exists(_DEVICE):
        yield Finding(_DEVICE, LIMITED, "not there", "no module to load: Linux 6.1 or newer has it built in")
        return
    facts = os.stat(_DEVICE)
    rights = f"mode {facts.st_mode & 0o777:04o}, owner {facts.st_uid}:{facts.st_gid}"
    usable = os.access(_DEVICE, os.R_OK | os.W_OK)
    yield Finding(_DEVICE, GOOD if usable else LIMITED, rights, "" if usable else remedy)


def _sysctl() -> Iterator[Finding]:
    allowed = _read("/proc/sys/vm/unprivileged_userfaultfd")
    note = "without the device, supervisor and clients need root or CAP_SYS_PTRACE" if allowed == "0" else ""
    yield Finding("vm.unprivileged_userfaultfd", GOOD, allowed or "no such sysctl", note)
    overcommit = _read("/proc/sys/vm/overcommit_memory")
    strict = overcommit == "2"
    remedy = "blocks larger than the commit limit cannot be mapped: vm.overcommit_memory=0" if strict else ""
    yield Finding("vm.overcommit_memory", LIMITED if strict else GOOD, overcommit or "unknown", remedy)


def _memory() -> Iterator[Finding]:
    from postcopy_kernel.memory import create_memfd, huge_pages

    os.close(create_memfd("doctor", 4096))
    yield Finding("memfd", GOOD, "sealed shared memory can be created")
    pool = huge_pages()
    found = f"{pool.available} of {pool.total} pages of 2 MiB are free"
    remedy = "" if pool.available else "only --page-size 2M needs them: sysctl vm.nr_hugepages=N"
    yield Finding("huge pages", GOOD if pool.available else LIMITED, found, remedy)


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = hard != resource.RLIM_INFINITY and hard < _WANTED_FILES
    remedy = f"a supervisor needs about 6 a client: raise the hard limit to {_WANTED_FILES} or more" if few else ""
    yield Finding("open files", LIMITED if few else GOOD, f"soft {soft}, hard {hard}", remedy)


def _processes() -> Iterator[Finding]:
    from postcopy_kernel.process import pidfd_open

    os.close(pidfd_open(os.getpid()))
    yield Finding("pidfd", GOOD, "processes can be watched")


def _walls() -> Iterator[Finding]:
    from postcopy_kernel import landlock, seccomp

    if version := landlock.abi():
        lacking = (
            "" if version >= _WHOLE_LANDLOCK else "Linux 6.12 also takes signals and abstract sockets from workers"
        )
        yield Finding("landlock", GOOD, f"ABI {version}: workers open no path", lacking)
    else:
        yield Finding("landlock", LIMITED, "not there", "boot with lsm=landlock,... (CONFIG_SECURITY_LANDLOCK)")
    if seccomp.available():
        yield Finding("seccomp", GOOD, "workers start no program, trace no process, have only AF_UNIX sockets")
    else:
        yield Finding("seccomp", LIMITED, "no filter for this kernel or machine", "x86_64 and aarch64 have one")


def _packages() -> Iterator[Finding]:
    found = [f"Python {sys.version.split()[0]}", *(f"{name} {metadata.version(name)}" for name in ("msgpack", "pyzmq"))]
    import zmq

    yield Finding("packages", GOOD, ", ".join([*found, f"libzmq {zmq.zmq_version()}"]))
    if find_spec("postcopy_supervisor") is None:
        yield Finding("supervisor", LIMITED, "not installed", "to serve here: pip install 'postcopy[supervisor]'")
    elif find_spec("prctl") is None:
        yield Finding("supervisor", GOOD, "prctl(2) by ctypes, without python-prctl")
    else:
        yield Finding("supervisor", GOOD, f"python-prctl {metadata.version('python-prctl')}")


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _show(findings: list[Finding]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {GOOD: "green", LIMITED: "yellow", BAD: "red"}
    table = Table("", "check", "found", "remedy", box=box.SIMPLE_HEAD)
    for finding in findings:
        colour = colours[finding.state]
        table.add_row(
            f"[{colour}]{finding.state}[/]", *(escape(text) for text in (finding.name, finding.found, finding.remedy))
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
