"""Which process a peer is by the kernel's word, and the checks on descriptors that name a process.

A client's false statements harm only that client. The kernel names it (SO_PEERCRED, SO_PEERPIDFD), and its descriptors
are examined before any ioctl."""

from __future__ import annotations

import errno
import mmap
import os

from postcopy_kernel import address_space, process
from postcopy_kernel.userfaultfd import Userfaultfd, is_userfaultfd
from postcopy_protocol.attach_conversation import Refusal

from .client import Client


def unidentified(error: OSError) -> Refusal:
    """The refusal of a peer that the kernel could not name."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Refusal("limit", "no room for another client: no descriptor is left (ulimit -n)")
    return Refusal("failed", f"the connecting process cannot be identified: {error.strerror}")


def check_back_end(uid: int, fd: int, pidfd: int) -> int:
    """Check the descriptors of OfferBackEnd; returns the back-end's pid. Raises Refusal unless they are a userfaultfd
    after its handshake, and a pidfd of a process for which the front-end's user may speak."""
    try:
        pid = address_space.pid_of(pidfd)
        owner = address_space.owner_of(pid)
        if process.pidfd_exited(pidfd):  # then the pid may already belong to another process
            raise ValueError("the process is gone")
    except (OSError, ValueError) as error:
        raise Refusal("bad-descriptor", f"the second descriptor of OfferBackEnd names no process: {error}") from None
    if uid not in (0, owner):
        raise Refusal("denied", f"process {pid} is user {owner}'s: a front-end of user {uid} may not speak for it")
    if pid == os.getpid():
        raise Refusal("bad-descriptor", "the second descriptor of OfferBackEnd names the supervisor")
    if not is_userfaultfd(fd):
        raise Refusal("bad-descriptor", "the first descriptor of OfferBackEnd is no userfaultfd")
    try:
        Userfaultfd(fd).wake(1 << 16, mmap.PAGESIZE)  # no thread waits there; EINVAL means: no handshake yet
    except OSError as error:
        raise Refusal("bad-descriptor", f"the back-end's userfaultfd had no handshake: {error.strerror}") from None
    return pid


def may_resume(client: Client, peer: Client) -> bool:
    """Is ``peer`` a new connection of the process that spoke for this client? Pids are not compared: processes in other
    pid namespaces all have 0 here."""
    if client.back_end and (client.connection is not None or peer.conversation.kind != client.conversation.kind):
        return False
    if client.userfaultfd is None or client.speaker < 0 or process.pidfd_exited(client.pidfd):
        return False
    return client.uid == peer.uid and process.is_same_process(client.speaker, peer.pidfd)


def back_end_has_unmapped(client: Client) -> bool:
    """Has a back-end without a front-end unmapped or unregistered all of its regions? Released ones count while they
    are mapped. False where its address space may not be read: such a back-end is served until it ends."""
    if process.pidfd_exited(client.pidfd):
        return True
    waited_for = [(region.address, region.length) for region in client.regions]
    try:
        if any(address_space.maps_memory_at(client.pid, region.address) for region in client.released):
            return False
        return not address_space.any_registered(client.pid, waited_for)
    except PermissionError:
        return False
    except OSError:
        return True


def has_lost_memory(client: Client) -> bool:
    """Is the address space of the userfaultfd gone (exec, exit)? Asked without touching its addresses: a client that
    closed a block while no supervisor ran may have other memory there by now."""
    if process.pidfd_exited(client.pidfd) or client.userfaultfd is None:
        return True
    return not client.back_end and not client.userfaultfd.owner_lives()
