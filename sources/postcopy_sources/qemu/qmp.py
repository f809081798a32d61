"""A VM's monitor: commands by the library ``qemu.qmp``, in a thread of its own: that library is asynchronous."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as LateError
from contextlib import suppress
from typing import Any

from postcopy_protocol.errors import BadInput, PostcopyError, text_of

SECONDS = 20.0  # in which QEMU answers a command
PREPARE_SECONDS = 60.0  # ... and sets up a migration

try:
    from qemu.qmp import ExecuteError, QMPClient, QMPError
except ImportError:  # the extra `qemu` is not installed
    QMPClient = None  # type: ignore[assignment, misc]

Answer = dict[str, Any]
OnEvent = Callable[[str], object]  # receives the name of an event, in the monitor's thread
GONE = "GONE"
"""The event of a QEMU that has ended, which it cannot send."""


class Refused(PostcopyError):
    """QEMU refuses a command, in its own words."""


class Monitor:
    """Connected to the monitor at ``path``. Raises BadInput without the library, PostcopyError when no QEMU answers.

    Example::

        with Monitor("/run/vm/qmp.sock") as monitor:
            print(monitor.execute("query-status")["status"])
    """

    def __init__(self, path: str) -> None:
        if QMPClient is None:
            raise BadInput("--qmp needs the library qemu.qmp: pip install 'postcopy[qemu]'")
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what it logs as errors is raised, too
        self.path = path
        self.on_event: OnEvent = str  # nothing, until there is a listener
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="monitor", daemon=True)
        self._thread.start()
        self._client = QMPClient("postcopy")
        try:
            self._run(self._client.connect(path), SECONDS)
        except (QMPError, OSError, LateError) as error:
            self._stop()
            raise PostcopyError(f"no QEMU answers at the monitor {path}: {_cause(error)}") from None
        watchers = (self._listen(), self._await_end())
        self._watching = [asyncio.run_coroutine_threadsafe(one, self._loop) for one in watchers]
        version = self.execute("query-version")["qemu"]
        self.version: tuple[int, int, int] = (version["major"], version["minor"], version["micro"])

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    def execute(self, command: str, arguments: Answer | None = None, seconds: float = SECONDS) -> Any:
        """The answer to a command. Raises Refused, PostcopyError."""
        try:
            return self._run(self._client.execute(command, arguments), seconds)
        except ExecuteError as error:
            raise Refused(f"QEMU refuses {command}: {text_of(error)}") from None
        except (QMPError, OSError) as error:
            raise PostcopyError(f"the QEMU at {self.path} is gone: {_cause(error)}") from None
        except LateError:
            raise PostcopyError(f"the QEMU at {self.path} does not answer {command} within {seconds:g} s") from None

    def close(self) -> None:
        """Leave the VM as it is."""
        for one in self._watching:
            one.cancel()
        with suppress(Exception):
            self._run(self._client.disconnect(), 2.0)
        self._stop()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, coroutine: Any, seconds: float) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(seconds)

    async def _listen(self) -> None:
        with self._client.listener() as events:
            async for event in events:
                self.on_event(str(event["event"]))

    async def _await_end(self) -> None:
        await self._client.runstate_changed()
        self.on_event(GONE)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2.0)
        if not self._thread.is_alive():
            self._loop.close()


def _cause(error: BaseException) -> str:
    """The system's words where there are some: the library wraps them."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return text_of(error) or type(error).__name__
