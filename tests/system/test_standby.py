"""A custodian whose supervisor is gone: workers go on, dead ones are replaced, and the next supervisor gets all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from postcopy_kernel.descriptors import receive_message, send_message
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import CustodianReady, ForkFailed, Keep, TakeOver, WhenOrphaned, WorkerExited
from postcopy_protocol.runtime_paths import custodian_path
from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.scripted_supervisor import Script
from tests.system.service import PAGE, PuppetError, Service, alive, descriptors, until, word

PAGES = 64


@pytest.fixture
def path(source_file: SourceFile) -> Path:
    return source_file(PAGES * PAGE)


def gone(script: Script) -> bool:
    assert script.process is not None
    return script.process.poll() == 0


def test_workers_go_on_and_dead_ones_are_replaced(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path) as script:
        script.start()
        guests = [script.guest(mode) for mode in ("private", "shared")]
        script.die()
        for round_ in range(3):
            for number, guest in enumerate(guests, 1):
                pid = script.kill_worker(number)
                page = 10 * round_ + number
                assert guest.word(page) == word(page * PAGE)
                assert script.worker(number, but=pid)
                assert len(script.workers(number)) == 1
        for guest in guests:
            assert guest.word(60) == word(60 * PAGE)
            guest.kill()
        until(lambda: gone(script), "the custodian ends with the last client")
        assert not (runtime_dir / "private/custodian").exists()


def test_a_worker_that_the_supervisor_did_not_live_to_replace(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path) as script:
        script.start()
        guest = script.guest()
        script.kill_worker()
        script.hear(WorkerExited)
        guest.begin(5)
        assert guest.waits()
        script.die()
        assert guest.answer() == word(5 * PAGE)


def test_its_end_in_the_middle_of_an_orderly_end(runtime_dir: Path, path: Path) -> None:
    """The workers have been told to leave, nothing is poisoned yet: clients are served as if nobody had said so."""
    with Script(runtime_dir, path) as script:
        script.start()
        guest = script.guest()
        old = script.worker()
        os.eventfd_write(script.quit, 1)
        script.hear(WorkerExited)
        script.die()
        assert guest.word(7) == word(7 * PAGE)
        new = script.worker(but=old)
        time.sleep(0.3)
        assert guest.word(8) == word(8 * PAGE)
        assert script.worker() == new, "it is not told to leave as well"


def test_the_next_supervisor_gets_everything(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path) as script:
        script.start()
        guests = [script.guest() for _ in range(2)]
        assert guests[0].word(3) == word(3 * PAGE)
        inode = os.fstat(script.memory).st_ino
        script.die()
        second = script.kill_worker(2)
        replaced = script.worker(2, but=second)
        found = script.take_over()
        assert set(found.kept) == {"house", "block/1", "client/1", "client/2"}
        assert found.kept["block/1"][0] == b"about the block"
        assert [len(fds) for _, fds in found.kept.values()] == [3, 3, 3, 3]
        assert os.fstat(found.kept["block/1"][1][0]).st_ino == inode
        assert found.workers[1][0] == 1
        assert found.workers[2][:2] == (2, replaced)
        # From here on it is any supervisor's channel, and the dead are this supervisor's to replace.
        killed = script.kill_worker(1)
        assert script.hear(WorkerExited).worker == 1
        guests[0].begin(9)
        assert guests[0].waits() and not script.workers(1)
        script.order(1, 2)
        assert guests[0].answer() == word(9 * PAGE)
        assert script.worker(1, but=killed)
        script.say(Keep("block/1", b"another note"), found.kept["block/1"][1])
        script.die()
        again = script.take_over()
        assert again.kept["block/1"][0] == b"another note"
        assert guests[1].word(11) == word(11 * PAGE)


def test_half_a_take_over_loses_nothing(runtime_dir: Path, path: Path) -> None:
    """Cut off after each message; the last one in the moment between the inventory and the first word."""
    with Script(runtime_dir, path) as script:
        script.start()
        script.say(WhenOrphaned(60_000, False))
        guests = [script.guest() for _ in range(2)]
        script.die()
        whole = 3 + 2 + 1 + 1
        for cut in range(whole + 1):
            sock = script.connect()
            send_message(sock, encode(TakeOver(os.getpid())), wait=True)
            for _ in range(cut):
                for fd in receive_message(sock, wait=True).fds:
                    os.close(fd)
            sock.close()
            pid = script.kill_worker(1)
            assert guests[0].word(cut) == word(cut * PAGE)
            assert script.worker(1, but=pid)
        found = script.take_over()
        assert len(found.kept) == 4 and set(found.workers) == {1, 2}
        assert guests[1].word(20) == word(20 * PAGE)
        script.dismiss()


def test_one_that_connects_and_says_nothing_keeps_nobody_out(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path) as script:
        script.start()
        guest = script.guest()
        script.die()
        silent = [script.connect() for _ in range(3)]
        found = script.take_over()
        assert found.workers
        for sock in silent:
            assert not receive_message(sock, wait=True).data, "shown out"
            sock.close()
        script.die()
        silent = [script.connect() for _ in range(12)]
        until(lambda: "is refused" in script.log(), "not all of them are let in")
        assert guest.word(1) == word(PAGE)
        pid = script.kill_worker()
        assert guest.word(2) == word(2 * PAGE)
        assert script.worker(but=pid)
        for sock in silent[:8]:
            assert not receive_message(sock, wait=True).data, "its time is over"
        for sock in silent:
            sock.close()
        assert script.take_over().workers


NONSENSE = {
    "empty of sense": (b"\xc1", 0),
    "short": (encode(TakeOver(5))[:2], 0),
    "of another version": (b"\x93\x02\x53\x05", 0),
    "another message": (encode(Keep("house", b"")), 0),
    "with a descriptor": (encode(TakeOver(5)), 1),
    "with too many": (encode(TakeOver(5)), 100),
    "too long": (encode(TakeOver(5)) + bytes(100_000), 0),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_stranger_who_talks_nonsense_is_shown_out(runtime_dir: Path, path: Path, what: str) -> None:
    data, count = NONSENSE[what]
    with Script(runtime_dir, path) as script:
        script.start()
        guest = script.guest()
        script.die()
        until(lambda: "the supervisor is gone" in script.log(), "it is noticed")
        assert script.process is not None
        before = len(descriptors(script.process.pid))
        sock = script.connect()
        send_message(sock, data, [sock.fileno()] * count, wait=True)
        answer = receive_message(sock, wait=True)
        assert answer.data == encode(CustodianReady(script.process.pid)), "so another version learns which ours is"
        assert not receive_message(sock, wait=True).data
        sock.close()
        until(lambda: "does not take over" in script.log(), "it is logged")
        assert "Traceback" not in script.log()
        assert len(descriptors(script.process.pid)) == before
        assert script.take_over().workers and guest.word(1) == word(PAGE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_not_let_in(runtime_dir: Path, path: Path) -> None:
    """Even one who passes the directory's mode: here root itself opens it."""
    with Script(runtime_dir, path) as script:
        script.start()
        script.guest()
        script.die()
        for place in (runtime_dir, runtime_dir / "private"):
            place.chmod(0o777)
        (runtime_dir / "private/custodian").chmod(0o777)
        program = (
            "import os, socket, sys; os.setgid(65534); os.setuid(65534);"
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]);"
            "s.settimeout(30); print(s.recv(100))"
        )
        where = custodian_path(str(runtime_dir))
        done = subprocess.run([sys.executable, "-c", program, where], capture_output=True, timeout=60, check=False)
        assert done.stdout.strip() == b"b''" or b"ConnectionReset" in done.stderr, done
        assert "of user 65534 is refused" in script.log()
        assert script.take_over().workers


