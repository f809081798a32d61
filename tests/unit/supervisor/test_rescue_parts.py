"""A received map that is made again, records, and the names of the service manager's store."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy_kernel import memory
from postcopy_protocol import received_map
from postcopy_protocol.codec import encode
from postcopy_protocol.copied_map import size_of
from postcopy_protocol.errors import BadInput
from postcopy_protocol.messages import BlockNote, ClientNote, RegionGrant
from postcopy_protocol.runtime_paths import RESCUE
from postcopy_supervisor.recovery import records
from postcopy_supervisor.recovery.descriptor_store import DescriptorStore, taken
from postcopy_supervisor.recovery.records import Records
from postcopy_supervisor.recovery.rescue import Found, _Rescue, living, made_again
from tests.simulated.effort import effort

REGION = RegionGrant(7, "private", 1 << 30, 8192, 0)
CLIENT = ClientNote(3, "somebody", "native", 0, os.getpid(), False, False, (REGION,), ())
BLOCK = BlockNote(7, "ram0", "/a", 8192, 4096, "zero", "", "", 8192, b"")


@effort(60)
@given(st.integers(1, 60), st.data())
def test_nothing_is_believed_that_is_not_proved(pages: int, data: st.DataObject) -> None:
    present = data.draw(st.sets(st.integers(0, pages - 1)))
    shared = data.draw(st.booleans())
    found = bytearray(pages + received_map.FLAGS)
    for at, states in made_again([(page, page + 1) for page in sorted(present)], pages, shared=shared):
        found[at : at + len(states)] = states
    marks, flags = found[:pages], found[pages:]
    assert len(found) == pages + received_map.FLAGS
    assert set(marks) <= {received_map.MISSING, received_map.RECEIVED}, "no page was being placed, and none is lost"
    believed = {page for page, mark in enumerate(marks) if mark == received_map.RECEIVED}
    assert believed == (present if shared else set())
    assert flags[received_map.SHARED] == shared
    assert flags[received_map.GUARDED] == (not shared), "what is not believed is replaced before a client gets it"
    assert flags[received_map.TRUST] == received_map.WATCHED


def test_a_record_is_read_as_it_was_written_and_only_in_this_boot(tmp_path: Path) -> None:
    written = Records(str(tmp_path), {"block/7": b"stamp"})
    written.keep("client/3", encode(CLIENT), (0, 1, 2))
    assert records.read(str(tmp_path)).clients == {}, "nothing is written before everything is taken over"
    written.retain(["client/3", "block/7"])
    written.keep("block/7", encode(BLOCK), (0, 1))
    written.keep("house", b"", (0, 1))
    left = records.read(str(tmp_path))
    assert left.clients["client/3"].note == CLIENT and left.blocks["block/7"].note == BLOCK
    assert left.blocks["block/7"].record.original == b"stamp"
    (found,) = living(left, ())
    os.close(found.pidfd)
    assert found.note == CLIENT and living(left, {"client/3"}) == []
    again = Records(str(tmp_path), {})
    again.retain(["client/3", "block/7"])
    again.keep("block/7", encode(BLOCK), (0, 1))
    assert records.read(str(tmp_path)).blocks["block/7"].record.original == b"stamp", "a later supervisor keeps it"
    later = Records(str(tmp_path), {})
    later._boot = "another boot"
    later.retain(["client/3", "block/7"])
    later.keep("client/3", encode(CLIENT), (0, 1, 2))
    assert records.read(str(tmp_path)).clients == {}
    later.retain(["block/7"])
    assert [entry.name for entry in (tmp_path / RESCUE).iterdir()] == ["block-7"]
    later.clear()
    assert not (tmp_path / RESCUE).exists()


def test_a_record_that_could_not_be_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / RESCUE
    place.parent.mkdir()
    place.touch()  # a file in its place: no record can be made
    written = Records(str(tmp_path), {})
    written._begun = True
    monkeypatch.setattr(records, "RETRY_SECONDS", 0.0)
    written.keep("client/3", encode(CLIENT), (0, 1, 2))
    written.keep("block/7", encode(BLOCK), (0, 1))
    written.drop("block/7")
    place.unlink()
    written.keep("client/4", encode(CLIENT), (0, 1, 2))
    assert set(records.read(str(tmp_path)).clients) == {"client/4"}
    written._retry_at = 0.0
    written.flush()
    left = records.read(str(tmp_path))
    assert set(left.clients) == {"client/3", "client/4"} and left.blocks == {}


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / RESCUE).mkdir(parents=True)
    (tmp_path / RESCUE / "client-3").write_bytes(b"\x93\x09\x6a\xc0")
    with pytest.raises(BadInput, match="another version"):
        records.read(str(tmp_path))
    (tmp_path / RESCUE / "client-3").rename(tmp_path / RESCUE / "client-3.new")
    assert records.read(str(tmp_path)).clients == {}, "one that was being written does not count"


def test_what_the_manager_has_is_only_for_the_process_that_it_names() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "house.0:house.1", "OTHER": "x"}
    assert taken(environ) == ({}, set())
    assert environ == {"OTHER": "x"}


@pytest.mark.parametrize("limit", ["", "0", "many"])
def test_no_store_is_used_that_is_not_offered(limit: str) -> None:
    assert DescriptorStore.wanted({"NOTIFY_SOCKET": "/x", "FDSTORE": limit}, ()) is None
    assert DescriptorStore.wanted({"FDSTORE": "5"}, ()) is None


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("lives", [True, False])
def test_a_copied_map_is_taken_once_and_its_face_may_end(lives: bool) -> None:
    """Its face, here this process, holds it twice; or it ends between two looks."""
    size, before = size_of(2), open_descriptors()
    first = memory.create_memfd("postcopy-m3", size)
    second, block, pidfd = os.dup(first), memory.create_memfd("postcopy-ram0", 8192), os.pidfd_open(os.getpid())
    record = Mock(front_end=os.getpid() if lives else 1 << 30, copied_inode=os.fstat(first).st_ino)
    left = Mock(workers={}, clients={"client/3": Mock(record=record)}, blocks={"block/7": Mock(note=BLOCK)})
    with ExitStack() as undo:
        client = Found("client/3", CLIENT, pidfd, front_end=(pidfd,))
        found = _Rescue(left, {}, False, undo)._copied_map(client, {"block/7": (b"", (block,))})
        assert (found >= 0) == lives
        assert open_descriptors() == before + 4 + lives
    for fd in (first, second, block, pidfd):
        os.close(fd)
