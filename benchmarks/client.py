"""One client process of a benchmark: it attaches (or becomes a client of the C floor) and does what it is told.

Run as ``python -m benchmarks.client SPEC`` with SPEC a JSON object:

* ``parent``: pid of the harness, whose end is this process's end
* ``library``: the compiled toucher.c; ``file``: what the block must hold; ``length``: bytes, a multiple of a page
* ``handler``: the floor's command: it is started with ``USERFAULTFD FILE ADDRESS LENGTH MEMORY`` as this client's
  handler; ``mode`` is then how the client maps (shared, unless told)
* or ``runtime_dir``, ``block``, ``mode``: attach to a running supervisor by :func:`postcopy.attach`; without ``block``
  attach when told to ``join``

It writes ``{"ready": ...}``, then answers each JSON line on stdin with one on stdout, and ends at the end of stdin.
The touching itself is C (see toucher.c); Python only says where, so that floor and service are measured alike.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from postcopy_kernel.process import die_with_parent

PAGE = 4096
Answer = dict[str, Any]


class Toucher:
    """toucher.c, loaded: every call releases the GIL."""

    def __init__(self, library: str) -> None:
        self._c = ctypes.CDLL(library, use_errno=False)
        self._c.read_through.restype = ctypes.c_uint64
        self._c.wrong_pages.restype = ctypes.c_uint64

    def touch(self, base: int, offsets: Sequence[int], start: int = 0) -> Answer:
        """Touch one byte at every offset; nanoseconds of each, and the span of them all."""
        wanted = (ctypes.c_uint64 * len(offsets))(*offsets)
        took = (ctypes.c_uint64 * len(offsets))()
        span = (ctypes.c_uint64 * 2)()
        count = ctypes.c_uint64(len(offsets))
        self._c.touch(ctypes.c_void_p(base), wanted, count, ctypes.c_uint64(start), took, span)
        return {"ns": list(took), "span": list(span)}

    def read_through(self, base: int, length: int) -> Answer:
        """Read every word of a range in order; the sum is returned to be compared with the file's."""
        span = (ctypes.c_uint64 * 2)()
        total = self._c.read_through(ctypes.c_void_p(base), ctypes.c_uint64(length), span)
        return {"sum": total, "span": list(span)}

    def touch_missing(
        self, base: int, offsets: Sequence[int], wanted: int, interval: int
    ) -> tuple[list[int], list[int]]:
        """Touch missing pages, one every ``interval`` ns; the offsets that were touched and how long each took."""
        candidates = (ctypes.c_uint64 * len(offsets))(*offsets)
        touched, took = (ctypes.c_uint64 * wanted)(), (ctypes.c_uint64 * wanted)()
        count, most, pause = (ctypes.c_uint64(number) for number in (len(offsets), wanted, interval))
        done = self._c.touch_missing(ctypes.c_void_p(base), candidates, count, most, pause, touched, took)
        if done < 0:
            raise OSError(-done, os.strerror(-done))
        return touched[:done], took[:done]

    def peer(self, name: str, path: str, length: int) -> Answer:
        """``read_mapped`` or ``read_copied``: the same reading of a warm file without any of us."""
        span = (ctypes.c_uint64 * 2)()
        result = getattr(self._c, name)(path.encode(), ctypes.c_uint64(length), span)
        if result < 0:
            raise OSError(-result, os.strerror(-result), path)
        return {"span": list(span)}

    def kill_and_touch(self, pidfd: int, address: int) -> int:
        """SIGKILL through a pidfd, then touch a missing page: nanoseconds until the byte is there."""
        took = ctypes.c_uint64()
        result = self._c.kill_and_touch(pidfd, ctypes.c_void_p(address), ctypes.byref(took))
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return took.value

    def wrong_pages(self, base: int, truth: int, offsets: Sequence[int]) -> int:
        """How many of these pages are not what the file says."""
        wanted = (ctypes.c_uint64 * len(offsets))(*offsets)
        arguments = ctypes.c_void_p(base), ctypes.c_void_p(truth), wanted, ctypes.c_uint64(len(offsets))
        return int(self._c.wrong_pages(*arguments, ctypes.c_uint64(PAGE)))

    def become_floor_client(self, memory: int, length: int, private: bool) -> tuple[int, int]:
        """Map and register as a client of the floor: the address and the userfaultfd."""
        base = ctypes.c_void_p()
        result = self._c.become_floor_client(memory, ctypes.c_uint64(length), private, ctypes.byref(base))
        if result < 0:
            raise OSError(-result, os.strerror(-result), "userfaultfd")
        return base.value or 0, result


