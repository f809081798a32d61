"""What a person asks of a probe, and what the back-end is, learnt in a first connection."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from postcopy_protocol.vhost_conversation import FrontEnd, Question
from postcopy_protocol.vhost_user import FEATURE_INDIRECT, ProtocolFeature, feature_names

from ...errors import BadInput, VhostUserError
from .. import blk
from ..channel import Channel, close_frame, somebody_listens
from .plan import Wishes
from .report import Report

LET_GO_SECONDS = 10.0
SMALLEST_DISK = 1024
"""Sectors."""
MOST_QUEUES = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """What the person wants. ``disk`` has the contents that reads are compared with; ``rate`` is requests a second
    (0: as fast as they are answered); ``duration`` in seconds (0: until all are done)."""

    socket: str
    device: str = "blk"
    disk: str | None = None
    requests: int = 1000
    queues: int = 0
    depth: int = 16
    rate: float = 0.0
    duration: float = 0.0
    writes: bool = False
    kills: int = 0
    delays: int = 0
    delay: float = 0.1
    seed: int = 1
    timeout: float = 30.0
    pid: int | None = None
    order: str = "standard"


def look_ahead(settings: Settings, report: Report) -> Wishes:
    """Ask the back-end what it is, note it in the report, and decide what is to be done. Raises as ``BackEnd``."""
    with closing(Channel(settings.socket, settings.timeout)) as channel:
        credentials = channel.credentials
        shown = {"program": program_of(settings.pid or credentials.pid), "pid": credentials.pid}
        report.figures["back_end"] = shown
        visit = _Visit(channel)
        visit.agree(report, shown)
        sectors = visit.sectors(shown) if settings.device == "blk" else 0
        if sectors and settings.disk is not None:
            check_disk(settings.disk, sectors * blk.SECTOR)
        offered, queues = visit.talk.offered, visit.talk.queues
    settle(settings.socket)
    if settings.device != "blk":
        return Wishes(0, 1, 1, SMALLEST_DISK, False, False, after=0)
    queues = min(settings.queues or queues, queues, MOST_QUEUES)
    writes = settings.writes and not offered & blk.READ_ONLY
    indirect = bool(offered & FEATURE_INDIRECT)
    return Wishes(settings.requests, queues, settings.depth, sectors, writes, indirect, settings.seed)


class _Visit:
    """A first connection: features, queues, the disk's size; no memory."""

    def __init__(self, channel: Channel) -> None:
        self.talk = FrontEnd()
        self._channel = channel

    def ask(self, question: Question) -> Any:
        frame = self._channel.ask(question)
        if frame is None:
            return None
        try:
            return self.talk.heard(question, frame)
        except BaseException:
            close_frame(frame)
            raise

    def agree(self, report: Report, shown: dict[str, Any]) -> None:
        talk = self.talk
        shown["features"] = f"{self.ask(talk.get_features()):#x}"
        report.hold("protocol-features")
        try:
            self.ask(talk.get_protocol_features())
        finally:
            shown["protocol_features"] = feature_names(talk.protocol_offered)
        report.hold("pagefault", "reply-ack")
        self.ask(talk.set_protocol_features())
        self.ask(talk.set_owner())
        if talk.protocol & ProtocolFeature.MQ:
            self.ask(talk.get_queue_num())
        shown["queues"] = talk.queues

    def sectors(self, shown: dict[str, Any]) -> int:
        if not self.talk.protocol & ProtocolFeature.CONFIG:
            raise VhostUserError(
                "config", "the device has no configuration space: it is no virtio-blk (try --device none)"
            )
        sectors = blk.capacity(self.ask(self.talk.get_config(0, blk.CONFIG_BYTES)))
        shown["sectors"] = sectors
        if sectors < SMALLEST_DISK:
            raise VhostUserError(
                "config", f"a disk of {sectors} sectors is too small to probe: at least {SMALLEST_DISK}"
            )
        return sectors


def check_disk(path: str, size: int) -> None:
    """Raises OSError where it cannot be read, BadInput where it is not the disk of a device of ``size`` bytes."""
    with open(path, "rb") as disk:
        length = disk.seek(0, os.SEEK_END)
    if length < size:
        raise BadInput(f"--disk {path} has {length} bytes, the device {size}: it is another disk")


def settle(path: str) -> None:
    """Let the back-end notice that a connection has ended, and listen again."""
    limit = time.monotonic() + LET_GO_SECONDS
    time.sleep(0.05)
    while not somebody_listens(path) and time.monotonic() < limit:
        time.sleep(0.02)


def program_of(pid: int) -> str:
    """For people."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
            return name.read().strip()
    except OSError:
        return "unknown program"
