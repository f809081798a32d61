"""Admission: which peers of the attach socket may attach, which blocks they may write, and how much they may ask for.

Only the listener's thread calls it, so a peer that is refused costs the main thread nothing. The supervisor's own user
has no limits: it may do all that the supervisor may."""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

from postcopy_kernel import access_list, descriptors
from postcopy_kernel.closing import Closer
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import Mapped, Message, OfferBackEnd, OfferUserfaultfd, Refused, Unmap

from .bans import FIRST_SECONDS, Bans

EVERY_BLOCK = ""
"""In place of a block's name."""

CONNECTS_PER_SECOND, MOST_CONNECTS = 100.0, 512
"""Of one user. A program that starts some hundred clients at once is served at once."""
WORK_PER_SECOND, MOST_WORK = 1000.0, 5120
"""Messages of one user. One that starts a worker counts as WORKER_WORK of them: 50 a second, 256 at once."""
WORKER_WORK = 20
STARTS_A_WORKER = (Mapped, Unmap, OfferUserfaultfd, OfferBackEnd)

LONGEST_CLOSE = 1.0
"""Seconds after which a user whose descriptor cannot be closed may not connect."""
MOST_HELD = 64
"""Descriptors and connections of one user that wait for their close; with more it may not connect."""
MOST_USERS = 256
"""Users of whom limits and refusals are remembered. There are more only where one has many uids (a user namespace)."""
OTHERS = -1
LONGEST_WAIT = 64.0  # seconds between two reports about one user

BlockRights = frozenset[tuple[str, int]]
"""Block (or EVERY_BLOCK) and user or group."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A process that has connected, by the kernel's word. ``pid`` is 0 for one in another pid namespace: it serves for
    display only. ``writable``: blocks that it may attach ``shared``."""

    uid: int
    pid: int
    writable: frozenset[str] = frozenset()


def may_write(writable: frozenset[str], block: str) -> bool:
    return EVERY_BLOCK in writable or block in writable


@dataclass(frozen=True, slots=True)
class AllowList:
    """Users and groups that may attach, and those of them that may attach ``shared``.

    ``unmapped``: the user and group that stand for all that have no number in this user namespace (-1: none)."""

    own: int
    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()
    shared_uids: BlockRights = frozenset()
    shared_gids: BlockRights = frozenset()
    unmapped: tuple[int, int] = (-1, -1)

    def check(self, connection: socket.socket, peer: descriptors.Credentials) -> Peer | None:
        """The peer; None for one that may not attach. Raises OSError."""
        if peer.uid == self.unmapped[0]:
            return None
        if peer.uid == self.own:
            return Peer(peer.uid, peer.pid, frozenset((EVERY_BLOCK,)))
        groups = self._groups(connection, peer.gid)
        writable = {block for block, uid in self.shared_uids if uid == peer.uid}
        writable |= {block for block, gid in self.shared_gids if gid in groups}
        if not (writable or peer.uid in self.uids or not self.gids.isdisjoint(groups)):
            return None
        return Peer(peer.uid, peer.pid, frozenset(writable))

    def reason(self, uid: int) -> str:
        """Why a user may not attach, and the remedy."""
        if uid == self.unmapped[0]:
            text = f"user {uid} stands for every user without a number in this user namespace"
            return f"{text} (serve --allow-unmapped allows them all)"
        return f"user {uid} may not attach here (serve --allow-uid {uid} allows it)"

    def _groups(self, connection: socket.socket, own: int) -> frozenset[int]:
        """The groups that it had when it connected; empty where no group matters."""
        if not (self.gids or self.shared_gids):
            return frozenset()
        return (descriptors.peer_groups(connection) | {own}) - {self.unmapped[1]}


@dataclass(slots=True)
class Allowance:
    """A token bucket. It may go below 0 once; then it is empty until it is filled again."""

    rate: float
    most: float
    left: float
    at: float
    slot: float = 0.0  # when the last connection that waits for it may be read

    def fill(self, now: float) -> None:
        self.left, self.at = min(self.most, self.left + (now - self.at) * self.rate), now

    def reserve(self, now: float) -> float:
        """When to look again, one after the other; 0: something is left now."""
        if self.left > 0:
            return 0.0
        self.slot = max(self.slot, now - self.left / self.rate) + 1 / self.rate
        return self.slot


@dataclass(slots=True)
class Refusals:
    """Refusals of one user that are not reported yet, and when they will be: ever more rarely while they go on."""

    reason: str = ""
    count: int = 0
    due: float = 0.0
    wait: float = 0.5
    banned: str = ""


