"""A VM's monitor: commands by the library ``qemu.qmp``, in a thread of its own: that library is asynchronous."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from contextlib import suppress
from typing import Any, cast

from postcopy_protocol.errors import BadInput, PostcopyError, text_of

SECONDS = 20.0  # in which QEMU answers a command
PREPARE_SECONDS = 60.0  # ... and sets up a migration

try:
    from qemu.qmp import ExecuteError, QMPClient, QMPError
except ImportError:  # the extra `qemu` is not installed
    QMPClient = None  # type: ignore[assignment, misc]

Answer = dict[str, Any]
OnEvent = Callable[[str, Answer], object]  # name and data; called in the monitor's thread


class Refused(PostcopyError):
    """QEMU refuses a command, in its own words."""


class Monitor:
    """Connected to the monitor at ``path``. Raises BadInput without the library, PostcopyError when no QEMU answers.

    Example::

        with Monitor("/run/vm/qmp.sock") as monitor:
            print(monitor.execute("query-status")["status"])
    """

    def __init__(self, path: str, on_event: OnEvent | None = None) -> None:
        if QMPClient is None:
            raise BadInput("--qmp needs the library qemu.qmp: pip install 'postcopy[qemu]'")
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what it logs as errors is raised, too
        self.path = path
        self._on_event = on_event
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="monitor", daemon=True)
        self._thread.start()
        self._client = QMPClient("postcopy")
        self._listening: Future[None] | None = None
        try:
            self._run(self._client.connect(path), SECONDS)
        except (QMPError, OSError, LateError) as error:
            self._stop()
            raise PostcopyError(f"no QEMU answers at the monitor {path}: {_cause(error)}") from None
        if on_event is not None:
            self._listening = asyncio.run_coroutine_threadsafe(self._listen(on_event), self._loop)
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

    def submit(self, command: str) -> Future[Any]:
        """The same without waiting."""
        return asyncio.run_coroutine_threadsafe(self._client.execute(command), self._loop)

    def close(self) -> None:
        """Leave the VM as it is."""
        if self._listening is not None:
            self._listening.cancel()
        with suppress(Exception):
            self._run(self._client.disconnect(), 2.0)
        self._stop()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, coroutine: Any, seconds: float) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(seconds)

    async def _listen(self, on_event: OnEvent) -> None:
        with self._client.listener() as events:
            async for event in events:
                on_event(str(event["event"]), cast("Answer", event.get("data") or {}))

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
