"""Taking over: the custodian of a dead supervisor hands over everything that it keeps, and a plan is made from it.

Nothing is changed before the plan is made. A supervisor that gives up before closes the connection, and the custodian
is an orphan again with all it had. So a refusal, a crash or another version costs nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from postcopy_kernel import crashpoints, descriptors, process
from postcopy_kernel.filestamp import Stamp
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadInput, BadMessage, BadVersion
from postcopy_protocol.messages import Dismiss, InventoryEnd, Kept, TakeOver, WorkerForked
from postcopy_protocol.sources import FileSource, QemuRamSource, Source

from ..settings import Settings
from . import plan
from .plan import FileFacts, Inventory, KeptBlock, KeptWorker, Plan

log = logging.getLogger("postcopy")

PATIENCE = 20.0  # seconds for the whole inventory; a custodian on a busy machine needs some milliseconds
MESSAGE_BYTES = 1 << 18
FAR = 1 << 20  # first client number where those of the predecessor cannot be known
ADVICE = "nothing is changed; recover with the version that served here before, or start afresh with --abandon"


@dataclass(slots=True)
class Custodian:
    """A custodian that has answered: its channel, its process, and what it keeps."""

    channel: socket.socket
    pid: int
    pidfd: int
    kept: dict[str, tuple[bytes, tuple[int, ...]]] = field(default_factory=dict)
    workers: list[KeptWorker] = field(default_factory=list)

    def leave(self) -> None:
        """Close the connection: it is an orphan again."""
        self.channel.close()
        for _, fds in self.kept.values():
            descriptors.close_all(fds)
        descriptors.close_all(worker.pidfd for worker in self.workers)
        os.close(self.pidfd)

    def dismiss(self) -> None:
        """End it: it is not needed any more."""
        with contextlib.suppress(OSError):
            descriptors.send_message(self.channel, encode(Dismiss()))
        self.leave()


def find(path: str) -> Custodian | None:
    """The custodian that listens at ``path``, and its inventory; None where none listens. Raises BadInput for one that
    does not answer, or is of another version."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.settimeout(PATIENCE)
    try:
        channel.connect(path)
        custodian = Custodian(channel, descriptors.peer_credentials(channel).pid, descriptors.peer_pidfd(channel))
    except (FileNotFoundError, ConnectionRefusedError, ProcessLookupError):
        channel.close()
        return None
    except OSError as error:
        channel.close()
        raise BadInput(f"the custodian at {path} cannot be reached: {error.strerror or error}") from None
    try:
        channel.setblocking(False)
        descriptors.send_message(channel, encode(TakeOver(os.getpid())))
        crashpoints.at("takeover.asked")
        _collect(custodian)
    except BadVersion as error:
        custodian.leave()
        raise BadInput(f"the custodian (pid {custodian.pid}) is of another version ({error}): {ADVICE}") from None
    except (OSError, BadMessage) as error:
        custodian.leave()
        raise BadInput(f"the custodian (pid {custodian.pid}) does not hand over: {error}; {ADVICE}") from None
    return custodian


def _collect(custodian: Custodian) -> None:
    """Receive the inventory. Raises OSError, BadMessage."""
    deadline = time.monotonic() + PATIENCE
    poll = select.poll()
    poll.register(custodian.channel, select.POLLIN)
    while True:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(f"no message for {PATIENCE:g} s")
        received = descriptors.receive_message(custodian.channel, MESSAGE_BYTES)
        if not received.data:
            raise ConnectionResetError("it closed the connection, as one of another version does")
        message = decode(received.data, expect=(Kept, WorkerForked, InventoryEnd))
        match message:
            case Kept():
                custodian.kept[message.key] = (message.meta, received.fds)
                crashpoints.at("takeover.half")
            case WorkerForked():
                custodian.workers.append(KeptWorker(message.worker, message.incarnation, message.pid, received.fds[0]))
            case InventoryEnd():
                if (message.kept, message.workers) != (len(custodian.kept), len(custodian.workers)):
                    raise BadMessage(f"it sent {len(custodian.kept)} of {message.kept} entries")
                return


def enter(path: str, settings: Settings) -> tuple[Custodian | None, Plan]:
    """Look for a custodian at ``path`` and decide what to do with it by ``settings``; None: start afresh. Raises
    BadInput, and then has changed nothing."""
    try:
        custodian = find(path)
    except BadInput as error:
        if not settings.abandon:
            raise
        return _abandon(path, settings, FAR, str(error))
    if custodian is None:
        if settings.recover:
            log.info("nothing to recover in %s: starting afresh", settings.directory)
        return None, plan.fresh(settings.sources)
    if settings.abandon:
        custodian.leave()
        first_client = plan.numbers_after(custodian.kept, custodian.workers)
        return _abandon(path, settings, first_client, f"{len(custodian.workers)} workers go on with their clients")
    try:
        return _enter(custodian, settings)
    except BadInput:
        custodian.leave()
        raise


def _abandon(path: str, settings: Settings, first_client: int, why: str) -> tuple[None, Plan]:
    log.warning("what the last supervisor left is abandoned: %s", why)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return None, plan.fresh(settings.sources, first_client)


def _enter(custodian: Custodian, settings: Settings) -> tuple[Custodian | None, Plan]:
    found = plan.read(custodian.kept, custodian.workers)
    descriptors.close_all(custodian.kept.pop(plan.CGROUPS, (b"", ()))[1])  # the settings name those of this supervisor
    alive = {client.note.client for client in found.clients if not process.pidfd_exited(client.fds[1])}
    if settings.recover and found.shared:
        chosen = judge(found, settings, alive)
        crashpoints.at("takeover.judged")
        for key in chosen.forgotten:
            descriptors.close_all(custodian.kept[key][1])
        return custodian, chosen
    if alive:
        raise BadInput(
            f"{len(alive)} clients of a dead supervisor are still served in {settings.directory}: take them over "
            "with --recover, or do not with --abandon (their workers go on with local blocks)"
        )
    custodian.dismiss()
    return None, plan.fresh(settings.sources, plan.numbers_after(custodian.kept, custodian.workers))


def judge(found: Inventory, settings: Settings, alive: set[int]) -> Plan:
    """``plan.judge`` with facts about the files."""
    kept_files = {
        kept.note.block: _kept_file(kept) for kept in found.blocks if kept.file >= 0 and not plan.is_copy(kept.note)
    }
    return plan.judge(found, settings.sources, settings.page_size, alive, kept_files, _named_files(settings.sources))


def _kept_file(kept: KeptBlock) -> FileFacts:
    """The file behind the descriptor, with size and time as when it was first served."""
    found = os.fstat(kept.file)
    return FileFacts(
        found.st_dev, found.st_ino, kept.note.source_size, Stamp.from_bytes(kept.note.source_stamp).mtime_ns
    )


def _named_files(sources: Mapping[str, Source]) -> dict[str, FileFacts]:
    facts = {}
    for name, source in sources.items():
        if isinstance(source, FileSource | QemuRamSource):
            with contextlib.suppress(OSError):
                found = os.stat(source.path)
                facts[name] = FileFacts(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    return facts