class Client:
    """The mapping under test."""

    def __init__(self, spec: Answer) -> None:
        self.spec = spec
        self.c = Toucher(spec["library"])
        self.length: int = spec["length"]
        self.base = 0
        self._held: list[Any] = []
        self._supervisor: Any = None
        self._sum: int | None = None
        with open(spec["file"], "rb") as file:
            self._truth = _mapped(file.fileno(), self.length)
        self.truth = ctypes.addressof(ctypes.c_char.from_buffer(self._truth))
        if spec.get("handler"):
            self._join_floor()
        elif spec.get("block"):
            self._join_product()
        elif spec.get("runtime_dir"):
            import postcopy.client  # noqa: F401  # so that a later join is not the import's time

    def _join_floor(self) -> None:
        memory = self.spec.get("memory", -1)
        if memory < 0:
            memory = os.memfd_create("floor")
            os.truncate(memory, self.length)
        private = self.spec.get("mode") == "private"
        self.base, userfaultfd = self.c.become_floor_client(memory, self.length, private)
        told = [str(userfaultfd), self.spec["file"], hex(self.base), str(self.length), str(memory)]
        command = [*self.spec["handler"], *told]
        handler = subprocess.Popen(command, pass_fds=[userfaultfd, memory], stdout=subprocess.PIPE)
        assert handler.stdout is not None
        if not handler.stdout.readline():
            raise RuntimeError(f"the handler ended before it was ready: {command}")
        # Without its handler a touch would wait for ever. A thread that sleeps costs the toucher nothing, measured.
        threading.Thread(target=_end_with, args=(handler,), daemon=True).start()

    def _join_product(self) -> None:
        import postcopy

        block = postcopy.attach(self.spec["block"], runtime_dir=self.spec["runtime_dir"], mode=self.spec["mode"])
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(block.buf))
        self._held.append(block)

    def touch(self, order: Answer) -> Answer:
        """Random touches: ``count`` different pages of ``pages`` (first, behind the last), chosen by ``seed``."""
        first, behind = order.get("pages", (0, self.length // PAGE))
        pages = random.Random(order["seed"]).sample(range(first, behind), order["count"])
        offsets = [page * PAGE for page in pages]
        answer = self.c.touch(self.base, offsets, order.get("start", 0))
        answer["wrong"] = self.c.wrong_pages(self.base, self.truth, offsets)
        return answer

    def touch_missing(self, order: Answer) -> Answer:
        """Touch at most ``count`` missing pages of the block, ``rate`` a second, in the order that ``seed`` gives."""
        pages = list(range(self.length // PAGE))
        random.Random(order["seed"]).shuffle(pages)
        interval = 1_000_000_000 // order["rate"]
        touched, took = self.c.touch_missing(self.base, [page * PAGE for page in pages], order["count"], interval)
        return {"ns": took, "wrong": self.c.wrong_pages(self.base, self.truth, touched)}

    def touch_file(self, order: Answer) -> Answer:
        """``touch`` on a mapping of the file itself, made for it."""
        with open(self.spec["file"], "rb") as file:
            mapped = _mapped(file.fileno(), self.length)
        pages = random.Random(order["seed"]).sample(range(self.length // PAGE), order["count"])
        return self.c.touch(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), [page * PAGE for page in pages])

    def read_file(self, order: Answer) -> Answer:
        """``touch_file`` by pread of one page each."""
        took = []
        with open(self.spec["file"], "rb") as file:
            descriptor, clock, into = file.fileno(), time.perf_counter_ns, [bytearray(PAGE)]
            for page in random.Random(order["seed"]).sample(range(self.length // PAGE), order["count"]):
                begun = clock()
                os.preadv(descriptor, into, page * PAGE)
                took.append(clock() - begun)
        return {"ns": took}

    def begin(self, order: Answer) -> Answer:
        """Attach to ``block`` and touch ``count`` random pages: nanoseconds of both together."""
        import postcopy

        pages = random.Random(order["seed"]).sample(range(self.length // PAGE), order["count"])
        offsets = [page * PAGE for page in pages]
        begun = time.perf_counter_ns()
        with postcopy.attach(order["block"], runtime_dir=self.spec["runtime_dir"]) as block:
            base = ctypes.addressof(ctypes.c_char.from_buffer(block.buf))
            self.c.touch(base, offsets)
            took = time.perf_counter_ns() - begun
            wrong = self.c.wrong_pages(base, self.truth, offsets)
        return {"took": took, "wrong": wrong}

    def begin_eagerly(self, order: Answer) -> Answer:
        """Copy the whole file into fresh memory by read(), then touch ``count`` random pages."""
        pages = random.Random(order["seed"]).sample(range(self.length // PAGE), order["count"])
        offsets = [page * PAGE for page in pages]
        begun = time.perf_counter_ns()
        with open(self.spec["file"], "rb", buffering=0) as file, mmap.mmap(-1, self.length) as memory:
            view, done = memoryview(memory), 0
            while done < self.length:
                done += file.readinto(view[done:]) or 0
            view.release()
            address = ctypes.c_char.from_buffer(memory)
            self.c.touch(ctypes.addressof(address), offsets)
            took = time.perf_counter_ns() - begun
            del address
        return {"took": took}

    def memcpy(self, order: Answer) -> Answer:
        """Copy the mapped file into fresh memory: nanoseconds."""
        self.c.read_through(self.truth, self.length)  # its own page faults are not what is measured
        with mmap.mmap(-1, self.length) as memory:
            address = ctypes.c_char.from_buffer(memory)
            begun = time.perf_counter_ns()
            ctypes.memmove(ctypes.addressof(address), self.truth, self.length)
            took = time.perf_counter_ns() - begun
            del address
        return {"took": took}

    def join(self, order: Answer) -> Answer:
        """Attach to ``block`` in ``mode``."""
        self.spec |= {"block": order["block"], "mode": order["mode"]}
        self._join_product()
        return {}

    def serve(self, order: Answer) -> Answer:
        """Start a supervisor of the installed packages that serves ``source``, and attach to it in ``mode``."""
        import postcopy

        self._supervisor = postcopy.Supervisor({"ram": order["source"]}, **order["options"])
        self.spec["runtime_dir"] = self._supervisor.runtime_dir
        return self.join({"block": "ram", "mode": order["mode"]})

    def close(self) -> None:
        """End the supervisor that ``serve`` has started, and leave its block before."""
        if self._supervisor is not None:
            self._held.pop().close()
            self._supervisor.close()

    def read(self, order: Answer) -> Answer:
        """Read the block in order, once: from page ``first`` to its end, then what is before, beginning at ``start``
        (CLOCK_MONOTONIC, ns)."""
        at = order.get("first", 0) * PAGE
        if "start" in order:
            time.sleep(max(0, order["start"] - time.monotonic_ns()) / 1e9)
        behind, before = self.c.read_through(self.base + at, self.length - at), self.c.read_through(self.base, at)
        self.sum_up(order)
        return {
            "span": [behind["span"][0], before["span"][1]],
            "wrong": int((behind["sum"] + before["sum"]) % (1 << 64) != self._sum),
        }

    def sum_up(self, order: Answer) -> Answer:
        """Work out what ``read`` compares with, once, so that it takes nothing from other clients then."""
        if self._sum is None:
            self._sum = self.c.read_through(self.truth, self.length)["sum"]
        return {}

    def peers(self, order: Answer) -> Answer:
        """The peers of a sequential reading that need no handler."""
        path = self.spec["file"]
        return {name: self.c.peer(name, path, self.length) for name in ("read_mapped", "read_copied")}

    def kill(self, order: Answer) -> Answer:
        """SIGKILL process ``pid`` and touch the missing page ``page`` at once."""
        pidfd = os.pidfd_open(order["pid"])
        try:
            took = self.c.kill_and_touch(pidfd, self.base + order["page"] * PAGE)
        finally:
            os.close(pidfd)
        return {"ns": took, "wrong": self.c.wrong_pages(self.base, self.truth, [order["page"] * PAGE])}

    def rejoin(self, order: Answer) -> Answer:
        """Leave, and attach as a client that is new to everybody."""
        while self._held:
            self._held.pop().close()
        self._join_product()
        return {}

    def attach(self, order: Answer) -> Answer:
        """Attach, read the first byte of a missing page, close: nanoseconds of attach and of attach to first byte."""
        import postcopy

        position = order["page"] * PAGE
        begun = time.perf_counter_ns()
        block = postcopy.attach(order["block"], runtime_dir=self.spec["runtime_dir"], mode=order["mode"])
        attached = time.perf_counter_ns()
        byte = block.buf[position]
        done = time.perf_counter_ns()
        block.close()
        return {"attach": attached - begun, "first_byte": done - begun, "wrong": int(byte != self._truth[position])}


def _mapped(descriptor: int, length: int) -> mmap.mmap:
    """A private mapping of a file that may be larger than the memory of the machine."""
    noreserve = 0x4000  # MAP_NORESERVE has no name in Python 3.11
    return mmap.mmap(descriptor, length, flags=mmap.MAP_PRIVATE | noreserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _end_with(handler: subprocess.Popen[bytes]) -> NoReturn:
    print(f"the floor's handler ended with status {handler.wait()}", file=sys.stderr, flush=True)
    os._exit(1)


def main() -> None:
    """Obey the lines of stdin."""
    spec = json.loads(sys.argv[1])
    die_with_parent(spec["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the harness ends us by closing our stdin
    client = Client(spec)
    orders: dict[str, Callable[[Answer], Answer]] = {
        "touch": client.touch,
        "touch_missing": client.touch_missing,
        "touch_file": client.touch_file,
        "read_file": client.read_file,
        "begin": client.begin,
        "begin_eagerly": client.begin_eagerly,
        "memcpy": client.memcpy,
        "join": client.join,
        "serve": client.serve,
        "read": client.read,
        "sum_up": client.sum_up,
        "peers": client.peers,
        "kill": client.kill,
        "rejoin": client.rejoin,
        "attach": client.attach,
    }
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(orders[order["do"]](order)), flush=True)
    client.close()


if __name__ == "__main__":
    main()
