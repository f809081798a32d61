"""How commands are started: closed or narrow standard streams, umask, early signals, addresses, files that exist."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Service, arguments, environment, refused, until, word

SIZE = 64 * PAGE
WITHIN = 60.0


def run(*words: str, redirection: str = "", **more: str) -> subprocess.CompletedProcess[bytes]:
    """A command of postcopy by a shell, with a redirection."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "postcopy", *words],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=WITHIN,
        check=False,
    )


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_commands_with_closed_streams(runtime_dir: Path, source_file: SourceFile, redirection: str) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}"):
        for words in (["verify", "ram0", str(path)], ["status"], ["status", "--json"]):
            done = run(*words, "--runtime-dir", str(runtime_dir), redirection=redirection)
            assert (done.returncode, done.stderr) == (0, b""), words
    for words in (["--version"], ["--help"], ["doctor"]):
        assert b"Traceback" not in run(*words, redirection=redirection).stderr
    failed = run("status", "--json", "--runtime-dir", "/tmp/pc-none", redirection="2>&-")
    assert (failed.returncode, failed.stdout) == (3, b""), "an error is not shown where JSON is expected"


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    done = run("--help", redirection="> /dev/full")
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1), done.stderr


def test_serve_with_closed_streams_gives_them_to_nothing(runtime_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "talky.py").write_text(
        "import os, sys\ndef make(offset, length):\n"
        "    print('out'); print('err', file=sys.stderr); os.write(2, b'raw')\n    return b'x' * length\n"
    )
    shell = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "postcopy_supervisor")
    words = ("ram0=handler:talky:make?size=64K", "--runtime-dir", str(runtime_dir))
    process = subprocess.Popen([*shell, *words], cwd=tmp_path, env=environment())
    try:
        directory = ("--runtime-dir", str(runtime_dir))
        assert run("status", "--wait", "30", *directory).returncode == 0
        assert run("cat", "ram0", *directory).stdout == b"x" * (64 << 10)
        for number in (0, 1, 2):
            assert str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) == os.devnull
    finally:
        process.terminate()
        assert process.wait(WITHIN) == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_stdout_cannot_encode(runtime_dir: Path, source_file: SourceFile, encoding: str) -> None:
    path = source_file(SIZE).rename(runtime_dir.parent / f"naïve-文件-{os.getpid()}")
    try:
        with Service(runtime_dir, f"ram0={path}"):
            for words in (["status"], ["status", "--story", "ram0+0"], ["verify", "ram0", str(path)]):
                done = run(*words, "--runtime-dir", str(runtime_dir), PYTHONIOENCODING=encoding)
                assert (done.returncode, done.stderr) == (0, b""), words
                assert b"\\u6587" in done.stdout or words[0] == "verify"
    finally:
        path.unlink()


def test_a_umask_of_0777(tmp_path: Path, source_file: SourceFile) -> None:
    before = os.umask(0o777)
    try:
        with Service(tmp_path / "made" / "rt", f"ram0={source_file(SIZE)}") as service:
            assert service.client().do("words(b, [3])") == [word(3 * PAGE)]
            assert "ERROR" not in service.log()
    finally:
        os.umask(before)


def test_sigterm_while_it_waits_for_a_source_is_an_orderly_end(runtime_dir: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "postcopy_supervisor",
            f"r=ipc://{runtime_dir}/none/r",
            "--runtime-dir",
            str(runtime_dir),
        ],
        env=environment(),
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        assert b"waiting for the source" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_record_keeps_files_that_are_there(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    path = source_file(SIZE)
    before = path.read_bytes()
    status, said = refused(runtime_dir, f"ram0={path}", options={"record": str(path)})
    assert status == 1 and "exists already" in said
    status, said = refused(runtime_dir, f"ram0={path}", options={"record": str(path), "record_overwrite": True})
    assert status == 1 and "no trace" in said
    assert path.read_bytes() == before
    trace = tmp_path / "trace"
    for overwrite in (False, True):
        with Service(runtime_dir, f"ram0={path}", record=str(trace), record_overwrite=overwrite) as service:
            service.client().do("words(b, [0])")
        size = trace.stat().st_size
    assert 0 < size < 4096, "the second one starts again"
    again = tmp_path / "link"
    again.hardlink_to(trace)
    status, said = refused(runtime_dir, f"t={trace}", options={"record": str(again), "record_overwrite": True})
    assert status == 1 and "is served" in said and trace.stat().st_size == size


def test_export_follows_no_link(runtime_dir: Path, source_file: SourceFile, tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    link.symlink_to(victim)
    with Service(runtime_dir, f"ram0={source_file(SIZE)}"):
        done = run("export", "ram0", str(link), "--runtime-dir", str(runtime_dir))
    assert done.returncode == 1 and b"symbolic link" in done.stderr
    assert victim.read_text() == "mine" and link.is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir() if "partial" in entry.name) == []


def free_port(family: int, host: str) -> int:
    with socket.socket(family) as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(("listen", "connect"), [("[::1]", "[::1]"), ("*", "[::1]"), ("*", "127.0.0.1")])
def test_ipv6(runtime_dir: Path, source_file: SourceFile, listen: str, connect: str) -> None:
    try:
        port = free_port(socket.AF_INET6, "::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    path = source_file(SIZE)
    with (
        Source(f"ram0={path}", listen=f"tcp://{listen}:{port}", options=("--plain-tcp",)),
        Service(runtime_dir, f"ram0=tcp://{connect}:{port}/ram0", plain_tcp=True) as service,
    ):
        wanted = hashlib.sha256(path.read_bytes()).hexdigest()
        client = service.client()
        assert client.do(f"check(b, {str(path)!r})") == -1, wanted


def test_addresses_that_are_none(runtime_dir: Path, source_file: SourceFile) -> None:
    for port in ("99999", "65536", "x", ""):
        done = run("source", f"a={source_file(SIZE)}", "--listen", f"tcp://127.0.0.1:{port}", "--plain-tcp")
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done.stderr
    log = runtime_dir.parent / f"log-{os.getpid()}"
    with log.open("wb") as file:
        words = arguments(runtime_dir, ("r=tcp://no.such.host.invalid:7000/r",), {"plain_tcp": True})
        process = subprocess.Popen(words, env=environment(), stderr=file)
        try:
            until(lambda: "no.such.host.invalid is not known" in log.read_text(), "it says what is wrong", WITHIN)
        finally:
            process.terminate()
            assert process.wait(WITHIN) == 0
            log.unlink()