def test_one_that_reads_nothing_of_what_it_asked_for_is_given_up(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path) as script:
        script.start()
        guest = script.guest()
        for number in range(100, 1100):  # more than fits into a socket
            script.say(Keep(f"note/{number}", bytes(1000)), (script.quit,))
        script.die()
        deaf = script.connect()
        send_message(deaf, encode(TakeOver(1)), wait=True)
        until(lambda: "cannot send the inventory" in script.log(), "it is given up", 30)
        script.kill_worker()
        assert guest.word(1) == word(PAGE)
        found = script.take_over()
        assert len(found.kept) == 1003
        deaf.close()


def test_a_client_that_ends_is_dropped(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path) as script:
        script.start()
        script.say(WhenOrphaned(60_000, False))
        guests = [script.guest() for _ in range(3)]
        script.die()
        os.kill(script.worker(2), signal.SIGSTOP)  # its worker cannot say so
        stopped = script.worker(2)
        for guest in guests[:2]:
            guest.kill()
        until(lambda: not script.workers(1), "its worker ends")
        found = script.take_over()
        assert set(found.kept) == {"house", "block/1", "client/3"}
        assert 1 not in found.workers and 3 in found.workers
        os.kill(stopped, signal.SIGKILL)
        assert guests[2].word(1) == word(PAGE)
        script.dismiss()
        script.die()


