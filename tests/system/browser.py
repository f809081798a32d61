"""A real headless Chromium, driven over its DevTools protocol by aiohttp: no driver program is needed."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-headless-shell")
SIZE = (1180, 640)


class Browser:
    """``async with Browser() as browser``: one page."""

    async def __aenter__(self) -> Browser:
        assert PROGRAM is not None, "no chromium here: run scripts/install --test"
        self._profile = tempfile.mkdtemp(prefix="pcb-", dir="/tmp")
        words = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        words += ["--remote-debugging-port=0", f"--user-data-dir={self._profile}"]
        words += [f"--window-size={SIZE[0]},{SIZE[1]}", "about:blank"]
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._session, self._number = aiohttp.ClientSession(), 0
        port = Path(self._profile, "DevToolsActivePort")
        await self.until(lambda: port.exists() and port.read_text().count("\n") > 0, "the browser listens")
        host = f"http://127.0.0.1:{port.read_text().split()[0]}"
        async with self._session.put(f"{host}/json/new?about:blank") as answer:
            page = await answer.json(content_type=None)
        self._page = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._page.close()
        await self._session.close()
        self._process.terminate()
        self._process.wait(30)
        shutil.rmtree(self._profile, ignore_errors=True)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and its result."""
        self._number += 1
        await self._page.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            answer = await self._page.receive_json(timeout=60)
            if answer.get("id") == self._number:
                return dict(answer["result"])

    async def evaluate(self, script: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=script)
        return answer["result"].get("value")

    async def open(self, link: str) -> None:
        await self.call("Page.navigate", url=link)

    async def press(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def picture(self) -> bytes:
        """A PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])

    async def wait_for(self, script: str, what: str, within: float = 60.0) -> None:
        """Until the script gives something true in the page."""
        deadline = asyncio.get_running_loop().time() + within
        while not await self.evaluate(script):
            assert asyncio.get_running_loop().time() < deadline, f"not within {within:g} s: {what}"
            await asyncio.sleep(0.1)

    async def until(self, look: Callable[[], object], what: str, within: float = 60.0) -> None:
        deadline = asyncio.get_running_loop().time() + within
        while not look():
            assert asyncio.get_running_loop().time() < deadline, f"not within {within:g} s: {what}"
            await asyncio.sleep(0.05)


def link_of(text: str) -> str:
    """What ``postcopy top --web`` prints."""
    (link,) = re.findall(r"http://\S+", text)
    return str(link)
