"""Making a userfaultfd, the handshake, registering: what the kernel grants and what it refuses."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from postcopy_kernel import memory, userfaultfd
from postcopy_kernel.memory import PAGE_4K as PAGE
from postcopy_kernel.memory import Mapping
from postcopy_kernel.userfaultfd import (
    Feature,
    Ioctl,
    RegisterMode,
    Status,
    UserfaultfdUnavailable,
    is_userfaultfd,
    open_device,
    open_userfaultfd,
    probe_features,
    stuck_faults,
)
from tests.kernel.touching import PATIENCE, Arena, Child, Page, Toucher, next_fault, readable, use_up_descriptors

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

NEEDED = Feature.MISSING_SHMEM | Feature.MINOR_SHMEM | Feature.POISON | Feature.EXACT_ADDRESS
NOBODY = 65534


def test_the_kernel_has_what_the_house_is_built_on() -> None:
    assert probe_features() & NEEDED == NEEDED


def test_the_handshake_gives_all_features_and_enables_only_those_asked_for() -> None:
    with Arena() as arena:  # asked for none, so no thread id
        toucher = Toucher(arena.page(0))
        assert next_fault(arena.ufd).thread == 0
        arena.ufd.zeropage(arena.page(0), PAGE)
        assert toucher.result() == 0
    with Arena(features=Feature.THREAD_ID) as arena:
        toucher = Toucher(arena.page(0))
        assert next_fault(arena.ufd).thread == toucher.thread_id
        arena.ufd.zeropage(arena.page(0), PAGE)
        assert toucher.result() == 0


def test_a_second_handshake_is_refused() -> None:
    with open_userfaultfd() as ufd:
        assert ufd.handshake() == probe_features()
        with pytest.raises(OSError) as caught:
            ufd.handshake()
        assert caught.value.errno == errno.EINVAL


def test_an_unknown_feature_is_refused() -> None:
    with open_userfaultfd() as ufd:
        with pytest.raises(OSError) as caught:
            ufd.handshake(Feature(1 << 60))
        assert caught.value.errno == errno.EINVAL


def test_nothing_works_before_the_handshake() -> None:
    with Mapping.anonymous(PAGE) as mapping, open_userfaultfd() as ufd:
        for call in (lambda: ufd.register(mapping.address, PAGE), lambda: ufd.wake(mapping.address, PAGE), ufd.read):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EINVAL


def test_poll_says_error_before_the_handshake_and_for_a_blocking_descriptor() -> None:
    def poll_of(ufd: userfaultfd.Userfaultfd) -> int:
        poll = select.poll()
        poll.register(ufd, select.POLLIN)
        return sum(event for _, event in poll.poll(0))

    with open_userfaultfd() as ufd:
        assert poll_of(ufd) == select.POLLERR
        ufd.handshake()
        assert poll_of(ufd) == 0
        ufd.set_blocking(True)
        assert poll_of(ufd) == select.POLLERR
    with open_userfaultfd(nonblocking=False) as ufd:
        ufd.handshake()
        assert poll_of(ufd) == select.POLLERR


def test_the_blocking_flag_belongs_to_all_duplicates() -> None:
    with open_userfaultfd() as ufd, userfaultfd.Userfaultfd(os.dup(ufd.fd)) as twin:
        twin.set_blocking(True)
        assert os.get_blocking(ufd.fd)


@pytest.mark.parametrize("make", [open_device, lambda: open_userfaultfd().fd])
def test_descriptors_do_not_cross_an_exec(make: Callable[[], int]) -> None:
    fd = make()
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("mode", "mask"),
    [
        (RegisterMode.MISSING, 0x13C),
        (RegisterMode.WP, 0x17C),
        (RegisterMode.MINOR, 0x1BC),
        (RegisterMode.MISSING | RegisterMode.MINOR, 0x1BC),
    ],
)
def test_what_can_be_done_about_faults_of_shmem(mode: RegisterMode, mask: int) -> None:
    with Arena(mode=mode) as arena:
        assert int(arena.ioctls) == mask
        assert Ioctl.COPY in arena.ioctls


def test_what_can_be_done_about_faults_of_anonymous_memory() -> None:
    with Arena(anonymous=True) as arena:
        assert int(arena.ioctls) == 0x13C
        with pytest.raises(OSError) as caught:
            arena.ufd.register(arena.start, arena.length, RegisterMode.MINOR)
        assert caught.value.errno == errno.EINVAL


def test_a_regular_file_cannot_be_registered() -> None:
    with tempfile.TemporaryFile(dir="/var/tmp") as file, open_userfaultfd() as ufd:
        file.truncate(PAGE)
        ufd.handshake()
        with Mapping.of(file.fileno(), PAGE) as mapping, pytest.raises(OSError) as caught:
            ufd.register(mapping.address, PAGE)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("shift", "length", "mode"), [(1, PAGE, 1), (0, PAGE - 1, 1), (0, 0, 1), (0, PAGE, 0)])
def test_unaligned_empty_and_modeless_ranges_are_refused(shift: int, length: int, mode: int) -> None:
    with Mapping.anonymous(4 * PAGE) as mapping, open_userfaultfd() as ufd:
        ufd.handshake()
        with pytest.raises(OSError) as caught:
            ufd.register(mapping.address + shift, length, RegisterMode(mode))
        assert caught.value.errno == errno.EINVAL


def test_memory_belongs_to_one_userfaultfd() -> None:
    with Arena() as arena, open_userfaultfd() as other:
        other.handshake()
        with pytest.raises(OSError) as caught:
            other.register(arena.start, arena.length)
        assert caught.value.errno == errno.EBUSY
        assert arena.ufd.register(arena.start, arena.length) == arena.ioctls  # again by the same is fine


def test_a_shared_mapping_of_a_read_only_descriptor_cannot_be_registered() -> None:
    fd = memory.create_memfd("read-only", PAGE)
    read_only = memory.reopen(fd, writable=False)
    try:
        with Mapping.of(read_only, PAGE, writable=False) as mapping, open_userfaultfd() as ufd:
            ufd.handshake()
            with pytest.raises(OSError) as caught:
                ufd.register(mapping.address, PAGE)
            assert caught.value.errno == errno.EPERM
    finally:
        os.close(read_only)
        os.close(fd)


def test_only_a_userfaultfd_is_taken_for_one(tmp_path: Path) -> None:
    name = "anon_inode:[userfaultfd]"
    (tmp_path / name).touch()
    impostors = [
        os.open(tmp_path / name, os.O_RDONLY),
        os.memfd_create(name),
        os.eventfd(0),
        os.open("/dev/null", os.O_RDONLY),
        open_device(),
    ]
    try:
        assert not any(is_userfaultfd(fd) for fd in impostors)
        assert not is_userfaultfd(10**6)
        with open_userfaultfd() as ufd:
            assert is_userfaultfd(ufd.fd)
    finally:
        for fd in impostors:
            os.close(fd)


def test_stuck_faults_counts_waiters_read_and_unread() -> None:
    with Arena() as arena:
        assert stuck_faults(arena.ufd.fd) == (0, 0)
        toucher = Toucher(arena.page(0))
        twin = os.dup(arena.ufd.fd)
        try:
            next_fault(arena.ufd)
            assert stuck_faults(twin) == (0, 1)
            arena.ufd.zeropage(arena.page(0), PAGE)
            assert stuck_faults(twin) == (0, 0)
        finally:
            os.close(twin)
        assert toucher.result() == 0


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def test_an_unprivileged_process_makes_one_through_a_given_device_and_not_otherwise() -> None:
    device = open_device()

    def body(_: socket.socket) -> None:
        become_nobody()
        with pytest.raises(UserfaultfdUnavailable, match=r"vm\.unprivileged_userfaultfd"):
            open_userfaultfd()
        with pytest.raises(UserfaultfdUnavailable, match="root"):
            open_device()
        with Mapping.anonymous(PAGE) as mapping, open_userfaultfd(device=device) as ufd:
            ufd.handshake()
            ufd.register(mapping.address, PAGE)
            assert written_from(mapping.address, ufd) == b"x"

    try:
        with Child(body) as child:
            assert child.exit_code() == 0
    finally:
        os.close(device)


def test_in_user_mode_only_a_system_call_on_a_missing_page_fails() -> None:
    def body(_: socket.socket) -> None:
        become_nobody()
        with Mapping.anonymous(PAGE) as mapping, open_userfaultfd(user_mode_only=True) as ufd:
            ufd.handshake()
            ufd.register(mapping.address, PAGE)
            reader, writer = os.pipe()
            with pytest.raises(OSError) as caught:
                os.write(writer, mapping.view())
            assert caught.value.errno == errno.EFAULT
            assert stuck_faults(ufd.fd) == (0, 0)
            assert not readable(reader, 0)

    with Child(body) as child:
        assert child.exit_code() == 0


def written_from(address: int, ufd: userfaultfd.Userfaultfd) -> bytes:
    """What write(2) of one byte at ``address`` writes when its fault, inside the kernel, is answered by ``x``."""
    view = memoryview((ctypes.c_ubyte * 1).from_address(address))
    reader, writer = os.pipe()
    page = Page(b"x")
    thread = threading.Thread(target=os.write, args=(writer, view), daemon=True)
    thread.start()
    try:
        assert ufd.copy(next_fault(ufd).address, page.address, PAGE).status is Status.DONE
        thread.join(PATIENCE)
        assert readable(reader)
        return os.read(reader, 1)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_wrong_device_is_told_in_one_line() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(UserfaultfdUnavailable) as caught:
            open_userfaultfd(device=null)
        assert "pass an open /dev/userfaultfd" in str(caught.value)
        assert "\n" not in str(caught.value)
    finally:
        os.close(null)


def test_a_shortage_of_descriptors_is_no_lack_of_rights() -> None:
    device = open_device()

    def body(_: socket.socket) -> None:
        use_up_descriptors()
        for call in (open_device, lambda: open_userfaultfd(device=device), open_userfaultfd):
            with pytest.raises(OSError) as caught:
                call()
            assert (caught.value.errno, caught.type) == (errno.EMFILE, OSError)

    try:
        with Child(body) as child:
            assert child.exit_code() == 0
    finally:
        os.close(device)


def test_a_missing_device_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userfaultfd, "DEVICE", "/dev/no-such-device")
    with pytest.raises(UserfaultfdUnavailable, match=r"Linux 6\.1"):
        open_device()
    with open_userfaultfd() as ufd:  # root: the system call remains
        assert ufd.handshake()
