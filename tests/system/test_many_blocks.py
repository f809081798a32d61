"""A client of as many blocks as it may have, as a model of many files is."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from postcopy_protocol.attach_conversation import MAX_REGIONS
from tests.conftest import SourceFile
from tests.system.service import PAGE, PuppetError, Service, word


@pytest.mark.parametrize("hard", [None, 1024])
def test_as_many_blocks_as_a_client_may_have(runtime_dir: Path, source_file: SourceFile, hard: int | None) -> None:
    """Its worker holds descriptors of all of them, and needs a few more for its connection and its mappings."""
    names = [f"b{number}" for number in range(MAX_REGIONS)]
    paths = [source_file(4 * PAGE, number, f"{number}.bin") for number in range(4)]
    blocks = [f"{name}={paths[number % 4]}" for number, name in enumerate(names)]

    def limit() -> None:
        if hard is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    with Service(runtime_dir, *blocks, fault_around="4K", preexec=limit if hard else None) as service:
        client = service.client(None)
        client.do(f"many = [attach(name) for name in {names}]")
        assert client.do("[words(b, [1])[0] for b in many]") == [
            word(PAGE, number % 4) for number in range(MAX_REGIONS)
        ]
        service.kill_worker(client)
        assert client.do("[words(b, [2])[0] for b in many]") == [
            word(2 * PAGE, number % 4) for number in range(MAX_REGIONS)
        ]
        with pytest.raises(PuppetError, match=f"a client may have {MAX_REGIONS} regions"):
            client.do("attach('b0')")
        assert client.do("words(many[7], [3])") == [word(3 * PAGE, 3)], "the others go on"
        assert service.status()["totals"]["restarts"] == 1
