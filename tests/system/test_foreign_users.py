"""A user whom the supervisor does not trust, but lets attach, attacks the bytes of a block: it maps its read-only
descriptor once more, unregistered, and touches holes, which makes zero pages for everybody. No reader may get them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from postcopy.vhost_user.back_end import BackEnd
from tests.conftest import SourceFile
from tests.kernel.huge_pool import reserved
from tests.system.remote import Source
from tests.system.service import PAGE, Puppet, Service, environment, until

STRANGER, OTHER = 65534, 65533
PAGES = 100
HUGE = 2 << 20
ATTACK = """
from postcopy.session import Session
from postcopy.deadline import Deadline
from postcopy_kernel.memory import Mapping, POPULATE_READ, advise
become(65534)
session = Session(directory, Deadline(10))
opened = session.open("ram0", "private", Deadline(10))
stray = Mapping.of(opened.memory, opened.length, writable=False)
def pollute():
    return advise(stray.address, stray.length, POPULATE_READ)
def pollute_on():
    def forever():
        while True:
            pollute()
    for _ in range(2):
        threading.Thread(target=forever, daemon=True).start()
"""
MAKER = """
import os
def make(offset, length):
    with open(os.path.join(os.path.dirname(__file__), "content"), "rb") as file:
        return os.pread(file.fileno(), length, offset)
