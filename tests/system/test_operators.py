"""What an operator sees while something is wrong: who waits, for which block, how long; and totals that add up."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SourceFile
from tests.system.broken_disk import BrokenDisk
from tests.system.remote import Source
from tests.system.service import PAGE, Puppet, PuppetError, Service, until
from tests.system.test_metrics import scraped

PAGES = 64
STUCK = 1.5  # seconds of a wait that must be seen
HANDLER = """
import os, time
GATE = os.path.join(os.path.dirname(__file__), "closed")
def make(offset, length):
    while offset and os.path.exists(GATE):
        time.sleep(0.05)
    return b"x" * length
def fails(offset, length):
    raise ValueError("no such page")
"""


def refused(client: Puppet, order: str) -> str:
    """The exception that it raises there."""
    with pytest.raises(PuppetError) as caught:
        client.do(order)
    return f"{caught.value.kind}: {caught.value}"


def waits(service: Service, client: Puppet) -> dict[str, Any]:
    """The status, once it says for how long this client has waited."""
    status = service.status()
    (row,) = [one for one in status["clients"] if one["pid"] == client.pid]
    return status if row["oldest_wait_s"] > STUCK else {}


def check_waiting(service: Service, client: Puppet, block: str, count: int = 1) -> None:
    """The same in status, text and metrics; the totals are the parts'."""
    status = until(lambda: waits(service, client), f"the wait at {block} is seen", 30)
    (row,) = [one for one in status["clients"] if one["pid"] == client.pid]
    by_block = {one["name"]: one["waiting"] for one in status["blocks"]}
    assert row["waiting"] == count and by_block[block] == count
    assert status["totals"]["waiting"] == count == sum(by_block.values())
    assert status["totals"]["oldest_wait_s"] >= row["oldest_wait_s"] - 0.1 > STUCK - 0.1
    samples = scraped(service)
    assert samples["postcopy_waiting_faults"][()] == count
    assert samples["postcopy_block_waiting_faults"][("block", block),] == count
    assert samples["postcopy_block_oldest_wait_seconds"][("block", block),] > STUCK
    (mine,) = [labels for labels in samples["postcopy_client_waiting_faults"] if ("pid", str(client.pid)) in labels]
    assert samples["postcopy_client_oldest_wait_seconds"][mine] > STUCK


def over(service: Service) -> bool:
    return int(service.status()["totals"]["waiting"]) == 0


