"""The migration settings of a VM: changed for one migration, restored after it."""

from __future__ import annotations

import logging
from typing import Any

from postcopy_protocol.errors import PostcopyError

from .feed import wait_for
from .qmp import Monitor

UNDER_WAY = ("setup", "active", "device", "pre-switchover", "wait-unplug", "cancelling", "colo", "failing")
POSTCOPY = ("postcopy-active", "postcopy-device", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup")
ALWAYS_OFF = (
    "xbzrle compress multifd mapped-ram x-colo dirty-bitmaps x-ignore-shared zero-copy-send rdma-pin-all".split()
)
"""Whatever these change in the stream, its reader does not understand it."""
OFF_FOR_LIVE = [
    "postcopy-ram",
    "postcopy-preempt",
    "return-path",
    "auto-converge",
    "release-ram",
    "pause-before-switchover",
]
END_SECONDS = 20.0

log = logging.getLogger(__name__)


def migration_status(monitor: Monitor) -> str:
    """The status of QEMU's migration; ``none`` before the first one."""
    return str(monitor.execute("query-migrate").get("status", "none"))


class Borrowed:
    """The capabilities and parameters of a VM, to be restored."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        found = monitor.execute("query-migrate-capabilities")
        self.capabilities: dict[str, bool] = {one["capability"]: bool(one["state"]) for one in found}
        self._changed: dict[str, bool] = {}
        self._parameters: dict[str, Any] = {}

    def switch(self, on: list[str], off: list[str]) -> None:
        """Switch capabilities. Raises PostcopyError for one that this QEMU lacks, or refuses here."""
        for name in on:
            if name not in self.capabilities:
                raise PostcopyError(f"QEMU {self._monitor.version_text} has no capability {name}")
        wanted = {name: False for name in off if self.capabilities.get(name)} | dict.fromkeys(on, True)
        self._changed = {name: self.capabilities[name] for name in wanted if self.capabilities[name] != wanted[name]}
        self._set(wanted)

    def forget_postcopy(self) -> None:
        """What an earlier source has switched on is to be off at the end."""
        for name in ("postcopy-ram", "postcopy-preempt"):
            if self.capabilities.get(name):
                self._changed[name] = False

    def parameters(self, values: dict[str, Any]) -> None:
        before = self._monitor.execute("query-migrate-parameters")
        self._parameters = {name: before[name] for name in values if name in before}
        self._monitor.execute("migrate-set-parameters", values)

    def _set(self, wanted: dict[str, bool]) -> None:
        # All in one command: some exclude one another, some need another, and QEMU judges what results.
        asked = [{"capability": name, "state": state} for name, state in wanted.items()]
        self._monitor.execute("migrate-set-capabilities", {"capabilities": asked})

    def restore(self) -> None:
        """Set everything as it was, when no migration is under way. It must not raise."""
        try:
            wait_for(lambda: migration_status(self._monitor) not in UNDER_WAY, END_SECONDS)
            if self._changed:
                self._set(self._changed)
            if self._parameters:
                self._monitor.execute("migrate-set-parameters", self._parameters)
        except PostcopyError as error:
            log.warning("the VM's migration settings stay as they are: %s", error)