"""


def stranger(service: Service) -> Puppet:
    puppet = service.client(None)
    puppet.do(ATTACK)
    return puppet


def reader(service: Service, uid: int, mode: str) -> Puppet:
    client = service.client(None)
    if uid:
        client.do(f"become({uid})")
    client.attach("ram0", mode)
    return client


@contextmanager
def served(kind: str, runtime_dir: Path, path: Path, **options: object) -> Iterator[Service]:
    """The bytes of ``path`` as a block of each kind."""
    users = {"allow_uid": [STRANGER, OTHER], "polluting": True, **options}
    if kind == "remote":
        with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **users) as service:  # type: ignore[arg-type]
            yield service
        return
    block = f"ram0={path}"
    if kind == "handler":
        (path.parent / "maker.py").write_text(MAKER)
        (path.parent / "content").write_bytes(path.read_bytes())
        block, users["cwd"] = f"ram0=handler:maker:make?size={path.stat().st_size}", path.parent
    with Service(runtime_dir, block, **users) as service:  # type: ignore[arg-type]
        yield service


KINDS = pytest.mark.parametrize("kind", ["file", "handler", "remote"])


@KINDS
@pytest.mark.parametrize(("uid", "mode"), [(0, "private"), (0, "shared"), (OTHER, "private")])
def test_no_client_gets_a_strangers_zeros(
    runtime_dir: Path, source_file: SourceFile, kind: str, uid: int, mode: str
) -> None:
    path = source_file(PAGES * PAGE)
    path.chmod(0o644)
    with served(kind, runtime_dir, path, background_rate="0") as service:
        early = reader(service, uid, mode)
        assert stranger(service).do("pollute()") == 0
        for client in (early, reader(service, uid, mode)):
            client.do(f"content = bytes.fromhex({path.read_bytes().hex()!r})")
            assert client.do("bytes(b.buf) == content")
        until(lambda: service.status()["totals"]["repaired"] > 0, "the repair is counted")
        assert service.status(audit=True)["totals"]["polluted"] == 0


@KINDS
def test_no_client_gets_zeros_while_a_stranger_goes_on(runtime_dir: Path, source_file: SourceFile, kind: str) -> None:
    path = source_file(PAGES * PAGE)
    with served(kind, runtime_dir, path, fault_around="4K") as service:
        clients = [reader(service, uid, mode) for uid, mode in ((0, "private"), (0, "shared"), (OTHER, "private"))]
        stranger(service).do("pollute_on()")
        for seed, client in enumerate(clients):
            client.do(f"content = bytes.fromhex({path.read_bytes().hex()!r})")
            client.begin(
                f"[at for at in order_of({PAGES * PAGE}, PAGE, 'random', {seed}) "
                "if bytes(b.buf[at : at + PAGE]) != content[at : at + PAGE]]"
            )
        assert [client.answer() for client in clients] == [[], [], []]


def test_what_a_shared_client_writes_stays(runtime_dir: Path, source_file: SourceFile) -> None:
    with served("file", runtime_dir, source_file(PAGES * PAGE)) as service:
        writer, other = reader(service, 0, "shared"), stranger(service)
        assert other.do("pollute()") == 0
        writer.do(f"write(b, {5 * PAGE}, 'abcdef')")
        assert other.do("pollute()") == 0
        assert reader(service, 0, "private").do(f"read(b, {5 * PAGE}, 3)") == "abcdef"


@KINDS
def test_an_export_of_what_a_stranger_polluted(
    runtime_dir: Path, source_file: SourceFile, tmp_path: Path, kind: str
) -> None:
    path, out = source_file(5 * (1 << 20) + 17), tmp_path / "out"
    with served(kind, runtime_dir, path, background_rate="0") as service:
        client = service.client()
        client.do("words(b, [0, 300, 700])")
        assert stranger(service).do("pollute()") == 0
        command = [sys.executable, "-m", "postcopy", "export", "ram0", str(out), "--runtime-dir", str(runtime_dir)]
        done = subprocess.run(command, capture_output=True, timeout=60, env=environment(), check=False)
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == path.read_bytes()


def test_a_block_served_onward(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(PAGES * PAGE)
    first, second = runtime_dir / "a", runtime_dir / "b"
    runtime_dir.chmod(0o711)
    with (
        Service(first, f"ram0={path}", allow_uid=[STRANGER], polluting=True) as service,
        Source("--from", str(first), "ram0") as source,
        Service(second, source.block(), background_rate="0") as onward,
    ):
        assert stranger(service).do("pollute()") == 0
        client = onward.client()
        client.do(f"content = bytes.fromhex({path.read_bytes().hex()!r})")
        assert client.do("bytes(b.buf) == content")


def test_a_back_end(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    """It registers its memory itself, without MINOR; and still no page reaches it unchecked."""
    path, door = source_file(PAGES * PAGE), tmp_path / "door"
    example = Path(__file__).parents[2] / "examples" / "vhost_user_back_end.py"
    with served("file", runtime_dir, path) as service:
        program = subprocess.Popen([sys.executable, str(example), str(door)], stdout=subprocess.PIPE, env=environment())
        try:
            until(door.exists, "it listens")
            assert stranger(service).do("pollute()") == 0
            with BackEnd(door, ["ram0"], runtime_dir, pid=program.pid) as back_end:
                assert program.stdout is not None
                line = program.stdout.readline().decode().split()
                assert line == ["sha256", hashlib.sha256(path.read_bytes()).hexdigest()]
                until(lambda: back_end.complete, "every page is checked")
        finally:
            program.kill()
            program.communicate()


@pytest.mark.hugetlb
@pytest.mark.parametrize("kind", ["file", "remote"])
def test_huge_pages(runtime_dir: Path, source_file: SourceFile, kind: str) -> None:
    path = source_file(2 * HUGE + 4099)
    with reserved(8), served(kind, runtime_dir, path, page_size="2M", background_rate="0") as service:
        client = service.client("ram0", "shared")
        assert stranger(service).do("pollute()") == 0
        assert client.do(f"check(b, {str(path)!r}, 'random', 65536)") == -1


@pytest.mark.parametrize("before", [True, False], ids=["the first", "the second"])
def test_strangers_of_one_of_two_supervisors(runtime_dir: Path, source_file: SourceFile, before: bool) -> None:
    """One supervisor has strangers and the other has none. Descriptors outlive the first, clients are adopted."""
    path = source_file(PAGES * PAGE)
    with Service(
        runtime_dir, f"ram0={path}", fault_around="4K", polluting=True, allow_uid=[STRANGER] if before else []
    ) as service:
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        attacker = stranger(service) if before else None
        service.kill()
        service.recover(allow_uid=[] if before else [STRANGER])
        if attacker is None:
            attacker = stranger(service)
        assert attacker.do("pollute()") == 0
        for client in (*clients, service.client()):
            assert client.do(f"check(b, {str(path)!r}, 'random')") == -1
