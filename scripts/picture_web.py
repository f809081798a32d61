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
MIB = 512
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
        file, handler = Path(directory, "weights.bin"), Path(directory, "slowly.py")
        with file.open("wb") as out:
            for _ in range(MIB):
                out.write(os.urandom(1 << 20))
        handler.write_text("import time\ndef make(offset, length):\n    time.sleep(0.002)\n    return bytes(length)\n")
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

        running = [start("serve", f"weights={file}", "made=handler:slowly:make?size=64M", "--fault-around", "4K")]
        try:
            subprocess.run([*POSTCOPY, "status", "--wait", "30"], env=environ, check=True, stdout=subprocess.DEVNULL)
            for mode in ("private", "shared", "private"):
                running.append(start("cat", "weights", "--mode", mode, POSTCOPY_CLIENT_NAME=f"loader {len(running)}"))
            running.append(start("cat", "made", POSTCOPY_CLIENT_NAME="slow reader"))
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
