"""What a back-end is and offers, learnt in a first connection without memory."""

from __future__ import annotations

import os
import time
from contextlib import closing
from typing import Any

from postcopy_protocol.vhost_user import FEATURE_INDIRECT, ProtocolFeature, feature_names

from ...errors import BadInput, VhostUserError
from .. import blk
from ..channel import Channel, is_listening
from ..conversation import Conversation
from .plan import PlanSettings
from .report import Report
from .settings import Settings

UNMAP_SECONDS = 10.0
SMALLEST_DISK = 1024
"""Sectors."""
MOST_QUEUES = 16


def inspect_back_end(settings: Settings, report: Report) -> PlanSettings:
    """Ask the back-end for its features, note them in the report, and choose the plan. Raises as ``BackEnd``."""
    with closing(Channel(settings.socket, settings.timeout)) as channel:
        credentials = channel.credentials
        shown = {"program": program_of(settings.pid or credentials.pid), "pid": credentials.pid}
        report.figures["back_end"] = shown
        conversation = Conversation(channel)
        _negotiate(conversation, report, shown)
        sectors = _sectors(conversation, shown) if settings.device == "blk" else 0
        if sectors and settings.disk is not None:
            check_disk(settings.disk, sectors * blk.SECTOR)
        offered, queues = conversation.talk.offered, conversation.talk.queues
    wait_until_listening(settings.socket)
    if settings.device != "blk":
        return PlanSettings(0, 1, 1, SMALLEST_DISK, False, False, after=0)
    queues = min(settings.queues or queues, queues, MOST_QUEUES)
    writes = settings.writes and not offered & blk.READ_ONLY
    indirect = bool(offered & FEATURE_INDIRECT)
    return PlanSettings(settings.requests, queues, settings.depth, sectors, writes, indirect, settings.seed)


def _negotiate(conversation: Conversation, report: Report, shown: dict[str, Any]) -> None:
    """Features and number of queues, noted in the report."""
    talk = conversation.talk
    shown["features"] = f"{conversation.ask(talk.get_features()):#x}"
    report.hold("protocol-features")
    try:
        conversation.negotiate_protocol()
    finally:
        shown["protocol_features"] = feature_names(talk.protocol_offered)
        if talk.protocol:  # chosen only when both are offered
            report.hold("pagefault", "reply-ack")
    shown["queues"] = talk.queues


def _sectors(conversation: Conversation, shown: dict[str, Any]) -> int:
    """Sectors of the disk, from its configuration space."""
    talk = conversation.talk
    if not talk.protocol & ProtocolFeature.CONFIG:
        raise VhostUserError(
            "config", "the device has no configuration space, so it is not virtio-blk (try --device none)"
        )
    sectors = blk.capacity(conversation.ask(talk.get_config(0, blk.CONFIG_BYTES)))
    shown["sectors"] = sectors
    if sectors < SMALLEST_DISK:
        raise VhostUserError("config", f"a disk of {sectors} sectors is too small to probe: at least {SMALLEST_DISK}")
    return sectors


def check_disk(path: str, size: int) -> None:
    """Raises OSError when the file cannot be read, BadInput when it is shorter than the device's ``size`` bytes."""
    with open(path, "rb") as disk:
        length = disk.seek(0, os.SEEK_END)
    if length < size:
        raise BadInput(f"--disk {path} has {length} bytes, but the device has {size}")


def wait_until_listening(path: str) -> None:
    """Wait until the back-end has noticed the end of a connection, and listens again."""
    limit = time.monotonic() + UNMAP_SECONDS
    time.sleep(0.05)
    while not is_listening(path) and time.monotonic() < limit:
        time.sleep(0.02)


def program_of(pid: int) -> str:
    """Name of the process's program."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as name:
            return name.read().strip()
    except OSError:
        return "unknown program"
