"""Chaos over a store: the remote block comes from ``peers:HOST/ram1,store:http://.../image``, and all of it fails.

The *store* is an HTTP server in the part of the source: it is killed, it stands still, the line to it is cut; and one
answer in eight is an error, a cut or a changed chunk, or comes late (flaky_store.py). The *host* nearby is a page
source program over the same store with a chunk cache of its own, the *helper* is the program that the supervisor
starts. A monkey of its own kills and stops both, and damages the chunk caches, one of which is too small."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.chaos.deeds import send
from tests.chaos.round import Round
from tests.chaos.stage import END_WITHIN, REMOTE, Stage
from tests.system.service import alive
from tests.system.stores import free_ports

LEFT_OUT = frozenset({"network down"})
"""The line to the store is a relay on this machine. Down for long it would lose chunks, as it must."""
STORE_KINDS = {
    "helper kill": 2,
    "helper stop": 3,
    "host kill": 4,
    "host stop": 4,
    "cache flip": 8,
    "cache cut": 4,
    "cache gone": 3,
}
GAP = 1.5
HELPER_KILLS_APART = 12.0
"""Seconds; the pause before a program is started again doubles with each death of a young one."""
SMALL = 24 << 20


class StoreStage(Stage):
    """``source`` is the store's server."""

    def __init__(self, directory: Path, files: tuple[Path, Path], options: tuple[str, ...]) -> None:
        super().__init__(directory, files, options)
        self.store = directory / "store"
        self.ports = free_ports(2)
        self.caches = self.runtime.with_name(self.runtime.name + "-helper"), directory / "cache-host"
        for cache in self.caches:
            cache.mkdir(mode=0o700)
        self.small = self._small_disk(self.caches[0])
        self.environment["POSTCOPY_CHUNK_CACHE"] = str(self.caches[0])
        self.host: subprocess.Popen[bytes] | None = None
        command = [sys.executable, "-m", "postcopy_sources.storage", "pack", str(files[1]), f"{self.store}/image"]
        subprocess.run(command, check=True, env=self.environment, cwd=directory, stdout=subprocess.DEVNULL)

    def _small_disk(self, place: Path) -> bool:
        """A disk that the chunks do not fit on; False where nothing may be mounted."""
        words = ["mount", "-t", "tmpfs", "-o", f"size={SMALL},mode=0700", "postcopy-chaos", str(place)]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    def _ends(self) -> tuple[str, str]:
        return f"tcp:127.0.0.1:{self.ports[0]}", f"tcp:127.0.0.1:{self.ports[1]}"

    def start_source(self) -> None:
        self.lives["source"] += 1
        words = [str(self.store), str(self.ports[1]), str(self.lives["source"])]
        self.source = self._start("source", "tests.chaos.flaky_store", *words)

    def start_host(self) -> None:
        self.lives["host"] += 1
        words = [f"{REMOTE}=store:http://127.0.0.1:{self.ports[1]}/image", "--listen", f"ipc://{self.runtime}/host"]
        words += ["--chunk-cache", str(self.caches[1]), "--die-with-parent", str(os.getpid())]
        self.host = self._start("host", "postcopy_sources", *words)

    def blocks(self) -> list[str]:
        store = f"store:http://127.0.0.1:{self.ports[0]}/image"
        return [*super().blocks()[:1], f"{REMOTE}=peers:ipc://{self.runtime}/host/{REMOTE},{store}"]

    def start_supervisor(self) -> None:
        if self.host is None:
            self.start_host()
        super().start_supervisor()

    def helper(self) -> int:
        """The program that the supervisor has started; 0: there is none now."""
        pid = self.supervisor.pid if self.supervisor is not None else 0
        with suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if b"store-source-" in Path(f"/proc/{child}/cmdline").read_bytes() and alive(int(child)):
                    return int(child)
        return 0

    def stop(self) -> list[str]:
        found = super().stop()
        if self.host is not None:
            self.host.terminate()
            if status := self.host.wait(END_WITHIN):
                found.append(f"the host ended with {status} on SIGTERM")
        return found

    def close(self) -> None:
        super().close()
        if self.host is not None:
            self.host.wait(10)
        if self.small:
            subprocess.run(["umount", str(self.caches[0])], capture_output=True, check=False)
        shutil.rmtree(self.caches[0], ignore_errors=True)


class StoreRound(Round):
    """A round with a store. What its own monkey does follows the round's seed."""

    stage: StoreStage

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.chance = random.Random(self.seed ^ 0x57043)
        self.due = 0.0
        self.helper_killed = time.monotonic()
        self.later: list[tuple[float, int]] = []  # when a process goes on

    def make_stage(self, options: tuple[str, ...]) -> Stage:
        return StoreStage(self.directory, self.files, options)

    def look_around(self, replacing: bool = True) -> None:
        super().look_around(replacing)
        now = time.monotonic()
        for pair in [pair for pair in self.later if pair[0] <= now or not replacing]:
            self.later.remove(pair)
            send(pair[1], signal.SIGCONT)
        host = self.stage.host
        if host is not None and host.poll() is not None:
            if host.returncode != -signal.SIGKILL and "cannot be used" not in self.stage.log("host")[-2000:]:
                self.note(f"the host ended with {host.returncode}")  # the store was away at its start
            self.stage.start_host()
        if replacing and now > self.due:
            self.due = now + self.chance.expovariate(1 / GAP)
            self.act(self.chance.choices(list(STORE_KINDS), list(STORE_KINDS.values()))[0])

    def act(self, kind: str) -> None:
        who, what = kind.split()
        if who == "cache":
            done = self.damage(what)
        else:
            done = self.hit(who, what)
        self.tally.kills[kind] += done
        self.note(f"store act: {kind} {done}")

    def hit(self, who: str, what: str) -> int:
        pid = self.stage.helper() if who == "helper" else self.stage.host.pid if self.stage.host is not None else 0
        if what == "kill" and who == "helper":
            young = time.monotonic() - self.helper_killed < HELPER_KILLS_APART
            if young or not self.stage.calm(self.deeds.troubled):  # it would never serve
                return 0
            self.helper_killed = time.monotonic()
        if not pid or not send(pid, signal.SIGKILL if what == "kill" else signal.SIGSTOP):
            return 0
        pause = self.chance.uniform(0.05, 3.0) if what == "stop" else 0.0
        if pause:
            self.later.append((time.monotonic() + pause, pid))
        if who == "helper":  # the block pauses
            self.deeds.troubled = max(self.deeds.troubled, time.monotonic() + pause)
        return 1

    def damage(self, what: str) -> int:
        """Some chunks of a cache, as a bad disk or a person would."""
        files = sorted(self.stage.caches[self.chance.randrange(2)].glob("??/*"))
        hit = self.chance.sample(files, min(4, len(files)))
        for file in hit:
            with suppress(OSError):
                size = file.stat().st_size
                if what == "gone":
                    file.unlink()
                elif what == "cut":
                    os.truncate(file, self.chance.randrange(size))
                else:
                    with file.open("r+b") as opened:
                        at = self.chance.randrange(size)
                        opened.seek(at)
                        byte = opened.read(1)[0]
                        opened.seek(at)
                        opened.write(bytes([byte ^ 1 << self.chance.randrange(8)]))
        return len(hit)
