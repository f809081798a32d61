"""What a custodian knows about its keys, orders and notes.

Pure, and decoded only when needed: each page of memory that the custodian writes to is no longer shared with its
workers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from postcopy_protocol.codec import decode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Assignment, ClientNote

CLIENT = "client/"
NO_SUPERVISOR = "no supervisor came back within the orphan timeout"


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is forked by: the keys of its descriptors, its assignment, its latest incarnation."""

    keys: tuple[str, ...]
    assignment: bytes
    incarnation: int


def client_of(key: str) -> int:
    """The number of the client that a key belongs to; 0 for another key, and for worker zero's."""
    number = key.removeprefix(CLIENT)
    return int(number) if number != key and number.isdecimal() else 0


def wants_worker(meta: bytes, last: Assignment) -> bool:
    """Does the client of this note need a worker when none lives? Not without regions (all its blocks are complete),
    and not in quarantine, unless its supervisor gave it a worker that poisons."""
    try:
        note = decode(meta, expect=(ClientNote,))
    except BadMessage:
        return True
    assert isinstance(note, ClientNote)
    poisons = all(grant.kind == "quarantined" for grant in last.blocks)
    return bool(note.regions) and (poisons or not note.quarantined)


def asks_remote(assignment: Assignment) -> bool:
    """Does the worker need a supervisor for some pages?"""
    return any(grant.kind == "remote" for grant in assignment.blocks)


def without_remote(assignment: Assignment) -> Assignment:
    """The same assignment for a worker that serves local blocks only, and poisons missing pages of remote blocks."""
    blocks = (
        replace(grant, kind="orphaned", detail=NO_SUPERVISOR) if grant.kind == "remote" else grant
        for grant in assignment.blocks
    )
    return replace(assignment, blocks=tuple(blocks))
