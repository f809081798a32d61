"""What a supervisor refuses to serve, or where: one line that names the matter, the right exit status, nothing left."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from postcopy.errors import NoSupervisor
from postcopy.queries import Control
from postcopy_kernel.process import lock_holder
from tests.conftest import SourceFile
from tests.system.service import END_WITHIN, PAGE, Option, Service, alive, arguments, environment, refused, until, word

FAILED, USAGE = 1, 2


def one_line(said: tuple[int, str], status: int, *parts: str) -> None:
    """This exit status and one line for people with these regular expressions in it."""
    assert "\n" not in said[1], said[1]
    assert said[0] == status, said
    for part in parts:
        assert re.search(part, said[1]), f"no {part!r} in {said[1]!r}"


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: None, "No such file"),
        (Path.touch, "empty"),
        (Path.mkdir, "not a regular file"),
        (fifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    ],
    ids=["missing", "empty", "directory", "fifo", "device"],
)
def test_a_source_that_is_no_file(
    runtime_dir: Path, tmp_path: Path, make: Callable[[Path], None], complaint: str
) -> None:
    path = tmp_path / "thing"
    make(path)
    one_line(refused(runtime_dir, f"ram0={path}"), FAILED, "ram0", re.escape(str(path)), complaint)
    assert not (runtime_dir / "door").exists()


def test_an_unreadable_file(runtime_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x" * PAGE)
    path.chmod(0)
    os.chown(path, 4711, 4711)
    one_line(without_rights(arguments(runtime_dir, (f"ram0={path}",), {})), FAILED, "ram0", "Permission denied")


def without_rights(command: list[str], before: str = "pass") -> tuple[int, str]:
    """Run it as root that heeds file modes: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH are out of its bounds."""
    drop = "import ctypes, os, sys; libc = ctypes.CDLL(None); libc.prctl(24, 1); libc.prctl(24, 2)"
    code = f"{drop}\n{before}\nos.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, env=environment(), timeout=20, check=False
    )
    return done.returncode, done.stderr.decode().strip()


@pytest.mark.parametrize(
    ("blocks", "status", "complaint"),
    [
        (["a=zero:1M", "a=zero:1M"], USAGE, "a is used twice"),
        (["a=zero:0"], USAGE, "zero:0|the size must not be 0|'0'"),
        (["a=zero:-1"], USAGE, "no size"),
        (["a=zero:99999T"], USAGE, "too large"),
        (["a=zero:99999999999999999999999"], USAGE, "no size|too large"),
        (["a=zero:17T"], FAILED, "too large"),
        (["a=handler:m:f"], USAGE, "size"),
        (["a=handler:m:f?size=x"], USAGE, "no size"),
        (["a=gopher://x"], USAGE, "gopher"),
        (["a="], USAGE, "source"),
        (["zero:1M"], USAGE, "NAME=SOURCE"),
        (["-a=zero:1M"], USAGE, ""),
        (["a b=zero:1M"], USAGE, "no name"),
        (["x" * 65 + "=zero:1M"], USAGE, "no name"),
        (["a=tcp://127.0.0.1:1/x"], FAILED, "--plain-tcp"),
        ([], USAGE, ""),
    ],
)
def test_blocks_that_cannot_be(runtime_dir: Path, blocks: list[str], status: int, complaint: str) -> None:
    one_line(refused(runtime_dir, *blocks), status, complaint)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("page_size", "8K"),
        ("fault_around", "much"),
        ("fault_around", "1G"),
        ("fault_around", "3K"),
        ("background_rate", "-5"),
        ("max_memory", "x"),
        ("allow_uid", "-1"),
        ("allow_uid", "nobody"),
        ("allow_uid", str(1 << 32)),
        ("handler_timeout", "0"),
        ("handler_timeout", "nan"),
        ("restart_limit", "-1"),
        ("restart_limit", "1.5"),
        ("restart_interval", "0"),
        ("restart_backoff", "0"),
        ("restart_backoff", "6"),
        ("restart_stable", "inf"),
        ("start_timeout", "never"),
        ("quarantine", "kill"),
        ("log_level", "loud"),
        ("no_such_option", "1"),
    ],
)
def test_options_that_cannot_be(runtime_dir: Path, option: str, value: str) -> None:
    options: dict[str, Option] = {option: value}
    one_line(refused(runtime_dir, "a=zero:1M", options=options), USAGE, option.replace("_", "-") + "|unrecognized")


# --- the runtime directory --------------------------------------------------------------------------------------------


def test_a_runtime_directory_with_a_path_too_long(runtime_dir: Path) -> None:
    long = runtime_dir / ("x" * 100)
    one_line(refused(long, "a=zero:1M"), FAILED, "too long", "--runtime-dir")
    assert not long.exists()


def test_a_runtime_directory_of_somebody_else(runtime_dir: Path) -> None:
    place = runtime_dir / "theirs"
    place.mkdir()
    os.chown(place, 4711, 4711)
    one_line(refused(place, "a=zero:1M"), FAILED, "belongs to user 4711")
    assert place.stat().st_mode & 0o777 != 0o711


@pytest.mark.leaves_files("of others")
@pytest.mark.parametrize(
    ("mode", "owner", "complaint"),
    [(0o1777, 0, "shared: other users may write"), (0o770, 0, "shared"), (0o755, 4711, "file of user 4711: theirs")],
)
def test_a_runtime_directory_that_is_shared(runtime_dir: Path, mode: int, owner: int, complaint: str) -> None:
    place = runtime_dir / "shared"
    place.mkdir()
    (place / "theirs").touch()
    os.chown(place / "theirs", owner, owner)
    place.chmod(mode)
    one_line(refused(place, "a=zero:1M"), FAILED, complaint, "--runtime-dir")
    assert place.stat().st_mode & 0o7777 == mode and list(place.iterdir()) == [place / "theirs"]


@pytest.mark.leaves_files("ours")
def test_a_runtime_directory_with_other_files_of_ours_keeps_its_mode(runtime_dir: Path) -> None:
    (runtime_dir / "more").touch()
    runtime_dir.chmod(0o750)
    with Service(runtime_dir, "ram0=zero:1M") as service:
        assert runtime_dir.stat().st_mode & 0o777 == 0o750
        assert service.client().do("words(b, [0])") == [0]
    runtime_dir.chmod(0o700)


@pytest.mark.leaves_files("the directories in the way")
@pytest.mark.parametrize("name", ["door", "private/router", "private/custodian", "private/lock"])
def test_a_directory_in_the_place_of_a_socket(runtime_dir: Path, name: str) -> None:
    (runtime_dir / name).mkdir(parents=True)
    one_line(refused(runtime_dir, "a=zero:1M"), FAILED, f"{name}.*directory", re.escape(str(runtime_dir)))
    assert (runtime_dir / name).is_dir()


def test_a_supervisor_that_waits_for_its_source_is_not_missing(runtime_dir: Path) -> None:
    nowhere = runtime_dir / "nowhere"
    with subprocess.Popen(arguments(runtime_dir, (f"a=ipc://{nowhere}/a",), {}), env=environment()) as process:
        try:
            until(lambda: lock_holder(str(runtime_dir / "private/lock")) == process.pid, "it has begun")
            with pytest.raises(NoSupervisor, match=rf"process {process.pid}\) is starting"):
                Control(runtime_dir)
        finally:
            process.terminate()
    with pytest.raises(NoSupervisor, match="no supervisor is running"):
        Control(runtime_dir)


def test_a_runtime_directory_that_cannot_be_made(runtime_dir: Path) -> None:
    parent = runtime_dir / "closed"
    parent.mkdir(mode=0o500)
    command = arguments(parent / "in", ("a=zero:1M",), {})
    one_line(without_rights(command), FAILED, "Permission denied", re.escape(str(parent)))


@pytest.mark.leaves_files("the file in the way")
def test_a_runtime_directory_that_is_a_file_or_a_link(runtime_dir: Path) -> None:
    (runtime_dir / "file").write_text("mine")
    (runtime_dir / "link").symlink_to("/tmp")
    for name in ("file", "link"):
        one_line(refused(runtime_dir / name, "a=zero:1M"), FAILED, "not a directory|Not a directory", name)
    assert (runtime_dir / "file").read_text() == "mine"


def test_a_runtime_directory_that_is_served_already(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        one_line(refused(runtime_dir, "a=zero:1M"), FAILED, "already served", rf"\b{service.pid}\b")
        client = service.client()
        assert client.do(f"check(b, {str(path)!r})") == -1


def test_after_a_crash_of_the_supervisor_its_directory_is_served_again(
    runtime_dir: Path, source_file: SourceFile
) -> None:
    path = source_file(64 * PAGE)
    with Service(runtime_dir, f"ram0={path}") as service:
        client = service.client()
        client.do("words(b, [1])")
        service.process.kill()
        assert service.wait() == -signal.SIGKILL
        people = service.people()
        assert client.do("words(b, [40])") == [word(40 * PAGE)], "workers outlive the supervisor"
        assert (runtime_dir / "door").exists(), "or there is nothing stale to clean"
        with Service(runtime_dir, f"ram0={path}", abandon=True) as second:
            assert second.client().do("words(b, [3])") == [word(3 * PAGE)]
            assert client.do("words(b, [41])") == [word(41 * PAGE)]
        client.close()
        until(lambda: not any(alive(pid) for pid in people), "nobody lives on without clients", END_WITHIN)


# --- rights -----------------------------------------------------------------------------------------------------------


def test_without_permission_for_userfaultfd(runtime_dir: Path, tmp_path: Path) -> None:
    """A namespace of mounts where the device cannot be opened, and no right to the system call."""
    bar = tmp_path / "bar"
    bar.touch(mode=0)
    bar.chmod(0)
    newns, private, bind, ptrace = 0x20000, 1 << 14 | 1 << 18, 1 << 12, 19
    mount = f"""
