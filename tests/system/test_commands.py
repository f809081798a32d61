"""The command line: what it does, what it says, and its exit statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import postcopy
from tests.conftest import SourceFile

PATIENCE = 60.0
SIZE = 2_000_003

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

Run = Callable[..., subprocess.CompletedProcess[bytes]]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "postcopy", *words]


@pytest.fixture
def run(runtime_dir: Path) -> Run:
    """``run(*words) -> CompletedProcess`` with the test's runtime directory."""

    def start(*words: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
        environ = {**os.environ, "POSTCOPY_RUNTIME_DIR": str(runtime_dir)}
        return subprocess.run(command(*words), env=environ, capture_output=True, timeout=PATIENCE, **more)

    return start


@pytest.fixture
def path(source_file: SourceFile) -> Path:
    return source_file(SIZE, seed=4)


@pytest.fixture
def service(runtime_dir: Path, path: Path) -> Iterator[postcopy.Supervisor]:
    with postcopy.Supervisor({"ram0": path}, runtime_dir) as supervisor:
        yield supervisor


def complaint(done: subprocess.CompletedProcess[bytes], status: int) -> str:
    """The one line of an error: nothing on stdout, no traceback, the exit status as wanted."""
    text = done.stderr.decode()
    assert done.returncode == status, text
    assert done.stdout == b""
    assert text.startswith("postcopy")
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["--nonsense"],
        ["status", "--nonsense"],
        ["status", "too", "many"],
        ["status", "--wait", "soon"],
        ["status", "--wait", "-1"],
        ["cat"],
        ["cat", "a/b"],
        ["cat", "ram0", "--offset", "minus"],
        ["cat", "ram0", "--offset", "-4K"],
        ["cat", "ram0", "--length", "99999999999999T"],
        ["cat", "ram0", "--mode", "secret"],
        ["verify", "ram0"],
        ["verify", "ram0", "/etc/passwd", "--sample", "0"],
        ["verify", "ram0", "/etc/passwd", "--sample", "2"],
        ["load", "--clients", "0"],
        ["load", "--clients", "many"],
        ["load", "--pattern", "zigzag"],
        ["load", "--mode", "both"],
        ["load", "--touches", "0"],
        ["demo", "--clients", "0"],
        ["export", "ram0"],
        ["stop", "now"],
        ["status", "--runtime-dir", "/tmp/" + "x" * 200],
        ["--runtime-dir", "/tmp", "serve"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_2(run: Run, words: list[str]) -> None:
    complaint(run(*words), 2)


@pytest.mark.parametrize(
    "words",
    [["status"], ["stop"], ["cat", "ram0"], ["verify", "ram0", "/etc/passwd"], ["load"], ["export", "ram0", "x"]],
    ids=lambda words: words[0],
)
def test_no_supervisor_is_3(run: Run, runtime_dir: Path, words: list[str]) -> None:
    assert str(runtime_dir) in complaint(run(*words), 3)


def test_a_file_that_is_not_there_is_1(run: Run, service: postcopy.Supervisor) -> None:
    for words in (
        ["verify", "ram0", "/no/such/file"],
        ["load", "--verify", "/no/such/file"],
        ["demo", "/no/such/file"],
    ):
        assert "/no/such/file" in complaint(run(*words), 1)


def test_serve_of_wrong_input(run: Run, path: Path) -> None:
    assert run("serve").returncode == 2
    assert run("serve", "ram0").returncode == 2
    assert run("serve", f"ram0={path}", "--page-size", "7").returncode == 2
    assert run("serve", "ram0=/no/such/file").returncode == 1


def test_help_and_version(run: Run) -> None:
    assert run("--version").stdout == f"postcopy {postcopy.__version__}\n".encode()
    general = run("--help")
    assert general.returncode == 0
    assert run().stdout == general.stdout
    for name in ("demo", "serve", "status", "stop", "export", "cat", "verify", "load", "doctor"):
        assert f" {name} ".encode() in general.stdout
        specific = run(name, "--help")
        assert specific.returncode == 0
        assert len(specific.stdout) > 100


# --- status, stop -----------------------------------------------------------------------------------------------------


def test_bash_completes_commands(tmp_path: Path) -> None:
    """The printed script is loaded into a real bash, which completes ``postcopy st``."""
    (tmp_path / "postcopy").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m postcopy "$@"\n')
    (tmp_path / "postcopy").chmod(0o755)
    script = (
        'script=$(postcopy --show-completion) && bash -n <<<"$script" && eval "$script" || exit 9\n'
        "COMP_WORDS=(postcopy st) COMP_CWORD=1; $(complete -p postcopy | sed 's/.*-F \\([^ ]*\\) .*/\\1/') postcopy\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "try.sh").write_text(script)
    shell = ["bash", str(tmp_path / "try.sh")]
    done = subprocess.run(shell, env=environ, capture_output=True, timeout=PATIENCE, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["status", "stop"]), done.stderr


@pytest.mark.parametrize("program", ["serve", "source"])
def test_help_of_programs_shows_defaults_and_hides_what_tests_set(run: Run, program: str) -> None:
    text = " ".join(run(program, "--help").stdout.decode().split())
    assert "(default: info)" in text and "(default: None)" not in text and "(default: [])" not in text
    assert not [option for option in ("backoff", "stable", "start-timeout", "die-with") if f"-{option}" in text]
    if program == "serve":
        assert "else $XDG_RUNTIME_DIR/postcopy, else /run/postcopy" in text and "(default: 60)" in text


def test_status(run: Run, service: postcopy.Supervisor, runtime_dir: Path) -> None:
    with postcopy.attach("ram0", runtime_dir) as block:
        block.ensure(0, 4096)
        document = json.loads(run("status", "--json").stdout)
        assert document["state"] == "running"
        assert document["pid"] == service.pid
        assert document["blocks"][0]["size"] == SIZE
        assert document["clients"][0]["pid"] == os.getpid()
        text = run("status").stdout.decode()
        for word in ("ram0", str(os.getpid()), "private", "running"):
            assert word in text


def test_status_waits(run: Run, runtime_dir: Path, path: Path) -> None:
    begun = time.monotonic()
    complaint(run("status", "--wait", "0.3"), 3)
    assert 0.3 <= time.monotonic() - begun < 10
    environ = {**os.environ, "POSTCOPY_RUNTIME_DIR": str(runtime_dir)}
    words = command("status", "--wait", "30", "--json")
    with (
        subprocess.Popen(words, env=environ, stdout=subprocess.PIPE) as waiting,
        postcopy.Supervisor({"ram0": path}, runtime_dir),
    ):
        output, _ = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == 0
    assert json.loads(output)["state"] == "running"


def test_stop_ends_the_supervisor_and_says_so(run: Run, service: postcopy.Supervisor) -> None:
    done = run("stop")
    assert done.returncode == 0
    assert str(service.pid) in done.stdout.decode()
    assert not Path(f"/proc/{service.pid}/cmdline").read_bytes()  # ended, not yet waited for by us
    complaint(run("stop"), 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_becomes_the_supervisor(run: Run, runtime_dir: Path, path: Path, number: int) -> None:
    words = command("serve", f"ram0={path}", "--runtime-dir", str(runtime_dir))
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        try:
            assert json.loads(run("status", "--wait", "30", "--json").stdout)["pid"] == process.pid
            process.send_signal(number)
            _, log = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert b"ready" in log
    assert process.returncode == 0


def test_a_supervisor_of_another_user_is_not_asked(run: Run, service: postcopy.Supervisor) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    program = "import os, sys, postcopy.queries as c, postcopy.errors as e\nimport zmq\nos.setuid(65534)\n" + (
        "try:\n    c.Control(sys.argv[1])\nexcept e.AttachDenied as error:\n    print('denied')\n"
    )
    words = [sys.executable, "-c", program, service.runtime_dir]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "denied\n", done.stderr


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_cat(run: Run, service: postcopy.Supervisor, path: Path, mode: str) -> None:
    data = path.read_bytes()
    assert run("cat", "ram0", "--mode", mode).stdout == data
    assert run("cat", "ram0", "--offset", "1M", "--length", "5", "--mode", mode).stdout == data[1 << 20 :][:5]
    assert run("cat", "ram0", "--offset", str(SIZE - 3)).stdout == data[-3:]
    assert run("cat", "ram0", "--offset", str(SIZE)).stdout == b""
    complaint(run("cat", "ram0", "--offset", str(SIZE + 1)), 2)
    complaint(run("cat", "ram0", "--length", str(SIZE + 1)), 2)
    complaint(run("cat", "other"), 1)


def test_cat_into_a_pipe_that_closes(run: Run, service: postcopy.Supervisor) -> None:
    words = command("cat", "ram0", "--runtime-dir", service.runtime_dir)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(process.stdout.read(10)) == 10
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE) == 1


def test_status_into_a_pipe_that_is_closed(service: postcopy.Supervisor) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = command("status", "--json", "--runtime-dir", service.runtime_dir)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, timeout=PATIENCE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_verify(run: Run, service: postcopy.Supervisor, path: Path, tmp_path: Path) -> None:
    for more in ([], ["--mode", "shared"], ["--sample", "0.1"]):
        assert run("verify", "ram0", str(path), *more).returncode == 0
    other = bytearray(path.read_bytes())
    other[1_500_000] ^= 1
    other[1_600_000] ^= 1
    (tmp_path / "other").write_bytes(other)
    assert "offset 1500000" in complaint(run("verify", "ram0", str(tmp_path / "other")), 1)
    (tmp_path / "short").write_bytes(other[:-1])
    assert str(SIZE - 1) in complaint(run("verify", "ram0", str(tmp_path / "short")), 1)


def test_export(run: Run, service: postcopy.Supervisor, path: Path, tmp_path: Path) -> None:
    assert run("export", "ram0", "copy", cwd=tmp_path).returncode == 0
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    complaint(run("export", "other", str(tmp_path / "x")), 1)
    complaint(run("export", "ram0", "/no/such/place"), 1)


# --- load, demo, doctor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["random", "sequential", "zipf", "lockstep"])
def test_load(run: Run, service: postcopy.Supervisor, path: Path, pattern: str) -> None:
    words = ["load", "--clients", "3", "--touches", "300", "--mode", "mixed", "--pattern", pattern, "--json"]
    done = run(*words, "--verify", str(path))
    assert done.stderr == b""
    report = json.loads(done.stdout)
    assert report["touches"] == 900
    assert report["wrong"] == 0
    assert report["died"] == []
    assert report["compared"] >= 900 * 4000
    assert [each["mode"] for each in report["each"]] == ["private", "shared", "private"]
    assert 0 < report["latency_us"]["p50"] <= report["latency_us"]["p99"] <= report["latency_us"]["max"]


def test_load_for_people(run: Run, service: postcopy.Supervisor) -> None:
    done = run("load", "--clients", "2", "--touches", "50")
    assert done.returncode == 0
    assert b"100 touches" in done.stdout


def test_load_notices_a_wrong_byte(run: Run, service: postcopy.Supervisor, path: Path, tmp_path: Path) -> None:
    wrong = bytearray(path.read_bytes())
    wrong[5000] ^= 1
    (tmp_path / "wrong").write_bytes(wrong)
    words = ["load", "--clients", "2", "--pattern", "sequential", "--touches", "489", "--json"]  # once each
    done = run(*words, "--verify", str(tmp_path / "wrong"))
    assert done.returncode == 1
    assert json.loads(done.stdout)["wrong"] == 2
    assert b"offset 5000" in done.stderr


@pytest.mark.parametrize("pattern", ["random", "lockstep"])
def test_load_reports_a_killed_client(run: Run, service: postcopy.Supervisor, pattern: str) -> None:
    words = ["load", "--clients", "2", "--touches", "200000", "--pattern", pattern, "--json"]
    words = command(*words, "--runtime-dir", service.runtime_dir)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        victim = until_it_works(process.pid)
        os.kill(victim, signal.SIGKILL)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert b"SIGKILL" in errors
    report = json.loads(output)
    assert len(report["died"]) == 1
    assert [each["state"] for each in report["each"]].count("done") == 1


def until_it_works(pid: int) -> int:
    """A toucher of the load test ``pid`` that has been attached for a while (its worker serves it)."""
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        starters = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
        starter = starters[0] if starters else pid  # the clients are forked by one child of the load test
        children = Path(f"/proc/{starter}/task/{starter}/children").read_text("utf-8").split()
        if len(children) == 2 and all("memfd:" in Path(f"/proc/{child}/maps").read_text() for child in children):
            return int(children[0])
        time.sleep(0.005)
    raise AssertionError("the load test did not begin")


def test_ctrl_c_is_130(service: postcopy.Supervisor) -> None:
    words = command("load", "--clients", "2", "--touches", "100000000", "--runtime-dir", service.runtime_dir)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            until_it_works(process.pid)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()  # a load test that goes on would hold up `with` for ever
    assert (process.returncode, output, errors) == (130, b"", b"")


def test_demo(run: Run, path: Path) -> None:
    done = run("demo", str(path), "--clients", "3")
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert "killed midway" in text
    assert "1 restarted" in text
    assert "equals the file's" in text
    assert text.count("shared") == 1
    assert text.count("private") == 2


def test_demo_of_a_tiny_file_and_of_the_default_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny").write_bytes(b"x")
    assert run("demo", str(tmp_path / "tiny"), "--clients", "1").returncode == 0
    (tmp_path / "empty").touch()
    complaint(run("demo", str(tmp_path / "empty")), 1)
    assert run("demo", "--clients", "2").returncode == 0


def test_doctor(run: Run) -> None:
    done = run("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["ok"] is True
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["kernel"]["found"].startswith(os.uname().release)
    assert "missing_shmem" in checks["userfaultfd"]["found"]
    assert "prctl" in checks["supervisor"]["found"]
    for name in checks:
        assert name.encode() in run("doctor").stdout
