"""The end of a client, and of a block for its clients: everything of it is taken away in a safe order.

A client's worker leaves first, then its descriptors are closed. The last reference to a userfaultfd must not be closed
while a thread waits on it: that thread would go on with zeros."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Mapping

from postcopy_kernel import process
from postcopy_kernel.userfaultfd import stuck_faults
from postcopy_protocol import counters
from postcopy_protocol.copied_map import OWN
from postcopy_protocol.messages import Message, RegionGrant, Released

from ..blocks import RamBlock
from ..event_log import RecordEvent
from ..listener import Listener
from ..paging.paging import RemotePaging
from ..pool.worker_pool import WorkerPool
from .client import Client, Clients, send
from .identity import back_end_has_unmapped, has_lost_memory

log = logging.getLogger(__name__)

SILENCE_SECONDS = 10.0  # a client that has not offered a userfaultfd by then is disconnected


class ClientRelease:
    """Removes clients and releases complete blocks. Only the main thread calls it."""

    def __init__(
        self,
        blocks: Mapping[int, RamBlock],
        clients: Clients,
        pool: WorkerPool,
        watcher: Listener,
        waiters: RemotePaging,
        event: RecordEvent,
    ) -> None:
        self._clients, self._pool, self._watcher, self._waiters = clients, pool, watcher, waiters
        self._blocks, self._event = blocks, event

    def send(self, client: Client, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send to a client; one that does not read is treated as disconnected, never waited for."""
        if client.connection is not None and not send(client.connection, message, fds):
            self.on_hang_up(client)

    def on_process_ended(self, pidfd: int) -> None:
        """A pidfd was readable. Its client may have left since, and the number may be the next client's."""
        client = self._clients.by_pidfd.get(pidfd)
        if client is not None and process.pidfd_exited(pidfd):
            self.remove(client, "its process has ended")

    def on_hang_up(self, client: Client) -> None:
        """The connection has ended. If the process is ending, its pidfd reports that in a moment. If it lives, its
        memory is served as long as it lives."""
        self.disconnect(client)
        if client.userfaultfd is None or not (client.regions or client.attaching):
            self.remove(client, "closed its connection")

    def tick(self, at: float) -> None:
        """``at``: when the tick was queued. Messages sent before it have been handled, however late it is by now."""
        for connection, uid in self._clients.take_read():
            self._watcher.close_connection(connection, uid)
        for client in list(self._clients.by_number.values()):
            if client.userfaultfd is None and at - client.since > SILENCE_SECONDS:
                self.remove(client, f"offered no userfaultfd for {SILENCE_SECONDS:.0f} s")
            elif client.connection is not None or client.leaving:
                continue
            elif client.back_end and client.conversation.kind != "vm" and back_end_has_unmapped(client):
                self.remove(client, "the back-end has unmapped its memory")
            elif client.regions and has_lost_memory(client):
                self.remove(client, "its memory is gone (exec)")

    def remove(self, client: Client, why: str) -> None:
        """Take everything of the client away: worker first, then descriptors."""
        if client.leaving:
            return
        client.leaving = True
        level = logging.INFO if client.userfaultfd is not None else logging.DEBUG  # else every connection writes lines
        log.log(level, "client %d (%s, pid %d): %s", client.number, client.name or "unnamed", client.pid, why)
        self.disconnect(client)
        if client.number in self._pool.slots:
            self._pool.leave(client.number)
        else:
            self.close(client)

    def disconnect(self, client: Client) -> None:
        if client.connection is not None:
            self._watcher.forget_connection(client.connection)
            self._clients.by_connection.pop(client.connection, None)
            if not self._clients.leaves_unread(client, client.connection):
                self._watcher.close_connection(client.connection, client.uid)
            client.connection = None

    def failure_reported(self, number: int) -> bool:
        """Its worker reports a page that could not be made. False: the client has ended, and its end reported it."""
        client = self._clients.by_number.get(number)
        if client is not None:
            client.failures_reported += 1
        return client is not None

    def kill(self, number: int, offset: int) -> None:
        """The page at ``offset`` is lost for this client, and it was attached to be killed then. Where we may not, as
        another user, it gets SIGBUS there."""
        client = self._clients.by_number.get(number)
        for region in client.regions if client is not None else ():
            if region.mode == "own-kill" and region.offset <= offset < region.offset + region.length:
                assert client is not None and client.userfaultfd is not None
                try:
                    process.pidfd_signal(client.pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    return
                except OSError:
                    size = self._blocks[region.block].page_size
                    with contextlib.suppress(OSError):  # it has just ended
                        client.userfaultfd.poison(region.address + offset - region.offset, size)

    def _report_failures(self, client: Client) -> None:
        """Report the failures whose reports have not arrived: a client may die of one, and its worker with it. Beyond
        the first few a worker does not report each."""
        page, number = client.counters, client.number
        missing = page[counters.FAILURES] - client.failures_reported if page is not None else 0
        if page is None or missing <= 0:
            return
        why = counters.reason(page)
        where: dict[str, int | str] = {"client": number, "worker": number, "cause": why}
        for block_number, first in counters.denied(page)[-1:]:
            block = self._blocks[block_number]
            where |= {"block": block.name, "offset": first * block.page_size, "length": block.page_size}
        more = "more pages" if client.failures_reported else "pages"
        self._event("handler-failed", f"worker {number}: {missing} {more} could not be made, the last: {why}", **where)

    def close(self, client: Client) -> None:
        """Close the descriptors of a client that has no worker any more."""
        self._report_failures(client)
        self._waiters.left(client.number)
        self._clients.drop(client, self._pool.restarts_of(client.number))
        self._pool.forget(client.number)
        self._watcher.forget_process(client.pidfd)
        os.close(client.pidfd)
        if client.front_end >= 0:
            os.close(client.front_end)
        if client.figures_fd >= 0:
            os.close(client.figures_fd)
        if client.copied_map >= 0:
            os.close(client.copied_map)
        if client.userfaultfd is not None:
            client.userfaultfd.close()

    def release_block(self, block: RamBlock) -> None:
        """End phase of a complete block: its clients run at native speed from now on.

        Every page is in the page cache, so no touch can fault. Only a shared client can make one vanish, by punching a
        hole, which it may do: that writes zeros. UNREGISTER wakes every waiter."""
        for client in list(self._clients.by_number.values()):
            regions = [region for region in client.regions if region.block == block.number and region.mode not in OWN]
            if not regions or client.leaving or any(region in client.attaching for region in regions):
                continue
            assert client.userfaultfd is not None
            self._unpoison(client, block, regions)
            for region in regions:
                try:
                    client.userfaultfd.unregister(region.address, region.length)
                except OSError as error:
                    log.debug("client %d: unregister: %s", client.number, error)  # it is ending, or has unmapped it
                client.regions.remove(region)
                client.released.append(region)
            self._clients.keep(client)
            self.send(client, Released(block.number))
            self._pool.reassign(client.number, bool(client.regions))

    def _unpoison(self, client: Client, block: RamBlock, regions: list[RegionGrant]) -> None:
        """Map pages for which this client got SIGBUS (its handler failed, or it had none) and which another client's
        worker has placed since. Its own worker is about to leave, so the notes are deleted here."""
        assert client.userfaultfd is not None and client.counters is not None
        for page in [page for number, page in counters.denied(client.counters) if number == block.number]:
            offset = page * block.page_size
            for region in regions:
                if region.offset <= offset < region.offset + region.length:
                    try:
                        client.userfaultfd.continue_(region.address + offset - region.offset, block.page_size)
                    except OSError as error:
                        log.debug("client %d: unpoison: %s", client.number, error)
            counters.allow(client.counters, block.number, page)

    def wake_resting(self) -> None:
        """Wake the waiters of quarantined clients without a worker now and then: they find the page if another client's
        worker has placed it, or wait on."""
        for number in self._pool.resting:
            client = self._clients.by_number.get(number)
            if client is None or client.userfaultfd is None:
                continue
            with contextlib.suppress(OSError):  # its memory has just gone, or no descriptor is left to look with
                if stuck_faults(client.userfaultfd.fileno())[1]:
                    for region in client.regions:
                        client.userfaultfd.wake(region.address, region.length)
