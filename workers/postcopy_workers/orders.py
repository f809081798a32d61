"""What a custodian understands of what it is told: keys, orders and notes. Pure, and read only when needed: each page
of memory that the custodian writes to is one that its workers share no longer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from postcopy_protocol.codec import decode
from postcopy_protocol.errors import BadMessage
from postcopy_protocol.messages import Assignment, ClientNote

CLIENT = "client/"
NO_SUPERVISOR = "no supervisor came back within the orphan timeout"


@dataclass(frozen=True, slots=True)
class Order:
    """By what a worker is forked: the keys of its descriptors, what it is told, its latest incarnation."""

    keys: tuple[str, ...]
    assignment: bytes
    incarnation: int


def client_of(key: str) -> int:
    """The number of the client whose key this is; 0: another key, or worker zero's."""
    number = key.removeprefix(CLIENT)
    return int(number) if number != key and number.isdecimal() else 0


def wants_worker(meta: bytes, last: Assignment) -> bool:
    """Does the client of this note need a worker when none lives? One without regions, such as one whose blocks are
    complete, does not; nor one that is quarantined and whose supervisor gave it none."""
    try:
        note = decode(meta, expect=(ClientNote,))
    except BadMessage:
        return True
    assert isinstance(note, ClientNote)
    shut_in = all(grant.kind == "quarantined" for grant in last.blocks)
    return bool(note.regions) and (shut_in or not note.quarantined)


def asks_remote(assignment: Assignment) -> bool:
    """Are there pages that only a supervisor can bring?"""
    return any(grant.kind == "remote" for grant in assignment.blocks)


def without_remote(assignment: Assignment) -> Assignment:
    """Local blocks go on; pages that only a supervisor could bring are poisoned at their fault."""
    blocks = (
        replace(grant, kind="orphaned", detail=NO_SUPERVISOR) if grant.kind == "remote" else grant
        for grant in assignment.blocks
    )
    return replace(assignment, blocks=tuple(blocks))
