"""A whole block through staging memory: source and supervisor are killed in the middle, and every byte is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from postcopy_protocol.return_path import STAGING_NAME
from tests.conftest import SourceFile
from tests.system.remote import Source, await_state, kinds
from tests.system.service import PAGE, Service, until

SIZE = 96 << 20
WORD = "goes through shared memory"
SLOWLY: dict[str, Any] = {"background_rate": "2M", "source_timeout": "1"}
"""Nearly a minute for all of it."""


def mapped(pid: int) -> bool:
    return STAGING_NAME in Path(f"/proc/{pid}/maps").read_text()


def test_whole_with_source_and_supervisor_killed_in_the_middle(runtime_dir: Path, source_file: SourceFile) -> None:
    path = source_file(SIZE)
    with Source(f"ram0={path}") as source, Service(runtime_dir, source.block(), **SLOWLY) as service:
        shared = service.client("ram0", "shared")
        until(lambda: WORD in source.log(), "staging memory is used")
        until(lambda: service.block()["received"] > 512, "some of it has come")
        source.end()
        await_state(service, "paused")
        assert not mapped(service.status()["pid"]), "nothing of the dead source's memory is kept"
        stood = service.block()["received"]
        assert stood < SIZE // PAGE
        source.start()
        until(lambda: service.block()["received"] > stood, "it goes on")
        until(lambda: source.log().count(WORD) == 2, "through memory of its own")
        service.kill()
        service.recover(background_rate="24M")
        until(lambda: source.log().count(WORD) == 3, "and the next supervisor has one of its own")
        until(lambda: service.block()["complete"], "it is whole", 60)
        for client in (shared, service.client("ram0", "private")):
            assert client.do(f"check(b, {str(path)!r})") == -1
        service.audit()
        assert not service.events("source-nonsense") and not service.events("lost") and not service.events("bug")
        until(lambda: not mapped(service.status()["pid"]), "and when everything has come it is given up")
        assert source.process is not None
        pid = source.process.pid
        until(
            lambda: not mapped(pid),
            "at the source, too, also that of the supervisor that was killed",
            25,
        )
        assert kinds(service, "recover")


def test_a_source_whose_descriptors_cannot_be_seen(runtime_dir: Path, source_file: SourceFile) -> None:
    """In another pid namespace its number means another process here, or none: the socket will do."""
    path = source_file(SIZE // 4)
    prefix = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    with Source(f"ram0={path}", prefix=prefix) as source, Service(runtime_dir, source.block()) as service:
        until(lambda: service.block()["complete"], "it is whole", 60)
        assert WORD not in source.log()
        assert "pages come through the socket" in service.log()
        assert service.client().do(f"check(b, {str(path)!r})") == -1
        assert not service.events("source-nonsense")
