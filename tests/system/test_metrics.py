"""Figures for Prometheus and trace points of real supervisors."""

from __future__ import annotations

import http.client
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import postcopy
from postcopy.commands.service_files import ALERTS, DASHBOARD, text_of
from postcopy_workers.fast_answers import TIMED
from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import Puppet, Service, until

SIZE = 1 << 20


def scraped(service: Service) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and labels."""
    found = re.search(r"metrics on http://127.0.0.1:(\d+)/metrics", service.log())
    assert found
    connection = http.client.HTTPConnection("127.0.0.1", int(found.group(1)), timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def final(service: Service, client: Puppet) -> bool:
    """Do its figures change no more? A worker counts a moment after its client runs again; when the block is whole, it
    leaves."""
    record = service.record(client)
    return bool(record["released"]) and record["worker_pid"] is None


def test_prometheus_sees_what_status_says(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with Service(runtime_dir, f"ram0={path}", fault_around="auto", metrics="127.0.0.1:0") as service:
        client = service.client("ram0", "private")
        assert client.do(f"check(b, {str(path)!r}, 'forward', 4096)") == -1
        service.await_received(SIZE // 4096)
        until(lambda: final(service, client), "nothing is counted any more")
        samples, status = scraped(service), service.status()
        (row,) = status["clients"] or [None]
        assert samples["postcopy_state"][("state", "running"),] == 1
        assert samples["postcopy_block_received_bytes"][("block", "ram0"),] == SIZE
        assert samples["postcopy_fault_latency_seconds_count"][()] > 0
        assert samples["postcopy_fault_latency_seconds_bucket"][("le", "+Inf"),] > 0
        assert samples["postcopy_worker_restarts_total"][()] == 0
        others, labels = sorted(
            samples["postcopy_client_faults_total"], key=lambda one: dict(one)["client"] != "others"
        )
        assert dict(labels)["client"] == str(row["id"]) and samples["postcopy_client_faults_total"][others] == 0
        assert samples["postcopy_faults_total"][()] == row["faults"]
        (build,) = samples["postcopy_build_info"]
        assert dict(build) == {
            "version": postcopy.__version__,
            "protocol": str(status["protocol"]),
            "transport": "native",
        }
        for name, key in (("faults", "faults"), ("placed_pages", "placed"), ("around_pages", "placed_around")):
            assert samples[f"postcopy_client_{name}_total"][labels] == row[key]
        assert samples["postcopy_client_blocked_seconds_total"][labels] == pytest.approx(row["blocked_s"], abs=1e-5)
        assert 0 < row["around_used"] <= row["placed_around"]


def test_the_stages_of_local_and_remote_faults(runtime_dir: Path, source_file: SourceFile) -> None:
    """By client and block what its worker knows, by block all of it, and not forgotten when the client leaves."""
    path, pages, port = source_file(SIZE), SIZE // 4096, "127.0.0.1:0"
    with (
        Source(f"far={path}") as source,
        Service(
            runtime_dir, f"near={path}", source.block("far"), metrics=port, background_rate=0, fault_around="4K"
        ) as service,
    ):
        clients = [service.client("near", "private"), service.client("far", "shared")]
        for client in clients:
            assert client.do(f"check(b, {str(path)!r}, 'random', 4096)") == -1
        until(lambda: all(final(service, client) for client in clients), "nothing is counted any more")
        near, far = (block["stages_us"] for block in service.status()["blocks"])
        mine = [client["blocks"][0]["stages_us"] for client in service.status()["clients"]]
        assert [sorted(found) for found in mine] == [["placed", "woken"], ["asked", "woken"]]
        assert sorted(near) == ["placed", "woken"] and sorted(far) == ["arrived", "asked", "placed", "woken"]
        assert {found["count"] for found in far.values()} == {pages}
        assert mine[0]["woken"]["count"] == near["woken"]["count"]
        assert pages - TIMED < near["woken"]["count"] <= pages
        assert all(0 < found["p50"] <= found["p99"] <= found["max"] for told in (near, far) for found in told.values())
        assert near["placed"]["p50"] <= near["woken"]["p50"]
        assert far["placed"]["p50"] < far["arrived"]["p50"] < far["woken"]["p50"]
        for client in clients:
            client.close()
        until(lambda: not service.status()["clients"], "the clients have left")
        assert [block["stages_us"] for block in service.status()["blocks"]] == [near, far]
        counted = scraped(service)["postcopy_stage_latency_seconds_count"]
        assert counted[("block", "far"), ("stage", "arrived")] == pages
        assert counted[("block", "near"), ("stage", "woken")] == near["woken"]["count"]


def test_dashboard_and_alerts_ask_for_figures_that_there_are(runtime_dir: Path, source_file: SourceFile) -> None:
    """And the alert rules."""
    asked = set(re.findall(r"postcopy_\w+", " ".join(re.findall(r'"expr": "(.*)"', text_of(DASHBOARD)))))
    groups = yaml.safe_load(text_of(ALERTS))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert all({"alert", "expr", "labels", "annotations"} <= set(rule) for rule in rules)
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    watched = set(re.findall(r"postcopy_\w+", " ".join(rule["expr"] for rule in rules)))
    assert watched
    asked |= watched
    path = source_file(SIZE)
    with (
        Source(f"ram0={path}") as source,
        Service(runtime_dir, source.block(), "z=zero:8K", metrics="127.0.0.1:0") as service,
    ):
        service.client("z").do("b.buf[0]")
        assert asked <= set(scraped(service)), asked - set(scraped(service))


@pytest.mark.parametrize("words", ["nonsense", "127.0.0.1:99999", "127.0.0.1", ":9"])
def test_an_address_that_is_none(runtime_dir: Path, words: str) -> None:
    with pytest.raises(postcopy.PostcopyError, match="HOST:PORT"), postcopy.Supervisor({"z": "zero:4K"}, metrics=words):
        pass


def test_trace_points_of_a_remote_fault(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with (
        Source(f"ram0={path}") as source,
        Service(runtime_dir, source.block(), trace="all", background_rate=0) as service,
    ):
        client = service.client("ram0", "private")
        client.do("b.buf[8192]")
        client.close()
        service.end()
        log = service.log()
    assert re.search(r"trace.request client=\d+ block=ram0 offset=8192", log)
    assert re.search(r"trace.place block=ram0 offset=8192 length=4096", log)
    assert re.search(r"trace.wake worker=\d+ block=ram0 offset=8192 page=present", log)
    assert "trace.loop at=entry" in log and "trace.loop at=exit" in log
    assert "trace.quit descriptor=StopRequested" in log
    assert "trace.foreign descriptor=ClientMessage message=Hello" in log


def test_nothing_is_traced_unless_asked(runtime_dir: Path) -> None:
    with Service(runtime_dir, "z=zero:4K", trace="wake") as service:
        service.client("z").do("b.buf[0]")
        assert "trace." not in service.log()
    with pytest.raises(postcopy.PostcopyError, match="is none of loop"):
        postcopy.Supervisor({"z": "zero:4K"}, trace="x")
