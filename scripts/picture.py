"""``scripts/picture.py FILE.svg``: the screen of ``postcopy top`` while 64 clients touch a real file.

Starts a supervisor for two files and a load test that kills workers. textual draws the screen of ``top`` as SVG, in the
reader's own fixed-width font.
"""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from postcopy.commands.top import StatusReader
from postcopy.supervisor import Supervisor
from postcopy.top.app import Top

SIZE = (112, 34)
CLIENTS, RATE, SECONDS = 64, 25, 14
WEIGHTS, SNAPSHOT = 96 << 20, 40 << 20
LOOKS = 7


def main(target: str) -> None:
    """Write the picture to ``target``."""
    Path(target).open("ab").close()  # fails now and not after a minute
    with tempfile.TemporaryDirectory(prefix="postcopy-picture-") as directory:
        files = {}
        for name, size in (("weights", WEIGHTS), ("snapshot", SNAPSHOT)):
            path = Path(directory) / f"{name}.bin"
            path.write_bytes(random.Random(size).randbytes(size))
            files[name] = path
        with Supervisor(files) as supervisor:
            _load(supervisor.runtime_dir, "snapshot", 2, 4000, 2).wait()
            clients = _load(supervisor.runtime_dir, "weights", CLIENTS, RATE, SECONDS, "--kill-workers", "0.5")
            try:
                drawn = asyncio.run(_draw(supervisor.runtime_dir))
            finally:
                clients.wait()
    # textual's drawing fetches a font from the network: any fixed-width one will do.
    text = re.sub(r"@font-face\s*{[^}]*}", "", drawn)
    Path(target).write_text(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE), "utf-8")


def _load(directory: str, block: str, clients: int, rate: int, seconds: int, *more: str) -> subprocess.Popen[bytes]:
    arguments = ["--block", block, "--clients", str(clients), "--rate", str(rate), "--seconds", str(seconds), *more]
    arguments += ["--mode", "mixed", "--pattern", "zipf" if rate == RATE else "sequential", "--runtime-dir", directory]
    return subprocess.Popen([sys.executable, "-m", "postcopy", "load", *arguments], stdout=subprocess.DEVNULL)


async def _draw(directory: str) -> str:
    reader = StatusReader(directory)
    app = Top(reader.read, interval=1.0)
    limit = time.monotonic() + 120
    try:
        async with app.run_test(size=SIZE) as pilot:
            while len(app.clients) < CLIENTS or min(client["faults"] for client in app.clients) < RATE:
                await pilot.pause(0.1)
                if time.monotonic() > limit:
                    raise SystemExit("the load test did not get going")
            looks = app.looks
            while app.looks < looks + LOOKS:
                await pilot.pause(0.1)
            return app.export_screenshot(title="postcopy top")
    finally:
        reader.close()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except OSError as error:
        raise SystemExit(f"picture: {error.filename}: {error.strerror}") from None
