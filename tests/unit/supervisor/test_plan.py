"""What is taken over, what is made anew, what is refused: judged without a process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from postcopy_protocol.codec import encode
from postcopy_protocol.errors import BadInput
from postcopy_protocol.messages import BlockNote, ClientNote, RegionGrant
from postcopy_protocol.sources import FileSource, HandlerSource, RemoteSource, Source, ZeroSource
from postcopy_supervisor.recovery import plan
from postcopy_supervisor.recovery.plan import FileFacts, Inventory, KeptBlock, KeptClient, KeptWorker, Plan

FILE = FileFacts(1, 2, 8192, 99)
REGION = RegionGrant(7, "private", 1 << 30, 8192, 0)
NOTE = BlockNote(7, "ram0", "/a", 8192, 4096, "file", "", "", 8192, b"")
REMOTE = replace(NOTE, kind="remote", source="ipc:///s/ram0", identity="abc")
CLIENT = ClientNote(3, "somebody", "native", 0, 100, False, False, (REGION,), ())
WORKER = KeptWorker(3, 5, 101, 55)


def estate(note: BlockNote = NOTE, client: ClientNote = CLIENT) -> Inventory:
    block = KeptBlock(note, (10, 11, 12) if note.kind == "file" else (10, 11))
    return Inventory((1, 2, 3), (4,), (block,), (KeptClient(client, (20, 21, 22)),), (WORKER,))


def judge(
    found: Inventory, source: Source | None, *, alive: bool = True, now: FileFacts | None = FILE, page_size: int = 4096
) -> Plan:
    sources = {"new": ZeroSource(4096)} | ({"ram0": source} if source is not None else {})
    files = {"ram0": now} if now is not None else {}
    return plan.judge(found, sources, page_size, {3} if alive else set(), {7: FILE}, files)


def test_everything_as_it_was() -> None:
    plan = judge(estate(), FileSource("/a"))
    assert plan.recovers and plan.shared == (1, 2, 3) and plan.zero == (4,)
    assert plan.blocks["ram0"].note is NOTE and plan.blocks["ram0"].file == 12
    assert plan.numbers == {"ram0": 7, "new": 8}, "no number is used twice"
    assert [client.note for client in plan.clients] == [CLIENT]
    assert plan.workers == (WORKER,) and plan.forgotten == () and plan.first_client == 4


OTHERS = {
    "not named": (NOTE, None, {}),
    "page size": (NOTE, FileSource("/a"), {"page_size": 2 << 20}),
    "another file": (NOTE, FileSource("/b"), {"now": replace(FILE, inode=3)}),
    "another device": (NOTE, FileSource("/b"), {"now": replace(FILE, device=3)}),
    "size": (NOTE, FileSource("/a"), {"now": replace(FILE, size=8193)}),
    "time": (NOTE, FileSource("/a"), {"now": replace(FILE, mtime_ns=100)}),
    "no file": (NOTE, FileSource("/a"), {"now": None}),
    "another kind": (NOTE, ZeroSource(8192), {}),
    "other zeros": (replace(NOTE, kind="zero", source="zero:8K"), ZeroSource(8193), {}),
    "handler's size": (replace(NOTE, kind="handler", detail="m:f"), HandlerSource("m", "f", 1), {}),
    "another handler": (replace(NOTE, kind="handler", detail="m:f"), HandlerSource("m", "g", 8192), {}),
    "remote before": (REMOTE, FileSource("/a"), {}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_a_client_uses_must_be_what_it_was(what: str) -> None:
    note, source, options = OTHERS[what]
    with pytest.raises(BadInput) as refused:
        judge(estate(note), source, **options)  # type: ignore[arg-type]
    text = str(refused.value)
    assert "ram0" in text and "\n" not in text and "--abandon" in text and "nothing is changed" in text


@pytest.mark.parametrize("what", OTHERS)
def test_what_nobody_uses_is_made_anew(what: str) -> None:
    note, source, options = OTHERS[what]
    plan = judge(estate(note), source, alive=False, **options)  # type: ignore[arg-type]
    assert "ram0" not in plan.blocks and plan.numbers.get("ram0") in (None, 8, 9)
    assert set(plan.forgotten) == {"block/7", "client/3"} and plan.clients == ()
    assert plan.recovers and plan.workers == (WORKER,), "a worker that lives is known, and ended"


def test_a_block_that_is_whole_counts_as_used() -> None:
    released = replace(CLIENT, regions=(), released=(REGION,))
    with pytest.raises(BadInput):
        judge(estate(client=released), None)


def test_the_same_sources_of_other_kinds() -> None:
    assert judge(estate(replace(NOTE, kind="zero")), ZeroSource(8192)).blocks
    assert judge(estate(replace(NOTE, kind="handler", detail="m:f")), HandlerSource("m", "f", 8192)).blocks


def test_a_remote_block_is_judged_by_its_source() -> None:
    """Another endpoint may have the same content; what it must be is known without asking."""
    plan = judge(estate(REMOTE), RemoteSource("tcp://elsewhere:1", "theirs"))
    assert plan.advice["ram0"].identity == "abc" and plan.advice["ram0"].size == 8192


def test_reading() -> None:
    kept = {
        "house": (b"", (1, 2)),
        "client/0": (b"", (9,)),
        "block/7": (encode(NOTE), (3, 4, 5)),
        "client/3": (encode(CLIENT), (6, 7, 8)),
    }
    found = plan.read(kept, [WORKER])
    assert found.shared == (1, 2) and found.zero == (9,) and found.workers == (WORKER,)
    assert [block.note for block in found.blocks] == [NOTE] and [client.note for client in found.clients] == [CLIENT]


@pytest.mark.parametrize(
    "kept",
    [
        {"house": (b"", (1, 2)), "block/7": (b"ram0", (3, 4, 5))},
        {"house": (b"", (1, 2)), "block/7": (encode(NOTE), (3, 4))},
        {"house": (b"", (1, 2)), "block/7": (encode(CLIENT), (3, 4, 5))},
        {"house": (b"", (1, 2)), "client/3": (encode(CLIENT), (3, 4))},
        {"house": (b"", (1, 2)), "client/3": (encode(NOTE), (3, 4, 5))},
        {"house": (b"", (1,))},
        {"client/3": (encode(CLIENT), (6, 7, 8))},
        {"house": (b"", (1, 2)), "cellar": (b"", ())},
    ],
)
def test_what_is_kept_by_another_version(kept: dict[str, tuple[bytes, tuple[int, ...]]]) -> None:
    with pytest.raises(BadInput, match="another version"):
        plan.read(kept, [])


def test_a_fresh_start() -> None:
    made = plan.fresh({"a": ZeroSource(1), "b": ZeroSource(2)}, 9)
    assert made.numbers == {"a": 1, "b": 2} and not made.recovers and made.first_client == 9 and not made.advice


def test_numbers_that_nobody_has() -> None:
    assert plan.numbers_after(["house", "block/70", "client/8", "client/0"], [WORKER]) == 9
    assert plan.numbers_after(["client/2"], [WORKER]) == 4
    assert plan.numbers_after([], []) == 1
