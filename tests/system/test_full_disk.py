"""A disk that is full, under the runtime directory, an export or a key: one clear line, nothing half made is left, and
who works already goes on. Each disk is a small tmpfs of the test's own (root)."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.service import PAGE, Service, environment, refused, until, word
from tests.system.test_export import begin, ended, left

HANGS = "import time\n\ndef hangs(offset, length):\n    time.sleep(3600)\n"


@contextlib.contextmanager
def tmpfs(place: Path, options: str) -> Iterator[Path]:
    """A tmpfs at ``place``, which is made for it."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0755,{options}", "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave no byte and no file to be had."""
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while ballast.write(bytes(PAGE)):
            pass
    with contextlib.suppress(OSError):
        for number in range(1000):
            (disk / f"ballast{number}").mkdir()
    assert shutil.disk_usage(disk).free == 0


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("size=4K", "cannot write private/lock"),
        ("nr_inodes=2", "run/private"),
        ("nr_inodes=3", "cannot make private/lock"),
        ("nr_inodes=4", "private/router"),
        ("nr_inodes=5", "run/door"),
    ],
)
def test_no_room_for_the_runtime_directory(runtime_dir: Path, source_file: SourceFile, options: str, what: str) -> None:
    with tmpfs(runtime_dir / "m", options) as disk:
        if options.startswith("size"):
            (disk / "ballast").write_bytes(bytes(PAGE))
        status, said = refused(disk / "run", f"ram0={source_file(PAGE)}")
        assert status == 1 and "\n" not in said
        assert what in said and "No space left" in said
        assert not [entry for entry in disk.rglob("*") if entry.is_file() and entry.name != "ballast"]


def test_the_disk_of_the_runtime_directory_is_full(runtime_dir: Path, source_file: SourceFile) -> None:
    """Who is there goes on, who comes gets in, a dead worker is replaced, and a dead supervisor too."""
    path = source_file(64 * PAGE)
    with (
        tmpfs(runtime_dir / "m", "size=64K,nr_inodes=64") as disk,
        Service(disk / "run", f"ram0={path}", fault_around="4K") as service,
    ):
        client = service.client()
        fill(disk)
        assert client.do("words(b, [1])") == [word(PAGE)]
        service.kill_worker(client)
        assert client.do("words(b, [2])") == [word(2 * PAGE)]
        assert service.client("ram0", "shared").do("words(b, [3])") == [word(3 * PAGE)]
        service.kill()
        service.recover()
        assert client.do("words(b, [4])") == [word(4 * PAGE)]
        assert service.client().do(f"check(b, {str(path)!r})") == -1


def test_a_source_file_on_a_full_disk(runtime_dir: Path, source_file: SourceFile) -> None:
    with tmpfs(runtime_dir / "m", "size=64K") as disk:
        path = Path(shutil.copy(source_file(8 * PAGE), disk / "source"))
        fill(disk)
        with Service(runtime_dir, f"ram0={path}") as service:
            for mode in ("private", "shared"):
                assert service.client("ram0", mode).do(f"check(b, {str(path)!r})") == -1


def test_no_room_for_an_export(runtime_dir: Path, source_file: SourceFile) -> None:
    """Not a byte, or not a file. An older export of the name stays as it was."""
    path = source_file(1 << 20)
    with tmpfs(runtime_dir / "m", "size=64K,nr_inodes=20") as disk, Service(runtime_dir, f"ram0={path}") as service:
        out = disk / "out"
        out.write_bytes(b"older")
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(PAGE)):
                pass
        job = ended(service, begin(service, out))
        assert job.state == "failed" and "No space left" in job.detail
        fill(disk)
        assert "No space left" in str(service.export(out))
        assert left(disk) == ["out"] and out.read_bytes() == b"older"
        assert service.client().do(f"check(b, {str(path)!r})") == -1


def test_what_a_killed_supervisors_export_left(runtime_dir: Path, tmp_path: Path) -> None:
    """It goes when the next export to the same name begins; what others write, or is no export's, stays."""
    (tmp_path / "pages.py").write_text(HANGS)
    blocks = ("ram0=handler:pages:hangs?size=1M", "ram1=handler:pages:hangs?size=1M")
    kept = ["out.partial-1", "out.partial-1-2-3", "out.partial-x-1"]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / "out.partial-1-1").symlink_to("pages.py")
    with Service(runtime_dir, *blocks, cwd=tmp_path) as service:
        begin(service, tmp_path / "out")
        until(lambda: service.status()["totals"]["faults"], "client zero waits")
        stale = sorted(set(left(tmp_path)) - {*kept, "out.partial-1-1"})
        assert len(stale) == 1
        service.kill()
        service.recover()
        assert stale[0] in left(tmp_path)
        begin(service, tmp_path / "out")
        begin(service, tmp_path / "out", "ram1")
        now = sorted(set(left(tmp_path)) - {*kept, "out.partial-1-1"})
        assert len(now) == 2 and stale[0] not in now, "two that are being written"
        for job in (1, 2):
            service.progress(job, cancel=True)
            assert ended(service, job).state in ("cancelled", "failed"), "one hung function takes the other along"
        assert left(tmp_path) == sorted([*kept, "out.partial-1-1"])
        assert (tmp_path / "pages.py").read_text() == HANGS


def test_keeping_the_workers_cancels_an_export(runtime_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "pages.py").write_text(HANGS)
    with Service(runtime_dir, "ram0=handler:pages:hangs?size=1M", cwd=tmp_path) as service:
        begin(service, tmp_path / "out")
        until(lambda: service.status()["totals"]["faults"], "client zero waits")
        service.stop(keep_workers=True)
        assert service.wait() == 0
        assert left(tmp_path) == []
        service.recover()


@pytest.mark.parametrize("options", ["size=4K", "size=8K", "nr_inodes=1", "nr_inodes=2"])
def test_no_room_for_keys(tmp_path: Path, options: str) -> None:
    with tmpfs(tmp_path / "m", options) as disk:
        if options.startswith("size"):
            (disk / "ballast").write_bytes(bytes(PAGE))
        command = [sys.executable, "-m", "postcopy", "keygen", str(disk / "pair")]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "No space left" in done.stderr and "Traceback" not in done.stderr
        assert not list(disk.glob("pair*")), "no half pair"