def test_a_slow_handler(runtime_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "slowly.py").write_text(HANDLER)
    blocks = ["a=zero:64K", "h=handler:slowly:make?size=256K"]
    with Service(runtime_dir, *blocks, cwd=tmp_path, metrics="127.0.0.1:0") as service:
        client = service.client("a", POSTCOPY_CLIENT_NAME="trainer 7")
        client.attach("h", called="h")
        client.do("[b.buf[0], h.buf[0]]")
        (tmp_path / "closed").touch()
        client.begin("h.buf[40960]")
        check_waiting(service, client, "h")
        (row,) = service.status()["clients"]
        assert row["name"] == "trainer 7"
        titles = [Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace") for pid in service.people()]
        assert any(title.startswith(f"postcopy_workers: client {row['id']} (pid {client.pid}") for title in titles)
        assert any(title.startswith("postcopy_workers.custodian in ") for title in titles)
        (tmp_path / "closed").unlink()
        assert client.answer() == ord("x")
        until(lambda: over(service), "nothing waits")


def test_a_stalled_disk(runtime_dir: Path, tmp_path: Path) -> None:
    """The worker stands in the kernel, in the middle of a common fault, which writes nothing before."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened here")
    disk = BrokenDisk(tmp_path, os.urandom(PAGES * PAGE), range(0))
    with ExitStack() as stack:
        path = stack.enter_context(disk)
        service = stack.enter_context(Service(runtime_dir, f"ram0={path}", metrics="127.0.0.1:0", fault_around="4K"))
        client = service.client("ram0")
        client.do("b.buf[0]")
        disk._server.send_signal(signal.SIGSTOP)
        stack.callback(disk._server.send_signal, signal.SIGCONT)
        client.begin(f"b.buf[{40 * PAGE}]")
        check_waiting(service, client, "ram0")
        disk._server.send_signal(signal.SIGCONT)
        client.answer()
        until(lambda: over(service), "nothing waits")


def test_a_source_that_hangs(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(PAGES * PAGE)
    with (
        Source(f"ram0={path}") as source,
        Service(
            runtime_dir, source.block(), "z=zero:8K", metrics="127.0.0.1:0", background_rate=0, source_timeout=60
        ) as service,
    ):
        assert source.process is not None
        client = service.client("ram0", "shared")
        client.do("b.buf[0]")
        source.process.send_signal(signal.SIGSTOP)
        client.begin(f"b.buf[{40 * PAGE}]")
        check_waiting(service, client, "ram0")
        source.process.send_signal(signal.SIGCONT)
        client.answer()
        until(lambda: over(service), "nothing waits")


def summed(status: dict[str, Any]) -> None:
    """Each total is the sum of its parts."""
    totals, blocks, clients = status["totals"], status["blocks"], status["clients"]
    parts = [*clients, status["left"], status["supervisor"]]
    for name in ("faults", "placed", "placed_around", "around_used", "deduplicated", "wakes", "failures", "restarts"):
        assert totals[name] == sum(one.get(name, 0) for one in parts), name
    assert totals["blocked_s"] == pytest.approx(sum(one.get("blocked_s", 0) for one in parts), abs=1e-5)
    assert totals["lost"] == sum(one["lost"] for one in blocks)
    assert totals["lost_faults"] == sum(one.get("lost", 0) for one in parts)
    assert totals["waiting"] == sum(one["waiting"] for one in [*clients, status["supervisor"]])
    assert totals["quarantined"] == sum(one["state"] == "quarantined" for one in clients)


def test_totals_add_up_and_counters_survive_their_clients(
    runtime_dir: Path, tmp_path: Path, source_file: SourceFile
) -> None:
    """Lost pages (local, remote), failures, restarts, refusals; before and after the clients have left."""
    (tmp_path / "slowly.py").write_text(HANDLER)
    near, far = (source_file(PAGES * PAGE, seed, f"{seed}.bin") for seed in (1, 2))
    with (
        Source(f"far={far}") as source,
        Service(
            runtime_dir,
            f"near={near}",
            source.block("far"),
            "h=handler:slowly:fails?size=64K",
            cwd=tmp_path,
            metrics="127.0.0.1:0",
            background_rate=0,
            fault_around="4K",
        ) as service,
    ):
        clients = [service.client("near"), service.client("far", "shared"), service.client("h")]
        for client in clients[:2]:
            client.do("[b.buf[n * 4096] for n in range(9)]")
        service.kill_worker(clients[0])
        os.truncate(near, 32 * PAGE)
        os.truncate(far, 32 * PAGE)
        for client in clients:
            assert refused(client, "b.ensure(15 * 4096 + 40 * 4096 * (b.name != 'h'), 1)").startswith("PageLost")
        assert refused(clients[0], "attach('nothing')").startswith("NoSuchBlock")
        until(lambda: service.status()["totals"]["lost"] >= 2, "the lost pages are counted")
        status = service.status()
        summed(status)
        assert status["totals"]["failures"] == 1 == status["totals"]["restarts"]
        assert status["totals"]["refused"] == {"no-such-block": 1}
        before = counters(scraped(service))
        assert before["postcopy_handler_failures_total"] == 1 == before["postcopy_refusals_total", "no-such-block"]
        for client in clients:
            client.close()
            seen = counters(scraped(service))
            assert all(seen[name] >= figure for name, figure in before.items())
            before = seen
        until(lambda: not service.status()["clients"], "the clients have left")
        status = service.status()
        summed(status)
        assert status["left"]["clients"] == 3 and status["left"]["faults"] == status["totals"]["faults"] > 18
        seen = counters(scraped(service))
        assert all(seen[name] >= figure for name, figure in before.items())


def counters(samples: dict[str, dict[tuple[tuple[str, str], ...], float]]) -> dict[Any, float]:
    """All counters but those with a client's labels, whose series end with it; and those of the others."""
    found: dict[Any, float] = {}
    for name, series in samples.items():
        if not name.endswith(("_total", "_count", "_sum", "_bucket")):
            continue
        for labels, figure in series.items():
            named = dict(labels)
            if named.get("client", "others") == "others":
                found[(name, *(value for key, value in labels if key != "pid" and value)) if labels else name] = figure
    return found


HOSTILE = "x\x1b[31m\n\u202e" + "n" * 70


def test_hostile_names_are_shown_harmlessly(runtime_dir: Path) -> None:
    """The library refuses them; a client that sends one all the same is shown without its control characters."""
    with Service(runtime_dir, "z=zero:64K", metrics="127.0.0.1:0") as service:
        client = service.client(None)
        assert "64 characters" in refused(client, f"postcopy.attach('z', directory, name={HOSTILE!r})")
        assert "no control" in refused(client, "postcopy.attach('z', directory, name='a\\x1bb')")
        client.do("globals().update(s=__import__('postcopy.session').session)")
        client.do(f"setattr(s, 'program_name', lambda: {HOSTILE!r})")
        client.attach("z")
        row = service.record(client)
        assert row["name"] == "x?[31m??" + "n" * 56
        assert any(("name", row["name"]) in labels for labels in scraped(service)["postcopy_client_faults_total"])
        service.kill_worker(client)
        until(lambda: any(event.get("name") == row["name"] for event in service.status()["events"]), "an event has it")