@dataclass(slots=True)
class Admission:
    """Judges peers, and counts what the users among them ask for."""

    allow: AllowList
    bans: Bans = field(default_factory=lambda: Bans(access_list.MOST_USERS))
    closer: Closer = field(default_factory=Closer)
    _connects: dict[int, Allowance] = field(default_factory=dict)
    _work: dict[int, Allowance] = field(default_factory=dict)
    refusals: Counter[str] = field(default_factory=Counter)
    """How many, by the code of the refusal."""
    _refusals: dict[int, Refusals] = field(default_factory=dict)

    def admit(self, connection: socket.socket, now: float) -> Peer | bytes:
        """The peer of a new connection, or the refusal to send to it, which is counted."""
        named = descriptors.peer_credentials(connection)
        try:
            peer = self.allow.check(connection, named)
        except OSError as error:
            return self._refuse(
                named.uid, now, "failed", f"the connecting process cannot be identified: {error.strerror}"
            )
        if peer is None:
            return self._refuse(named.uid, now, "denied", self.allow.reason(named.uid))
        if peer.uid != self.allow.own:
            allowance = _allowance(self._connects, peer.uid, CONNECTS_PER_SECOND, MOST_CONNECTS, now)
            if allowance.left < 1:
                text = f"user {peer.uid} connects more often than {CONNECTS_PER_SECOND:.0f} times a second"
                return self._refuse(peer.uid, now, "limit", f"{text}; try again in a moment")
            allowance.left -= 1
            if self.closer.held(peer.uid) > MOST_HELD or self.closer.seconds(peer.uid) > LONGEST_CLOSE:
                self._keep_out(peer.uid, now)
                return self._refuse(peer.uid, now, "limit", _not_closed(peer.uid))
        return peer

    def _refuse(self, uid: int, now: float, code: str, reason: str) -> bytes:
        self.refused(uid, code, reason)
        seconds = self._ban(uid, now)
        if seconds and uid in self._refusals:
            self._refusals[uid].banned = f"; it connects without end, so the kernel keeps it out for {seconds:g} s"
        return _encoded(code, reason)

    def _ban(self, uid: int, now: float) -> float:
        return self.bans.refused(uid, now) if uid not in (0, self.allow.own) else 0.0

    def check_bans(self, now: float) -> None:
        """Renew the bans of users whose descriptors cannot be closed, and notice those that have ended. A connection in
        which there is a descriptor could only be kept: they would use up ours."""
        for uid in self.closer.stuck(LONGEST_CLOSE):
            if self._keep_out(uid, now):
                self.refused(uid, "limit", f"{_not_closed(uid)}; the kernel keeps this user out until it is closed")
        self.bans.check(now)

    def _keep_out(self, uid: int, now: float) -> bool:
        return uid not in (0, self.allow.own) and self.bans.keep_out(uid, now + FIRST_SECONDS, now)

    def has_left(self, uid: int, now: float) -> None:
        """A peer had closed its connection before it was accepted. For a ban that counts as a refusal: it fills the
        backlog as fast."""
        if seconds := self._ban(uid, now):
            text = f"user {uid} connects and leaves without end, so the kernel keeps it out for {seconds:g} s"
            self.refused(uid, "limit", text)

    def hold(self, uid: int, now: float) -> float:
        """Until when a connection of this user is not read; 0: it may be read now."""
        if uid == self.allow.own:
            return 0.0
        return _allowance(self._work, uid, WORK_PER_SECOND, MOST_WORK, now).reserve(now)

    def count(self, uid: int, message: Message | object) -> None:
        """Count a message that was read; ``hold`` was called before."""
        if (allowance := self._work.get(uid)) is not None:
            allowance.left -= WORKER_WORK if isinstance(message, STARTS_A_WORKER) else 1

    def refused(self, uid: int, code: str, reason: str) -> None:
        """Count a refusal; ``reports`` tells of it."""
        self.refusals[code] += 1
        if uid not in self._refusals and len(self._refusals) >= MOST_USERS:
            uid = OTHERS
        entry = self._refusals.setdefault(uid, Refusals())
        entry.reason, entry.count = reason, entry.count + 1

    def reports(self, now: float) -> list[tuple[int, str, int]]:
        """What is to be reported by now: user (or OTHERS), reason, number of refusals."""
        reports = []
        for uid, entry in list(self._refusals.items()):
            if now < entry.due:
                continue
            if entry.count == 0:
                del self._refusals[uid]  # quiet for as long as its last wait
                continue
            reports.append((uid, entry.reason + entry.banned, entry.count))
            entry.wait = min(LONGEST_WAIT, 2 * entry.wait)
            entry.count, entry.due, entry.banned = 0, now + entry.wait, ""
        return reports


def _not_closed(uid: int) -> str:
    return f"a descriptor that user {uid} has sent cannot be closed: its close waits (SO_LINGER, FUSE)"


@lru_cache(MOST_USERS)
def _encoded(code: str, reason: str) -> bytes:
    return encode(Refused(code, reason))


def _allowance(known: dict[int, Allowance], uid: int, rate: float, most: int, now: float) -> Allowance:
    """The filled allowance of a user. Full ones are forgotten when there are too many; at worst all users beyond
    MOST_USERS share one."""
    found = known.get(uid)
    if found is None:
        if len(known) >= MOST_USERS:
            for other, allowance in list(known.items()):
                allowance.fill(now)
                if allowance.left >= most:
                    del known[other]
        if len(known) >= MOST_USERS:
            uid = OTHERS
        found = known.setdefault(uid, Allowance(rate, most, most, now))
    found.fill(now)
    return found
