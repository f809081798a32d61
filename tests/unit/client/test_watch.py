"""The watcher's decisions, and the numbers that it has of its own because it imports nothing."""

from __future__ import annotations

import ast
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from postcopy import orphan_watcher
from postcopy.orphan_watcher import FOREVER, LOOK_SECONDS, Watch
from postcopy_kernel import abi
from postcopy_protocol import received_map
from postcopy_supervisor.recovery import watchers
from tests.simulated.effort import effort

events = st.lists(
    st.tuples(
        st.floats(0, 5),
        st.sampled_from(("tick", "orphaned", "served", "worker", "no worker")),
        st.sampled_from((0, 1000, FOREVER)),
    ),
    max_size=30,
)


@effort(60)
@given(events)
def test_it_acts_only_after_the_whole_timeout_without_a_service(history: list[tuple[float, str, int]]) -> None:
    watch, now, lost, timeout, acting, lives = Watch(), 0.0, None, FOREVER, False, False
    for passed, event, policy in history:
        now += passed
        match event:
            case "served":
                watch.served(policy)
                lost, timeout, acting = None, policy, False
            case "orphaned":
                watch.orphaned(now)
                lost = now if lost is None else lost
            case "worker" | "no worker":
                lives = event == "worker"
        begins = watch.tick(now, lambda: lives)  # noqa: B023
        due = lost is not None and timeout != FOREVER and now >= lost + timeout / 1000
        if begins:
            assert due and not acting and not lives, "once, and only where no worker serves the client"
        if due and not lives and not acting and not begins:
            begins = watch.tick(now := now + LOOK_SECONDS, lambda: False)
            assert begins, "it looks again"
        acting = acting or begins
        assert watch.acting == acting
        assert watch.due is None or watch.due > now, "a due time is never in the past: the loop would spin"


def test_its_numbers_are_the_kernels_and_ours() -> None:
    for name in ("WAKE", "CONTINUE", "POISON"):
        assert getattr(orphan_watcher, name) == getattr(abi, f"UFFDIO_{name}")
    assert orphan_watcher.MESSAGE.size == abi.MESSAGE_BYTES and orphan_watcher.PAGEFAULT == abi.EventKind.PAGEFAULT
    assert orphan_watcher.RANGE.format == abi.RANGE_LAYOUT.format
    assert orphan_watcher.RANGE_MODE.format == abi.RANGE_MODE_LAYOUT.format
    assert orphan_watcher.RECEIVED == received_map.RECEIVED and orphan_watcher.LIVES_AT == received_map.LIVES_AT


def test_both_ends_of_the_conversation_mean_the_same() -> None:
    assert watchers.ORDER.format == orphan_watcher.SERVED.format
    assert watchers.POISONED.format == orphan_watcher.POISONED.format
    assert watchers.FOREVER == FOREVER and watchers.INBOX == orphan_watcher.INBOX - 1
    assert watchers.PROGRAM.decode() == Path(orphan_watcher.__file__).name
    assert orphan_watcher.MOST_NOTED * watchers.POISONED.size < watchers.MOST_BYTES


def test_it_imports_only_what_every_python_has() -> None:
    light = {"array", "fcntl", "mmap", "os", "select", "signal", "socket", "struct", "sys", "time"}
    for node in ast.walk(ast.parse(Path(orphan_watcher.__file__).read_text())):
        assert not isinstance(node, ast.ImportFrom) or node.module in ("__future__", "collections.abc")  # for types
        assert not isinstance(node, ast.Import) or {name.name for name in node.names} <= light
