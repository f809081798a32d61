#!/usr/bin/env python3
"""Makes docs/top-web.png: ``postcopy top --web`` in a headless Chromium, in the middle of a sequential load.

.venv/bin/python scripts/picture_web.py [FILE.png]        (root, or a user that may serve; chromium)
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.system.browser import Browser, link_of  # noqa: E402

POSTCOPY = [sys.executable, "-P", "-m", "postcopy"]
HANDLER = """
import time
def make(offset, length):
    time.sleep(0.0005)
    return bytes(length)
def slowly(offset, length):
    time.sleep(0.02)
    return bytes(length)
"""
BLOCKS = ("weights=handler:slowly:make?size=128M", "slow=handler:slowly:slowly?size=16M")
PAUSE_SECONDS = 6.0  # of the load, after which the picture is taken


async def take(link: str, target: Path) -> None:
    async with Browser() as browser:
        await browser.open(link + "?fontsize=15")
        await browser.wait_for("document.body.classList.contains('-first-byte')", "the screen is drawn")
        await asyncio.sleep(PAUSE_SECONDS)
        target.write_bytes(await browser.picture())


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "top-web.png"
    with tempfile.TemporaryDirectory(prefix="pcp-", dir="/tmp") as directory:
        Path(directory, "slowly.py").write_text(HANDLER)
        environ = {**os.environ, "POSTCOPY_RUNTIME_DIR": f"{directory}/run"}

        def start(*words: str, **more: str) -> subprocess.Popen[str]:
            out = subprocess.PIPE if "--web" in words else subprocess.DEVNULL
            return subprocess.Popen(
                [*POSTCOPY, *words],
                env={**environ, **more},
                cwd=directory,
                stdout=out,
                stderr=subprocess.DEVNULL,
                text=True,
            )

        running = [start("serve", *BLOCKS, "--fault-around", "4K")]
        try:
            subprocess.run([*POSTCOPY, "status", "--wait", "30"], env=environ, check=True, stdout=subprocess.DEVNULL)
            for mode in ("private", "shared") * 3:
                running.append(start("cat", "weights", "--mode", mode, POSTCOPY_CLIENT_NAME=f"loader {len(running)}"))
            running.append(start("cat", "slow", POSTCOPY_CLIENT_NAME="slow reader"))
            running.append(start("top", "--web", "127.0.0.1:0", "--interval", "0.5"))
            out = running[-1].stdout
            assert out is not None
            asyncio.run(take(link_of(out.readline()), target))
        finally:
            for process in reversed(running):
                process.terminate()
                process.wait(60)
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
