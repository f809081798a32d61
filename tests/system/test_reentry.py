"""A client that calls itself: finalizers and signal handlers in the middle of an exchange, the interpreter's end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SourceFile
from tests.system.fake_supervisor import PAGE, FakeSupervisor
from tests.system.service import Service, environment

SIZE = 20 * PAGE
WITHIN = 28.0  # less than the 30 s after which a lock is given up

pytestmark = [
    pytest.mark.usefixtures("require_userfaultfd"),
    pytest.mark.leaves_files("the fake supervisor does not tidy up"),
]

HOLDER = """
import gc, os, signal, sys, threading, time
import postcopy, postcopy.session
D = sys.argv[1]
class Holder:
    def __init__(self):
        self.block, self.me = postcopy.attach("ram0", D), self
    def __del__(self):
        self.block.close()
"""


def run(directory: Path, source: Path, code: str) -> subprocess.CompletedProcess[str]:
    with FakeSupervisor(directory, {"ram0": source}):
        return program(directory, code)


def program(directory: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HOLDER + code, str(directory)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=WITHIN,
        check=False,
    )


def assert_quiet(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stderr) == (0, "")


PROGRAMS = {
    "a finalizer closes a block while its thread attaches": """
real = postcopy.session.Session.open
postcopy.session.Session.open = lambda *a, **k: (gc.collect(), real(*a, **k))[1]
gc.disable()
Holder()
with postcopy.attach("ram0", D) as block: block.ensure()
with postcopy.attach("ram0", D) as block: block.ensure()
""",
    "a finalizer closes a block while its thread is refused another": """
real = postcopy.session.Session.open
postcopy.session.Session.open = lambda *a, **k: (gc.collect(), real(*a, **k))[1]
gc.disable()
Holder()
try: postcopy.attach("nothing", D)
except postcopy.NoSuchBlock: pass
with postcopy.attach("ram0", D) as block: block.ensure()
""",
    "a signal handler attaches and closes while its thread attaches": """
real, sent, seen = postcopy.session.Session.open, [], []
def tick(*_):
    with postcopy.attach("ram0", D, timeout=5) as block: block.ensure(); seen.append(block.session)
signal.signal(signal.SIGUSR1, tick)
def opened(*a, **k):
    if not sent: sent.append(1); os.kill(os.getpid(), signal.SIGUSR1)
    return real(*a, **k)
postcopy.session.Session.open = opened
with postcopy.attach("ram0", D) as block:
    block.ensure()
    assert seen and seen[0] is not block.session, "it has a conversation of its own"
""",
    "a finalizer runs at the end of the interpreter": """
holder = Holder()
holder.block.prefetch()
threading.Thread(target=holder.block.ensure, daemon=True).start()
""",
    "the select module has no poll, as under eventlet": """
import select
del select.poll
with postcopy.attach("ram0", D) as block: block.ensure()
""",
    "threads end with what they were for": """
with postcopy.attach("ram0", D) as block:
    block.prefetch()
    block.ensure()
    limit = time.monotonic() + 10
    while threading.active_count() > 1:
        assert time.monotonic() < limit, threading.enumerate()
        time.sleep(0.005)
""",
    "without a descriptor left an attach says so and leaks none": """
import resource
with postcopy.attach("ram0", D): pass
before = len(os.listdir("/proc/self/fd"))
said = set()
for more in range(12):
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + more, 1024))
    try:
        with postcopy.attach("ram0", D) as block: block.ensure()
    except OSError as error: said.add(error.errno)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    assert len(os.listdir("/proc/self/fd")) == before
assert said == {24}, said
""",
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_client_that_calls_itself(runtime_dir: Path, source_file: SourceFile, what: str) -> None:
    assert_quiet(run(runtime_dir, source_file(SIZE), PROGRAMS[what]))


INTERRUPTED = """
import random
class Stop(KeyboardInterrupt): pass
def stop(*_): raise Stop
signal.signal(signal.SIGALRM, stop)
with postcopy.attach("ram0", D): pass
before, times = os.listdir("/proc/self/fd"), random.Random(3)
for _ in range(200):
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, times.uniform(1e-4, 4e-3))
            block = postcopy.attach("ram0", D)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        block.close()
    except Stop: pass
assert os.listdir("/proc/self/fd") == before
"""


def test_an_attach_that_is_interrupted_leaves_no_descriptor(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(SIZE)}"):
        assert_quiet(program(runtime_dir, INTERRUPTED))
