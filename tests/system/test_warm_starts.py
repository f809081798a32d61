"""Programs that start warm behave as those that are started otherwise, and are warm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system import zygote
from tests.system.service import Puppet, Service, environment

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

WARM = not os.environ.get("POSTCOPY_TEST_COLD")


def test_a_child_with_all_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(processors)})
    try:
        puppet = Puppet(tmp_path, POSTCOPY_RUNTIME_DIR="/elsewhere")
    finally:
        os.sched_setaffinity(0, processors)
    assert (puppet.pid in zygote.sessions) == WARM
    assert puppet.do("[os.getppid(), directory, len(os.sched_getaffinity(0))]") == [os.getpid(), str(tmp_path), 1]
    assert puppet.do("os.environ['POSTCOPY_RUNTIME_DIR']") == "/elsewhere"
    assert puppet.do("os.environ['POSTCOPY_TEST_ID']") == os.environ["POSTCOPY_TEST_ID"]
    assert puppet.do("sorted(map(int, os.listdir('/proc/self/fd')))")[:3] == [0, 1, 2]
    puppet.kill()
    assert puppet.status() == -signal.SIGKILL
    puppet.close()


def test_descriptors_output_and_status() -> None:
    reader, writer = os.pipe()
    words = [sys.executable, "-m", "postcopy_sources", "ram0=/", "--listen", "ipc:///tmp/none"]
    done = subprocess.run(words, pass_fds=[writer], capture_output=True, text=True, env=environment(), timeout=60)
    os.close(writer)
    assert os.read(reader, 1) == b"", "the program's copy is closed"
    os.close(reader)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("postcopy source: "), done


def test_next_to_nothing_is_imported_late(runtime_dir: Path, source_file: SourceFile) -> None:
    """Otherwise each start pays for it: see ``IMPORTED``."""
    with Service(runtime_dir, f"ram0={source_file(8192)}") as service:
        client = service.client(None)
        client.do("before = set(sys.modules)")
        client.attach()
        client.do("read(b, 0, 8)")
        late = client.do("sorted(set(sys.modules) - before)")
        assert not WARM or len(late) < 5, late
