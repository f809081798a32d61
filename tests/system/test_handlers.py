"""Handler blocks: a user's function makes the pages, in each client's worker; what it does wrong hurts that client."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import postcopy
from tests.system.service import PAGE, Puppet, PuppetError, Service, called, end_by_pidfd, refused, until, word

MODULE = """
import asyncio, ctypes, os, struct, sys, time
from postcopy_protocol.errors import PageLost

def good(offset, length):
    data = b"".join(struct.pack("<Q", at // 8) for at in range(offset // 8 * 8, offset + length, 8))
    return data[:length]

def mixed(offset, length):
    first, last = offset // 4096, (offset + length - 1) // 4096
    for page in range(first, last + 1):
        if page in BAD and (length <= 4096 or page not in (10, 18, 19)):
            return BAD[page](offset, length)
    return good(offset, length)

def raises(offset, length): raise ValueError("no such page, sorry")
def lost(offset, length): raise PageLost("gone for good")
def interrupted(offset, length): raise KeyboardInterrupt
def exits(offset, length): sys.exit(3)
def cancelled(offset, length): raise asyncio.CancelledError
class Odd(Exception):
    def __str__(self): raise ValueError("no text")
class OddLost(PageLost):
    __str__ = Odd.__str__
def odd(offset, length): raise Odd
def surrogate(offset, length): raise ValueError("caf\\udce9 \\x1b[31m")
def long_text(offset, length): raise ValueError("x" * 10_000_000)
def odd_lost(offset, length): raise OddLost("x")
def forks(offset, length):
    if os.fork() == 0: sys.exit(0)
    os.wait()
    return good(offset, length)
def child_returns(offset, length):
    child = os.fork()
    if child: os.waitpid(child, 0)
    return good(offset, length)
def hangs(offset, length): time.sleep(3600)
def ends(offset, length): os._exit(3)
def crashes(offset, length): return ctypes.string_at(0)
def slow(offset, length):
    time.sleep(0.4)
    return good(offset, length)

BAD = {
    10: lambda offset, length: None, 11: lost, 12: lambda offset, length: PageLost("told, not raised"), 13: raises,
    14: lambda offset, length: b"short", 15: lambda offset, length: bytes(length + 1),
    16: lambda offset, length: "text" * (length // 4), 17: lambda offset, length: 5,
    18: lambda offset, length: bytearray(good(offset, length)),
    19: lambda offset, length: memoryview(good(offset, length)), 20: interrupted, 21: exits,
    22: cancelled, 23: odd, 24: surrogate, 25: long_text, 26: odd_lost, 27: forks, 28: child_returns,
    30: hangs, 31: ends, 32: crashes, 33: slow,
}
"""
PAGES = 64
LOST = (11, 12)
LOST_WORDS = ("gone for good", "told, not raised")
FAILED = (13, 14, 15, 16, 17, 20, 21, 22, 23, 24, 25)
BAD = (*LOST, *FAILED, 26, 27, 28, 30, 31, 32, 33)


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """The directory that the supervisor is started in: it holds the module ``pages``."""
    (tmp_path / "pages.py").write_text(MODULE)
    return tmp_path


def source(function: str, size: int = PAGES * PAGE) -> str:
    return f"ram0=handler:pages:{function}?size={size}"


def told(service: Service, kind: str, words: tuple[str, ...]) -> bool:
    """Do the events of this kind say all that? A report comes a moment after the client has been answered."""
    said = " ".join(service.events(kind))
    return all(word in said for word in words)


def kind_of(client: Puppet, page: int) -> str:
    """What ``ensure`` says of a page: its error, or nothing."""
    try:
        client.do(f"b.ensure({page * PAGE}, 1, 20)")
    except PuppetError as error:
        return error.kind
    return ""


@pytest.mark.parametrize("mode", ["private", "shared"])
@pytest.mark.parametrize("size", [1, PAGE + 5, 3 << 20])
def test_every_byte_is_the_functions(runtime_dir: Path, module: Path, tmp_path: Path, size: int, mode: str) -> None:
    wanted = tmp_path / "wanted"
    wanted.write_bytes(b"".join(at.to_bytes(8, "little") for at in range(-(-size // 8)))[:size])
    with Service(runtime_dir, source("good", size), cwd=module) as service:
        client, other = service.client("ram0", mode), service.client("ram0", mode)
        for seed, one in enumerate((client, other)):
            one.begin(f"check(b, {str(wanted)!r}, 'random', 4096, {seed})")
        assert [client.answer(), other.answer()] == [-1, -1]
        assert client.do("behind(b)") == ""
        block = service.block()
        assert (block["size"], block["kind"]) == (size, "local")
        service.await_received(block["pages"])


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_what_a_function_may_give_and_what_not(runtime_dir: Path, module: Path, mode: str) -> None:
    with Service(runtime_dir, source("mixed"), cwd=module, fault_around="4K") as service:
        client = service.client("ram0", mode)
        assert client.do("words(b, [9, 18, 19])") == [word(page * PAGE) for page in (9, 18, 19)]
        assert client.do("words(b, [10])") == [0]
        assert client.do(f"any(b.buf[{10 * PAGE}:{11 * PAGE}])") is False
        for page in (*LOST, *FAILED):
            assert kind_of(client, page) == "PageLost", page
        assert service.block()["lost"] == len(LOST)
        for kind, words in (
            (
                "handler-failed",
                ("no such page, sorry", "5 bytes", "str", "int", "SystemExit: 3", "Odd: (its text cannot be made)"),
            ),
            ("lost", LOST_WORDS),
        ):
            until(partial(told, service, kind, words), f"all that was {kind} is told")
        other = service.client("ram0", mode)
        other.begin("words(b, [13])")
        assert other.status() == -signal.SIGBUS
        assert client.do("words(b, [1, 63])") == [word(PAGE), word(63 * PAGE)]
        assert service.status()["totals"]["restarts"] == 0, "nothing of this ends a worker"


def test_a_child_of_a_function_serves_nobody(runtime_dir: Path, module: Path) -> None:
    """A function forks; the child returns, or ends by an exception. Only its parent goes on as a worker."""
    with Service(runtime_dir, source("mixed"), cwd=module, fault_around="4K") as service:
        client = service.client()
        assert client.do("words(b, [27, 28, 29])") == [word(page * PAGE) for page in (27, 28, 29)]
        assert kind_of(client, 26) == "PageLost"
        assert len([pid for pid in service.people() if called(pid).startswith("postcopy-w")]) == 1
        assert not service.events("handler-failed") and service.status()["totals"]["restarts"] == 0


def test_each_failure_is_reported_also_when_its_client_leaves_at_once(runtime_dir: Path, module: Path) -> None:
    with Service(runtime_dir, source("mixed"), cwd=module, fault_around="4K") as service:
        for count in range(1, 9):
            client = service.client()
            client.begin("words(b, [13])")
            assert client.status() == -signal.SIGBUS
            until(partial(reported, service, count), "it is reported once")
        assert all("no such page, sorry" in text for text in service.events("handler-failed"))


def reported(service: Service, count: int) -> bool:
    return len(service.events("handler-failed")) == count


def test_a_report_that_a_worker_cannot_send(runtime_dir: Path, module: Path) -> None:
    """The worker is stopped before it sends, or killed: what it has counted is reported at its client's end."""
    with Service(runtime_dir, source("mixed"), cwd=module, fault_around="4K") as service:
        client = service.client()
        worker = service.worker(client)
        (runtime_dir / "private" / "router").unlink()  # its successor cannot send a word
        end_by_pidfd(worker, signal.SIGKILL, "postcopy-w")
        client.begin("words(b, [13])")
        assert client.status() == -signal.SIGBUS
        until(lambda: service.events("handler-failed"), "it is reported")
        assert len(service.events("handler-failed")) == 1


def test_fault_around_over_bad_pages_loses_no_good_one(runtime_dir: Path, module: Path) -> None:
    """A window that a bad page spoils is answered page by page."""
    with Service(runtime_dir, source("mixed", 20 * PAGE), cwd=module, fault_around="64K") as service:
        client = service.client()
        good = [page for page in range(20) if page not in BAD and page != 10]
        assert client.do(f"words(b, {good})") == [word(page * PAGE) for page in good]
        assert [kind_of(client, page) for page in LOST] == ["PageLost"] * 2


@pytest.mark.parametrize("page", [31, 32], ids=["os._exit", "segmentation fault"])
@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_function_that_ends_its_worker(runtime_dir: Path, module: Path, page: int, mode: str) -> None:
    with Service(runtime_dir, source("mixed"), cwd=module, fault_around="4K", failing=True) as service:
        victim, other = service.client("ram0", mode), service.client("ram0", mode)
        assert victim.do("words(b, [2])") == [word(2 * PAGE)]
        victim.begin(f"b.ensure({page * PAGE}, 1, 30)")
        for good in range(40, PAGES):
            assert other.do(f"words(b, [{good}])") == [word(good * PAGE)]
        with pytest.raises(PuppetError) as told:
            victim.answer()
        assert told.value.kind == "PageLost"
        assert victim.do("words(b, [2, 50])") == [word(2 * PAGE), word(50 * PAGE)], "what is there stays"
        assert service.record(other)["state"] == "running" and service.record(other)["restarts"] == 0
        assert other.do("words(b, [3])") == [word(3 * PAGE)]
        fresh = service.client("ram0", mode)
        assert fresh.do("words(b, [4])") == [word(4 * PAGE)], "quarantine is that client's, not the block's"


def test_a_function_that_hangs_is_killed_and_others_go_on(runtime_dir: Path, module: Path) -> None:
    # The import of the function must end within that time too, on a busy machine.
    options: dict[str, Any] = {"handler_timeout": 6.0, "restart_limit": 1}
    with Service(runtime_dir, source("mixed"), cwd=module, fault_around="4K", **options) as service:
        victim, other = service.client(), service.client("ram0", "shared")
        before = service.worker(victim)
        victim.begin(f"b.ensure({30 * PAGE}, 1, 60)")
        for good in range(40, PAGES):
            assert other.do(f"words(b, [{good}])") == [word(good * PAGE)]
        until(lambda: service.events("watchdog"), "the watchdog speaks", 40)
        until(lambda: service.worker(victim) != before, "the worker is replaced", 40)
        with pytest.raises(PuppetError) as told:
            victim.answer(45)
        assert told.value.kind == "PageLost"
        assert service.record(victim)["state"] == "quarantined"
        assert service.record(other)["restarts"] == 0


def test_a_hanging_function_and_a_client_that_is_killed(runtime_dir: Path, module: Path) -> None:
    with Service(runtime_dir, source("mixed"), cwd=module, fault_around="4K") as service:
        victim, other = service.client(), service.client()
        victim.begin(f"words(b, [{30}])")
        until(lambda: service.record(victim)["faults"], "it waits in the function")
        victim.kill()
        until(partial(forgotten, service, victim), "the client is gone within a second, where there is time", 5)
        assert other.do("words(b, [1])") == [word(PAGE)]


def forgotten(service: Service, client: Puppet) -> bool:
    return not service.record(client)


def test_a_slow_function_holds_up_its_own_client_only(runtime_dir: Path, module: Path) -> None:
    with Service(runtime_dir, source("mixed"), cwd=module, fault_around="4K") as service:
        waiting, other = service.client(), service.client()
        began = time.monotonic()
        waiting.begin("words(b, [33])")
        for page in range(5):
            assert other.do(f"words(b, [{page}])") == [word(page * PAGE)]
        assert not waiting.answered() or time.monotonic() - began > 0.4
        assert waiting.answer() == [word(33 * PAGE)]


@pytest.mark.parametrize(
    ("detail", "why"),
    [
        ("nowhere:make", "No module named 'nowhere'"),
        ("pages:nothing", "pages.py has no function nothing"),
        ("pages:PAGES", "has no function PAGES"),
        ("broken:make", "SyntaxError"),
        ("exits:make", "SystemExit: 3"),
        ("ends:make", "status 3"),
        ("hangs:make", "--handler-timeout"),
    ],
)
def test_serve_with_a_module_that_cannot_be_imported(runtime_dir: Path, module: Path, detail: str, why: str) -> None:
    """One line, before it is ready: no client waits for pages that cannot come."""
    (module / "broken.py").write_text("def make(:\n")
    (module / "exits.py").write_text("import sys\nprint('printed')\nsys.exit(3)\n")
    (module / "ends.py").write_text("import os\nos._exit(3)\n")
    (module / "hangs.py").write_text("import time\ntime.sleep(3600)\n")
    blocks = (f"ram0=handler:{detail}?size=1M", "ram1=handler:pages:good?size=1M")
    status, said = refused(runtime_dir, *blocks, options={"handler_timeout": 3.0}, cwd=module)
    assert (status == 1 and why in said and str(module) in said) or "timeout" in why
    assert said.count("\n") == said.count("printed"), said


def test_where_an_import_fails_is_shown_on_request(
    runtime_dir: Path, module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (module / "broken.py").write_text("def helper():\n    1 / 0\nhelper()\n")
    block = "ram0=handler:broken:make?size=1M"
    status, said = refused(runtime_dir, block, cwd=module)
    assert status == 1 and "ZeroDivisionError: division by zero (POSTCOPY_TRACEBACK=1 shows where)" in said
    monkeypatch.setenv("POSTCOPY_TRACEBACK", "1")
    status, said = refused(runtime_dir, block, cwd=module)
    assert status == 1 and 'broken.py", line 2, in helper' in said and "importlib" not in said
    assert "cannot import broken:make: ZeroDivisionError" in said.splitlines()[-1]


def test_a_module_that_cannot_be_imported_any_more(runtime_dir: Path, module: Path) -> None:
    (module / "moved.py").write_text("from pages import good\n")
    blocks = ("ram0=handler:moved:good?size=1M", "ram1=handler:pages:good?size=1M")
    with Service(runtime_dir, *blocks, cwd=module) as service:
        (module / "moved.py").unlink()
        client = service.client()
        client.attach("ram1", "shared", "c")
        assert kind_of(client, 3) == "PageLost"
        assert client.do("words(c, [3])") == [word(3 * PAGE)], "the same worker serves its other block"
        until(partial(told, service, "handler-failed", ("moved",)), "it is reported")
        assert service.status()["totals"]["restarts"] == 0


def test_a_module_of_that_name_elsewhere_comes_first(runtime_dir: Path, module: Path) -> None:
    """The directory of serve is the last on the path: what is in it replaces no module of Python's or ours."""
    for name in ("random", "queue", "numpy", "msgpack", "prctl", "postcopy_workers", "sitecustomize"):
        (module / f"{name}.py").write_text(
            f"open({str(module / 'loaded')!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        )
    program = (sys.executable, "-P", "-m", "postcopy", "serve", source("good"), "--runtime-dir", str(runtime_dir))
    with subprocess.Popen(program, cwd=module, stderr=subprocess.DEVNULL) as serve:
        try:
            until(lambda: (runtime_dir / "door").exists(), "it serves")
            with postcopy.attach("ram0", runtime_dir) as block:
                assert struct.unpack_from("<Q", block.buf, PAGE) == (word(PAGE),)
        finally:
            serve.terminate()
    assert not (module / "loaded").exists(), (module / "loaded").read_text()


def test_what_a_function_prints_is_in_the_log(runtime_dir: Path, module: Path) -> None:
    """In events, with escapes and in bounds; what its programs print as it is."""
    (module / "prints.py").write_text(
        "import os, subprocess, sys\n"
        "def make(offset, length):\n"
        "    if offset == 0: print('from stdout\\x1b[31m'); print('from stderr', file=sys.stderr)\n"
        "    if offset == 0: print('x' * 100_000)\n"
        "    if offset == 4096: subprocess.run(['echo', 'from a program'])\n"
        "    if offset == 8192: [print(f'line {n}') for n in range(10_000)]\n"
        "    if offset == 12288: sys.stdout.buffer.write(b'raw bytes\\n'); sys.stdout.flush()\n"
        "    return bytes(length)\n"
    )
    with Service(runtime_dir, "ram0=handler:prints:make?size=16K", cwd=module, fault_around="4K") as service:
        client = service.client()
        assert client.do("[b.buf[at] for at in range(0, 16384, 4096)]") == [0] * 4
        until(lambda: len(service.events("handler-output")) > 5, "it is in the events")
        until(lambda: "from a program" in service.log(), "and in the log")
        found = service.events("handler-output")
        assert any("from stdout\\x1b[31m" in text for text in found) and any("from stderr" in text for text in found)
        assert len(found) < 40 and max(map(len, found)) < 2000
        assert "\x1b" not in service.log() and len(service.log()) < 50_000


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_page_that_failed_for_one_client_is_healed_when_the_block_is_whole(
    runtime_dir: Path, module: Path, mode: str
) -> None:
    """The poison is in that client's page table: another client's better luck with the function must reach it."""
    (module / "moody.py").write_text(
        "import os, pages\n"
        "def make(offset, length):\n"
        "    if offset == 3 * 4096 and not os.path.exists('mended'): raise OSError('not today')\n"
        "    return pages.good(offset, length)\n"
    )
    with Service(runtime_dir, "ram0=handler:moody:make?size=256K", cwd=module, fault_around="4K") as service:
        client = service.client("ram0", mode)
        assert kind_of(client, 3) == "PageLost"
        assert service.record(client)["denied"] == 1
        (module / "mended").touch()
        other = service.client("ram0", mode)
        assert other.do("words(b, range(64))") == [word(page * PAGE) for page in range(64)]
        until(lambda: service.record(client)["released"] == ["ram0"], "the block is whole")
        assert client.do("words(b, range(64))") == [word(page * PAGE) for page in range(64)]
        until(lambda: service.record(client)["denied"] == 0, "nothing is denied any more")