libc.unshare({newns})
libc.mount(None, b"/", None, {private}, None)
assert libc.mount({os.fsencode(bar)!r}, b"/dev/userfaultfd", None, {bind}, None) == 0
libc.prctl(24, {ptrace})"""
    command = arguments(runtime_dir, ("a=zero:1M",), {})
    one_line(without_rights(command, mount), FAILED, "userfaultfd", "vm.unprivileged_userfaultfd|/dev/userfaultfd")
    assert not (runtime_dir / "door").exists()


# --- a machine that lacks something -----------------------------------------------------------------------------------

NAMESPACE = """
libc.unshare(0x20000)
libc.mount(None, b"/", None, 1 << 14 | 1 << 18, None)
"""
FILTER = """
import struct
code = b"".join(struct.pack("HBBI", *line) for line in (
    (0x20, 0, 0, 0), (0x15, 0, 1, {number}), (0x06, 0, 0, 0x50000 | 38), (0x06, 0, 0, 0x7FFF0000)))
kept = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(kept)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls are those of x86_64")
@pytest.mark.parametrize(
    ("number", "name"), [(319, "memfd"), (290, "eventfd"), (434, "pidfd_open")], ids=lambda one: str(one)
)
def test_without_a_system_call(runtime_dir: Path, number: int, name: str) -> None:
    """A seccomp filter of a container: one line that names what is missing."""
    said = without_rights(arguments(runtime_dir, ("a=zero:1M",), {}), FILTER.format(number=number))
    one_line(said, FAILED, "not implemented", name, "seccomp")


