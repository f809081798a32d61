"""Taking over: the custodian of a dead supervisor hands over everything that it keeps, and a plan is made from it.

Clients that no custodian knows, because that died too, are found by the records in the runtime directory (``rescue``).

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
from dataclasses import dataclass, field, replace

from postcopy_kernel import crashpoints, descriptors, memory, process
from postcopy_kernel.filestamp import Stamp
from postcopy_kernel.userfaultfd import UserfaultfdUnavailable, open_device
from postcopy_protocol import counters, stages, trace
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.errors import BadInput, BadMessage, BadVersion
from postcopy_protocol.messages import Dismiss, InventoryEnd, Kept, TakeOver, WorkerForked
from postcopy_protocol.sources import FileSource, QemuRamSource, Source

from ..settings import Settings
from . import plan, records, rescue
from .plan import FileFacts, Inventory, KeptBlock, KeptWorker, Plan
from .records import Left

log = logging.getLogger("postcopy")

PATIENCE = 20.0  # seconds for the whole inventory; a custodian on a busy machine needs some milliseconds
MESSAGE_BYTES = 1 << 18
FAR = 1 << 20  # first client number where those of the predecessor cannot be known
ADVICE = "nothing is changed; recover with the version that served here before, or start afresh with --abandon"


Stored = dict[str, tuple[int, ...]]


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


def enter(path: str, settings: Settings, stored: Stored) -> tuple[Custodian | None, Plan]:
    """Look for a custodian at ``path``, and for clients of a service that has died altogether, and decide what to do
    with them by ``settings``; None: there is no custodian. ``stored``: descriptors of the service manager's store, by
    key. Raises BadInput, and then has changed nothing."""
    try:
        left = records.read(settings.directory)
        custodian = find(path)
    except BadInput as error:
        if not settings.abandon:
            raise
        return _abandon(path, settings, FAR, str(error))
    if settings.abandon:
        _close(stored)
        return _leave(path, settings, left, custodian)
    orphans = rescue.living(left, custodian.kept if custodian is not None else ())
    try:
        if orphans and not settings.recover:
            raise BadInput(
                f"{len(orphans)} clients in {settings.directory} wait for a service whose processes have all died: "
                "rescue them with --recover, or leave them with --abandon (their missing pages wait for ever)"
            )
        if custodian is None and not orphans:
            _close(stored)
            if settings.recover:
                log.info("nothing to recover in %s: starting afresh", settings.directory)
            return None, plan.fresh(settings.sources)
        return _enter(custodian, settings, left, orphans, stored)
    except BaseException:
        if custodian is not None:
            custodian.leave()
        raise
    finally:
        descriptors.close_all(orphan.pidfd for orphan in orphans)


def _leave(path: str, settings: Settings, left: Left, custodian: Custodian | None) -> tuple[None, Plan]:
    """--abandon, with what is there."""
    kept, workers = (custodian.kept, custodian.workers) if custodian is not None else ({}, [])
    if custodian is not None:
        custodian.leave()
    if custodian is None and not left.clients:
        return None, plan.fresh(settings.sources)
    first_client = plan.numbers_after((*kept, *left.clients), workers)
    return _abandon(path, settings, first_client, f"{len(workers)} workers go on with their clients")


def _abandon(path: str, settings: Settings, first_client: int, why: str) -> tuple[None, Plan]:
    log.warning("what the last supervisor left is abandoned: %s", why)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return None, plan.fresh(settings.sources, first_client)


def _close(stored: Stored) -> None:
    for fds in stored.values():
        descriptors.close_all(fds)


def _enter(
    custodian: Custodian | None, settings: Settings, left: Left, orphans: list[rescue.Found], stored: Stored
) -> tuple[Custodian | None, Plan]:
    kept, workers = (dict(custodian.kept), custodian.workers) if custodian is not None else ({}, [])
    if custodian is None:
        kept = from_store(stored, left)
    else:
        _close(stored)  # the same descriptors
    if lost := [orphan for orphan in orphans if orphan.key not in kept]:
        kept |= _rescued(kept, settings, left, lost)
    elif orphans:
        log.warning("%d clients waited for a service whose processes have all died: they were stored", len(orphans))
    found = plan.read(kept, workers)
    descriptors.close_all(kept.pop(plan.CGROUPS, (b"", ()))[1])  # the settings name those of this supervisor
    alive = {client.note.client for client in found.clients if not process.pidfd_exited(client.fds[1])}
    if settings.recover and found.shared:
        chosen = judge(found, settings, alive)
        crashpoints.at("takeover.judged")
        rescue.end_survivors(left, [worker.pid for worker in workers])
        crashpoints.at("rescue.alone")
        for key in chosen.forgotten:
            descriptors.close_all(kept[key][1])
        return custodian, replace(chosen, rescued=frozenset(orphan.note.client for orphan in orphans))
    if alive:
        raise BadInput(
            f"{len(alive)} clients of a dead supervisor are still served in {settings.directory}: take them over "
            "with --recover, or do not with --abandon (their workers go on with local blocks)"
        )
    assert custodian is not None
    custodian.dismiss()
    return None, plan.fresh(settings.sources, plan.numbers_after(kept, workers))


def from_store(stored: Stored, left: Left) -> rescue.Kept:
    """What the service manager had stored, with the notes of the records. A key without its record, or with another
    number of descriptors, is left out."""
    kept: rescue.Kept = {}
    for key, fds in stored.items():
        if key in left.clients and len(fds) in (3, 4, 5):
            kept[key] = left.clients[key].record.note, fds
        elif key in left.blocks and len(fds) == plan.descriptors_of(left.blocks[key].note):
            kept[key] = left.blocks[key].record.note, fds
        elif key in (plan.SHARED, plan.ZERO, plan.CGROUPS):
            kept[key] = b"", fds
        else:
            descriptors.close_all(fds)
    if len(kept.get(plan.SHARED, (b"", ()))[1]) not in (plan.WITHOUT_DEVICE, plan.WITH_DEVICE):
        for _, fds in kept.values():
            descriptors.close_all(fds)
        return {}
    return kept


def _rescued(kept: rescue.Kept, settings: Settings, left: Left, orphans: list[rescue.Found]) -> rescue.Kept:
    """What is fetched from living clients, with descriptors that no client has."""
    figures = trace.FIGURES_BYTES if settings.record else stages.END
    found = rescue.fetch(left, orphans, kept, settings.sources, figures, bool(settings.foreign_clients))
    crashpoints.at("rescue.fetched")
    log.warning("%d clients waited for a service whose processes have all died: they are rescued", len(orphans))
    if plan.SHARED not in kept:
        control = memory.create_memfd("postcopy-control", counters.PAGE_BYTES)
        found[plan.SHARED] = b"", (descriptors.create_eventfd(), control, *_device())
    return found


def _device() -> tuple[int, ...]:
    try:
        return (open_device(),)
    except UserfaultfdUnavailable:
        return ()  # the system call may work


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