def test_the_last_client_ends_while_time_is_left(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path) as script:
        script.start()
        script.say(WhenOrphaned(5000, False))
        guest = script.guest()
        script.die()
        guest.kill()
        found = script.take_over()
        assert "block/1" in found.kept, "what was received is worth keeping"
        script.die()
        until(lambda: gone(script), "the time is over")
        assert not (runtime_dir / "private/custodian").exists()


def test_abandoned_it_ends_with_the_last_client(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path) as script:
        script.start()
        script.say(WhenOrphaned(60_000, False))
        guest = script.guest()
        script.die()
        (runtime_dir / "private/custodian").unlink()
        assert guest.word(1) == word(PAGE)
        guest.kill()
        until(lambda: gone(script), "nobody can take over any more")


def test_dismissed_it_ends_with_the_last_worker(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path) as script:
        script.start()
        script.guest()
        pid = script.worker()
        script.dismiss()
        until(lambda: not (runtime_dir / "private/custodian").exists(), "nobody takes over any more")
        script.die()
        assert alive(pid) and not gone(script)
        os.kill(pid, signal.SIGKILL)
        until(lambda: gone(script), "it ends")


def test_a_new_custodian_adopts_the_workers_of_a_dead_one(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path) as script:
        script.start()
        guests = [script.guest() for _ in range(2)]
        for page, guest in enumerate(guests):
            assert guest.word(page) == word(page * PAGE), "its worker has been told to live"
        first = script.process
        assert first is not None and script.channel is not None
        first.kill()
        first.wait(10)
        script.channel.close()
        script.start()
        assert (runtime_dir / "private/custodian").exists(), "the new one has taken the place"
        for number, guest in enumerate(guests, 1):
            figures = script._mine(os.memfd_create("figures"))
            os.ftruncate(figures, PAGE)
            script.say(Keep(f"client/{number}", b"?"), (guest.ufd.fd, guest.pidfd, figures))
            script.adopt(number)
        script.die()
        pid = script.kill_worker(1)
        assert guests[0].word(4) == word(4 * PAGE)
        assert script.worker(1, but=pid)
        found = script.take_over()
        assert found.workers[1][0] == 2 and found.workers[2][0] == 1
        assert guests[1].word(5) == word(5 * PAGE)


def test_it_does_not_fork_beside_a_life_that_has_not_ended(runtime_dir: Path, path: Path) -> None:
    """A supervisor that had to ask twice."""
    with Script(runtime_dir, path) as script:
        script.start()
        guest = script.guest()
        script.say(script.orders[1].__class__(1, 2, script.orders[1].keys, script.orders[1].assignment))
        refused = script.hear(ForkFailed)
        assert (refused.worker, refused.incarnation) == (1, 2) and "has not ended" in refused.reason
        assert len(script.workers(1)) == 1
        assert guest.word(1) == word(PAGE)


