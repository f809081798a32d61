"""``postcopy source``, ``postcopy keygen`` and the example of docs/sources.md, as a person uses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import zmq.auth

from postcopy_protocol.curve_keys import KeyPair, read_keys, write_keys
from postcopy_protocol.errors import BadInput
from tests.conftest import SourceFile
from tests.wire.scripted import PAGE, ROOT, ScriptedSupervisor, SourceProgram, environment

EXAMPLE = (ROOT / "docs" / "sources.md").read_text("utf-8").split("```python\n")[1].split("```")[0]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "postcopy", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())


def test_the_example_does_what_it_says(tmp_path: Path, runtime_dir: Path) -> None:
    program = tmp_path / "numbers.py"
    program.write_text(EXAMPLE)
    endpoint = f"ipc://{runtime_dir}/source"
    code = [line for line in EXAMPLE.splitlines() if line.strip()]
    assert len(code) <= 20
    with SourceProgram(endpoint, program=(str(program),)), ScriptedSupervisor(endpoint) as supervisor:
        advised = supervisor.listen("numbers")
        found = supervisor.fetch(advised, (12 * PAGE, 3 * PAGE))
        assert found.pop(13 * PAGE) == "page 13 cannot be supplied"
        for offset, data in found.items():
            assert isinstance(data, bytes)
            assert [int.from_bytes(data[at : at + 8], "little") for at in (0, 8, 4088)] == [
                offset // 8,
                offset // 8 + 1,
                offset // 8 + 511,
            ]


def test_source_becomes_the_program(source_file: SourceFile, runtime_dir: Path) -> None:
    endpoint = f"ipc://{runtime_dir}/source"
    words = ("source", f"ram0={source_file(5000)}", "--listen", endpoint)
    with SourceProgram(*words, program=("-m", "postcopy")), ScriptedSupervisor(endpoint) as supervisor:
        assert supervisor.advise("ram0").size == 5000


def test_source_of_wrong_input() -> None:
    for words in ([], ["ram0"], ["ram0=/etc/hostname"], ["ram0=/etc/hostname", "--listen", "nowhere"]):
        done = run("source", *words)
        assert done.returncode == 2, done
        assert done.stderr.count("\n") == 1
    assert run("source", "--help").stdout.startswith("usage: postcopy source")


def test_keygen_makes_a_pair_that_others_read_too(tmp_path: Path) -> None:
    done = run("keygen", str(tmp_path / "here"))
    assert done.returncode == 0, done
    public, secret = tmp_path / "here.key", tmp_path / "here.key_secret"
    assert str(public) in done.stdout and str(secret) in done.stdout
    assert (public.stat().st_mode & 0o777, secret.stat().st_mode & 0o777) == (0o644, 0o600)
    keys = read_keys(secret.read_text(), str(secret), secret=True)
    assert zmq.auth.load_certificate(secret) == (keys.public, keys.secret)
    assert zmq.auth.load_certificate(public) == (keys.public, None)
    assert keys.secret.decode() not in public.read_text() + done.stdout + repr(keys)
    assert zmq.curve_public(keys.secret) == keys.public


def test_keygen_never_writes_over_a_key(tmp_path: Path) -> None:
    assert run("keygen", str(tmp_path)).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"postcopy.key", "postcopy.key_secret"}
    done = run("keygen", str(tmp_path / "postcopy.key"))
    assert done.returncode == 1 and "exists already" in done.stderr
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "half.key").touch()
    assert run("keygen", str(tmp_path / "half")).returncode == 1
    assert not (tmp_path / "half.key_secret").exists(), "no half pair"
    done = run("keygen", str(tmp_path / "no" / "where"))
    assert done.returncode == 1 and f"make the directory {tmp_path / 'no'} first" in done.stderr


def test_key_files_of_pyzmq_are_read(tmp_path: Path) -> None:
    public, secret = zmq.auth.create_certificates(tmp_path, "theirs")
    text = Path(secret).read_text()
    assert read_keys(text, secret, secret=True) == KeyPair(*zmq.auth.load_certificate(secret))  # type: ignore[arg-type]
    assert read_keys(Path(public).read_text(), public, secret=False).secret == b""
    assert read_keys(text, secret, secret=False).secret == b"", "what is not wanted is not kept"


@pytest.mark.parametrize("text", ["", "curve\n", 'public-key = "x"', 'curve\n    public-key = "' + "x" * 41 + '"\n'])
def test_what_is_no_key_file(text: str) -> None:
    with pytest.raises(BadInput, match="here"):
        read_keys(text, "here", secret=False)


def test_a_public_file_has_no_secret() -> None:
    keys = KeyPair(*zmq.curve_keypair())
    assert read_keys(write_keys(keys), "here", secret=True) == keys
    public = write_keys(KeyPair(keys.public))
    assert keys.secret.decode() not in public
    with pytest.raises(BadInput, match="no secret key"):
        read_keys(public, "here", secret=True)
