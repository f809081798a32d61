"""What ``import postcopy`` brings and what it does not: a light client."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest

import postcopy
from postcopy import errors, vhost_user
from postcopy_protocol.errors import PostcopyError
from postcopy_protocol.errors import UserfaultfdUnavailable as ProtocolUnavailable

HEAVY = ("typer", "rich", "zmq", "numpy", "prctl", "ctypes", "multiprocessing", "asyncio", "subprocess")
NEVER_FOR_A_CLIENT = ("typer", "rich", "zmq", "numpy", "prctl", "multiprocessing", "asyncio", "subprocess")


def loaded_by(program: str, modules: tuple[str, ...]) -> list[str]:
    """Those of ``modules`` that are loaded after ``program``."""
    code = f"{program}\nimport sys\nprint(*[name for name in {modules!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


def test_importing_the_package_loads_next_to_nothing() -> None:
    assert loaded_by("import postcopy", HEAVY) == []
    assert loaded_by("import typer", ("typer",)) == ["typer"]  # the test itself can fail


def test_a_client_loads_no_daemon_and_no_command_line() -> None:
    assert loaded_by("import postcopy\npostcopy.attach\npostcopy.Block\npostcopy.PageLost", NEVER_FOR_A_CLIENT) == []


def test_the_public_names() -> None:
    assert set(postcopy.__all__) == {
        *("attach", "Block", "BlockInfo", "Supervisor", "blocks", "explain_sigbus"),
        *("PostcopyError", "NoSupervisor", "NoSuchBlock", "AttachDenied", "AttachTimeout", "PageLost"),
        *("UserfaultfdUnavailable", "BadInput", "BadMessage", "BadVersion", "PageTimeout"),
    }
    for name in postcopy.__all__:
        assert name in dir(postcopy)
        assert getattr(postcopy, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        postcopy.nonsense  # noqa: B018


NO_EXCEPTIONS = ("attach", "Block", "BlockInfo", "Supervisor", "blocks", "explain_sigbus")


@pytest.mark.parametrize("name", [name for name in postcopy.__all__ if name not in NO_EXCEPTIONS])
def test_every_exception_is_a_postcopy_error_and_shows_where_users_find_it(name: str) -> None:
    kind = getattr(postcopy, name)
    assert issubclass(kind, PostcopyError)
    assert (kind.__module__, kind.__qualname__) == ("postcopy", name)
    assert type(pickle.loads(pickle.dumps(kind("why")))) is kind


@pytest.mark.parametrize("name", ["BackEndGone", "BackEndTimeout", "VhostUserError"])
def test_exceptions_of_vhost_user_are_found_beside_it(name: str) -> None:
    kind = getattr(vhost_user, name)
    assert issubclass(kind, PostcopyError) and kind.__module__ == "postcopy.vhost_user"


def test_a_userfaultfd_that_is_not_to_be_had() -> None:
    error = errors.unavailable(PermissionError(1, "ask the administrator"))
    assert isinstance(error, ProtocolUnavailable)
    assert isinstance(error, OSError)
    assert (error.errno, str(error)) == (1, "ask the administrator")


def test_a_lost_page_survives_its_pickle() -> None:
    error = pickle.loads(pickle.dumps(postcopy.PageLost("gone", block="ram0", offset=4096)))
    assert (str(error), error.block, error.offset) == ("gone", "ram0", 4096)


@pytest.mark.parametrize("letters", [10, 100_000])
def test_output_that_nobody_reads_is_no_second_error(letters: int) -> None:
    """A pipe that breaks in the middle leaves a full buffer behind, which Python would try to write at its exit."""
    reader, writer = os.pipe()
    os.close(reader)
    program = f"import postcopy.__main__ as m\nm._run = lambda words: print('x' * {letters})\nm.main()"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, timeout=60, env=environ)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_serve_without_the_extra_is_one_line() -> None:
    program = (
        "import sys\nimport importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'postcopy_supervisor' else find(name, *more)\n"
        "sys.argv = ['postcopy', 'serve', 'ram0=x']\nimport postcopy.__main__ as m\nm.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "postcopy: serve needs postcopy_supervisor: pip install 'postcopy[supervisor]'\n"
