"""Order and selection of the tests: the longest first, one unit of work after another; ``--fast`` takes a part.

``durations.json`` holds the seconds of the tests that took long in a recorded run (``scripts/test --record``).
A test that is not in it counts as short, so the file need not be complete.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

RECORD = Path(__file__).with_name("durations.json")
LONG = 1.5
"""Seconds from which a test is recorded and is a unit of work of its own."""
LONG_IN_FAST = 4.0
"""Seconds from which the fast run leaves a recorded test out."""

GROUPS = {
    "tests/chaos/": "chaos",
    "tests/attack/": "chaos",
    "tests/kernel/test_hugetlb.py": "hugetlb",
    "tests/system/test_hugepages.py": "hugetlb",
    "tests/system/test_qemu_memory.py": "hugetlb",
    "tests/system/test_benchmarks.py": "benchmarks",
    "tests/unit/test_packaging.py": "packaging",
}
"""Files whose tests run one after another in one process: they share the machine's huge pages or an expensive fixture,
or they measure."""

FILES_TOGETHER = ("tests/unit/", "tests/kernel/", "tests/simulated/")
"""Folders whose short tests are given to a process file by file: asking for each costs more than it takes."""

FAST = (
    "tests/unit/",
    "tests/kernel/",
    "tests/simulated/",
    "tests/wire/test_channel.py",
    "tests/wire/test_door_client.py",
    "tests/wire/test_router.py",
    "tests/wire/test_source.py",
    "tests/wire/test_hostile_door.py",
    "tests/system/test_attach.py::test_every_byte_in_both_modes",
    "tests/system/test_attach.py::test_another_user_is_denied",
    "tests/system/test_attach.py::test_copy_on_write_and_sharing",
    "tests/system/test_client_death.py",
    "tests/system/test_remote.py::test_every_byte",
    "tests/system/test_remote.py::test_each_page_is_asked_for_once_in_lockstep",
    "tests/system/test_restart.py::test_clients_run_on_when_the_supervisor_is_killed",
)
"""What ``--fast`` runs: beginnings of test ids."""
NOT_FAST = ("tests/unit/test_packaging.py", "tests/unit/client/test_load.py", "tests/unit/client/test_top.py")
"""Packaging builds wheels; the other two import matplotlib and textual."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("postcopy")
    group.addoption("--fast", action="store_true", help="a part of the tests that takes little time")
    group.addoption("--record", action="store_true", help="write the seconds of long tests to tests/durations.json")


@cache
def recorded() -> dict[str, float]:
    found: dict[str, float] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return found


def unit_of(test: str) -> str:
    """The unit of work of a test id: the tests of a unit run one after another in one process."""
    path = test.partition("::")[0]
    group = next((group for begin, group in GROUPS.items() if path.startswith(begin)), "")
    if group or test in recorded():
        return group or test
    return path if path.startswith(FILES_TOGETHER) else test


def longest_first(tests: Iterable[str]) -> dict[str, float]:
    """The weight in seconds of each test's unit."""
    weights: dict[str, float] = defaultdict(float)
    tests = list(tests)
    for test in tests:
        weights[unit_of(test)] += recorded().get(test, 0.0)
    return {test: weights[unit_of(test)] for test in tests}


def in_fast(test: str, marks: set[str]) -> bool:
    if "hugetlb" in marks or not test.startswith(FAST) or test.startswith(NOT_FAST):
        return False
    # The long ones of these are hypothesis, which tries fewer examples here.
    return test.startswith(("tests/unit/", "tests/simulated/")) or recorded().get(test, 0.0) < LONG_IN_FAST


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A fast run does not import the files of which it takes nothing: that would be a third of its time."""
    if not config.getoption("fast") or collection_path.suffix != ".py":
        return None
    path = collection_path.relative_to(RECORD.parents[1]).as_posix()
    chosen = any(path.startswith(begin.partition("::")[0]) for begin in FAST)
    return None if chosen and not path.startswith(NOT_FAST) else True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("fast"):
        chosen = [in_fast(item.nodeid, {mark.name for mark in item.iter_markers()}) for item in items]
        config.hook.pytest_deselected(items=[item for item, fast in zip(items, chosen, strict=True) if not fast])
        items[:] = [item for item, fast in zip(items, chosen, strict=True) if fast]
    if hasattr(config, "workerinput"):  # the order of the files is kept where one process runs all
        weights = longest_first(item.nodeid for item in items)
        items.sort(key=lambda item: -weights[item.nodeid])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One unit of work at a time to each process, in the order of the collection.

    The marker ``xdist_group`` is not used: xdist 3.8 does not see it with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class UnitScheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False
    return UnitScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write the record. Tests that did not run keep their seconds."""
    if not config.getoption("record"):
        return
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] += report.duration
    known = {test: spent for test, spent in recorded().items() if test not in seconds}
    known |= {test: round(spent, 1) for test, spent in seconds.items() if spent >= LONG}
    RECORD.write_text(json.dumps(dict(sorted(known.items(), key=lambda one: -one[1])), indent=1) + "\n")
