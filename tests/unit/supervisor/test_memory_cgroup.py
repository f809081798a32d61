"""Memory limits of cgroups: where they are, and what they leave."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy_supervisor import memory_budget
from postcopy_supervisor.memory_budget import MemoryBudget, SteadySupply, Supply, supply_of
from postcopy_supervisor.memory_cgroup import (
    UNLIMITED,
    MemoryCgroup,
    cgroups_of,
    left_in,
    memory_cgroups,
    own_cgroups,
)
from postcopy_supervisor.paging.flow_control import FlowControl, RangeRequest

MB = 1 << 20
HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def paths(cgroup: str, mountinfo: str) -> list[tuple[int, str]]:
    return [(one.version, one.path) for one in memory_cgroups(cgroup, mountinfo)]


def test_all_ancestors_of_version_2() -> None:
    assert paths("0::/system.slice/postcopy.service\n", V2) == [
        (2, "/sys/fs/cgroup/system.slice/postcopy.service"),
        (2, "/sys/fs/cgroup/system.slice"),
        (2, "/sys/fs/cgroup"),
    ]


def test_the_memory_controller_of_version_1_beside_an_empty_version_2() -> None:
    assert paths("8:pids:/p\n4:memory:/a/b\n0::/\n", HYBRID) == [
        (1, "/sys/fs/cgroup/memory/a/b"),
        (1, "/sys/fs/cgroup/memory/a"),
        (1, "/sys/fs/cgroup/memory"),
        (2, "/sys/fs/cgroup/unified"),
    ]


@pytest.mark.parametrize(
    ("cgroup", "root", "expected"),
    [
        ("0::/\n", "/", ["/sys/fs/cgroup"]),  # a cgroup namespace
        ("0::/docker/4711/x\n", "/docker/4711", ["/sys/fs/cgroup/x", "/sys/fs/cgroup"]),  # a bind mount of one's own
        ("0::/docker/4711\n", "/docker/4711", ["/sys/fs/cgroup"]),
        ("0::/elsewhere\n", "/docker/4711", ["/sys/fs/cgroup"]),
        ("0::/../../outside\n", "/", []),  # of a process that was moved out of our namespace
    ],
)
def test_containers(cgroup: str, root: str, expected: list[str]) -> None:
    assert [path for _, path in paths(cgroup, V2.replace(" / ", f" {root} ", 1))] == expected


def test_a_space_in_the_mount_point() -> None:
    assert paths("0::/a\n", V2.replace("/sys/fs/cgroup", "/my\\040cgroups"))[0] == (2, "/my cgroups/a")


@settings(max_examples=50, deadline=None)
@given(cgroup=st.text(), mountinfo=st.text())
def test_any_text_is_read(cgroup: str, mountinfo: str) -> None:
    memory_cgroups(cgroup, mountinfo)
    memory_cgroups("0::" + cgroup, V2 + mountinfo)


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


def test_what_is_left(tmp_path: Path) -> None:
    group = MemoryCgroup(2, str(tmp_path / "a"))
    assert left_in(group) == (UNLIMITED, UNLIMITED), "no file, as in the root"
    write(tmp_path / "a", memory__max="max\n", memory__current="5\n")
    assert left_in(group) == (UNLIMITED, UNLIMITED)
    stat = "anon 7\nfile 99\ninactive_file 2097152\nactive_file 1048576\n"
    write(tmp_path / "a", memory__max=f"{100 * MB}\n", memory__current=f"{60 * MB}\n", memory__stat=stat)
    assert left_in(group) == (43 * MB, 100 * MB), "pages of files are given back"
    write(tmp_path / "a", memory__high=f"{80 * MB}\n")
    assert left_in(group) == (23 * MB, 80 * MB), "the lower of both"
    group = MemoryCgroup(1, str(tmp_path / "b"))
    write(tmp_path / "b", memory__limit_in_bytes="9223372036854771712\n", memory__usage_in_bytes="5\n")
    assert left_in(group) == (UNLIMITED, UNLIMITED)
    write(tmp_path / "b", memory__limit_in_bytes=f"{100 * MB}\n", memory__usage_in_bytes=f"{60 * MB}\n")
    assert left_in(group) == (40 * MB, 100 * MB)


def test_the_tightest_ancestor_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "available_memory", lambda: 1 << 40)
    outer, inner = tmp_path, tmp_path / "inner"
    groups = [MemoryCgroup(2, str(inner)), MemoryCgroup(2, str(outer))]
    budget = MemoryBudget([], 0, 1 * MB, groups)
    assert budget.supply(0) == (Supply.ENOUGH, "")
    for used, expected in ((100, Supply.ENOUGH), (400, Supply.SCARCE), (500, Supply.TIGHT)):
        write(inner, memory__max=f"{900 * MB}\n", memory__current=f"{used * MB}\n")
        write(outer, memory__max=f"{512 * MB}\n", memory__current=f"{used * MB}\n")
        assert budget.supply(0) == (expected, str(outer) if expected else "")
        assert budget.unasked == 512 * MB - used * MB - 128 * MB, "until it is scarce"
    assert budget.supply(100 * MB)[0] is Supply.TIGHT, "what is in flight counts"
    monkeypatch.setattr(memory_budget, "available_memory", lambda: 1)
    write(outer, memory__max="max\n")
    assert budget.supply(0) == (Supply.SCARCE, ""), "the machine's own memory"


@given(limit=st.integers(1 * MB, 1 << 40), left=st.integers(-MB, 1 << 40))
def test_supply_falls_in_order(limit: int, left: int) -> None:
    assert supply_of(left, limit) >= supply_of(left + 1, limit)
    assert supply_of(limit, limit) is Supply.ENOUGH and supply_of(0, limit) is Supply.TIGHT


def test_at_a_limit_it_does_not_flap() -> None:
    steady = SteadySupply()
    looks = [
        (0.0, Supply.SCARCE),
        (0.01, Supply.TIGHT),
        (0.02, Supply.SCARCE),
        (0.03, Supply.TIGHT),
        (0.2, Supply.TIGHT),
    ]
    assert [steady.see(found, now) for now, found in looks] == [Supply.SCARCE, *[Supply.TIGHT] * 4]
    assert steady.see(Supply.ENOUGH, 1.0) is steady.see(Supply.SCARCE, 1.2) is Supply.TIGHT
    assert steady.see(Supply.SCARCE, 1.25) is Supply.SCARCE


def test_the_cgroups_of_workers_are_found(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    mountinfo = (
        f"30 23 0:27 / {tmp_path} rw - cgroup cgroup rw,memory\n31 23 0:28 / /elsewhere rw - cgroup2 cgroup2 rw\n"
    )
    found = cgroups_of([str(inner), "/somewhere"], mountinfo)
    assert [(one.version, one.path) for one in found] == [(1, str(inner)), (1, str(inner.parent)), (1, str(tmp_path))]


def test_own_cgroups_are_found() -> None:
    assert own_cgroups("/nowhere") == []
    assert all(Path(one.path).is_dir() for one in own_cgroups())


def test_nothing_is_requested_while_held() -> None:
    flow = FlowControl(up=True)
    flow.request(1, 1, 0, 4096, 0.0)
    assert flow.hold(True, 0.0) == [] and flow.send(1, 1, 4096, 4096, 0.0) is None
    assert flow.request(1, 1, 4096, 4096, 0.0) == [] and flow.room_for_background(0.0) == 0
    assert flow.tick(1.0) == [] and flow.waiting == 1
    [sent] = flow.hold(False, 2.0)
    assert isinstance(sent, RangeRequest) and sent.offset == 4096
    flow.check()