# --- remote blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_a_remote_page_waits_for_the_next_supervisor(runtime_dir: Path, path: Path, mode: str) -> None:
    with Script(runtime_dir, path, remote=True) as script:
        script.bind()
        script.start()
        guest, other = script.guest(mode), script.guest(mode)
        guest.begin(5)
        assert script.asked(1) == [5]
        script.die()
        other.begin(6)
        assert guest.waits() and other.waits()
        killed = script.kill_worker(2)
        script.worker(2, but=killed)
        found = script.take_over()
        script.bind()
        incarnations = {number: worker[0] for number, worker in found.workers.items()}
        assert incarnations == {1: 1, 2: 2}
        memory, received = found.kept["block/1"][1][:2]
        for number, page in ((1, 5), (2, 6)):
            while page not in script.asked(number):  # an older request may come late
                pass
            script.place(memory, received, page)
            script.wake(number, incarnations[number], page)
        assert guest.answer() == word(5 * PAGE) and other.answer() == word(6 * PAGE)
        assert guest.word(6) == word(6 * PAGE), "received pages need nobody"


def test_nobody_comes_and_remote_pages_are_poisoned(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path, remote=True) as script:
        script.bind()
        script.start()
        script.say(WhenOrphaned(300, True))
        guests = [script.guest(mode) for mode in ("private", "shared", "private")]
        script.place(script.memory, script.received, 3)
        guests[0].begin(5)
        assert script.asked(1) == [5]
        old = script.worker(2)
        script.die()
        assert guests[0].socket.recv(64) == b"", "no zeros"
        assert guests[0].exit_code() == -signal.SIGBUS
        script.worker(2, but=old)
        assert guests[1].word(3) == word(3 * PAGE), "what is received is served"
        guests[1].begin(6)
        assert guests[1].socket.recv(64) == b""
        assert guests[1].exit_code() == -signal.SIGBUS
        until(lambda: "are poisoned in 3 clients" in script.log(), "it is said")
        poisoning = script.worker(3)
        assert 3 in script.take_over().workers
        until(lambda: not alive(poisoning), "a supervisor finds no worker that poisons")
        assert script.hear(WorkerExited).worker == 3


def test_nobody_comes_and_remote_pages_wait_on(runtime_dir: Path, path: Path) -> None:
    with Script(runtime_dir, path, remote=True) as script:
        script.bind()
        script.start()
        script.say(WhenOrphaned(100, False))
        guest = script.guest()
        old = script.worker()
        guest.begin(5)
        script.die()
        until(lambda: "wait on in 1 clients" in script.log(), "it is said")
        assert guest.waits() and script.workers(1) == [old]


def test_what_was_poisoned_meanwhile_is_healed(runtime_dir: Path, path: Path) -> None:
    """With a real supervisor, which came too late."""
    slow: dict[str, Any] = {"fault_around": "4K", "background_rate": "0"}
    options: dict[str, Any] = {"orphan_timeout": "0.2", "on_orphan": "poison"}
    with (
        Source(f"ram0={path}") as source,
        Service(runtime_dir, source.block(), **slow, **options) as service,
    ):
        client = service.client()
        assert client.do("words(b, [1])") == [word(PAGE)]
        service.kill()
        until(lambda: "are poisoned in 1 clients" in service.log(), "the time is over")
        with pytest.raises(PuppetError) as told:
            client.do(f"b.ensure({5 * PAGE}, 8)")
        assert told.value.kind == "PageLost"
        service.recover()

        def healed() -> bool:
            try:
                client.do(f"b.ensure({5 * PAGE}, 8)")
            except PuppetError:
                return False
            return True

        until(healed, "the page has come after all")
        assert client.do("words(b, [5, 6])") == [word(5 * PAGE), word(6 * PAGE)]