@pytest.mark.parametrize("path", ["/proc", "/dev/null"])
def test_without_a_part_of_the_system(runtime_dir: Path, tmp_path: Path, path: str) -> None:
    barred = tmp_path / "barred"
    barred.mkdir() if path == "/proc" else barred.touch(mode=0)
    mount = f"{NAMESPACE}assert libc.mount({os.fsencode(barred)!r}, {path.encode()!r}, None, 1 << 12, None) == 0"
    one_line(without_rights(arguments(runtime_dir, ("a=zero:1M",), {}), mount), FAILED, path)


@pytest.mark.parametrize("most", [8, 12, 16, 20, 24, 28, 32])
def test_with_few_descriptors(runtime_dir: Path, most: int) -> None:
    """Wherever the start stops, it says why. With a few more it stands."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))"
    blocks = tuple(f"b{number}=zero:1M" for number in range(4))
    one_line(without_rights(arguments(runtime_dir, blocks, {}), limit), FAILED, "Too many open files|descriptors")


def test_in_a_directory_that_is_gone(runtime_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    gone = f"os.chdir({str(place)!r}); os.rmdir({str(place)!r})"
    said = without_rights(arguments(runtime_dir, ("a=handler:pages:make?size=1M",), {}), gone)
    one_line(said, USAGE, "the current directory does not exist")
