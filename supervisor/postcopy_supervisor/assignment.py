"""What a worker is given at its start: its assignment, and the custodian's keys of its descriptors in order. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from postcopy_protocol.messages import Assignment, BlockGrant, RegionGrant

from .blocks import RamBlock
from .clients.client import Clients
from .clients.worker_zero import KEY as ZERO_KEY
from .clients.worker_zero import NUMBER as ZERO
from .recovery.plan import CGROUPS, SHARED
from .settings import Settings

QUARANTINED = "quarantined"
QUIT, CONTROL_PAGE, DEVICE = 0, 1, 2
"""Places of what every worker gets under the key SHARED. The device is missing where there is none."""


class WorkerAssignments:
    """Describes workers by the clients and blocks that there are. ``endpoint``: the router's."""

    def __init__(
        self, settings: Settings, endpoint: str, has_device: bool, blocks: Mapping[int, RamBlock], clients: Clients
    ) -> None:
        self._settings, self._endpoint, self._has_device, self._blocks = settings, endpoint, has_device, blocks
        self._clients = clients

    def assign(self, worker: int, incarnation: int, quarantined: bool) -> tuple[list[str], Assignment]:
        """Keys and assignment of one incarnation of a worker (0: worker zero)."""
        settings, keys, place = self._settings, [SHARED], DEVICE + self._has_device
        if worker == ZERO:
            keys.append(ZERO_KEY)
            name, ufd, client, figures, place, copied = "zero", -1, -1, place, place + 1, -1
            numbers, regions = list(self._blocks), list[RegionGrant]()
        else:
            record = self._clients.by_number[worker]
            keys.append(record.key)
            name, ufd, client, figures = record.name, place, place + 1, place + 2
            place += len(record.kept)
            copied = place - 1 if record.copied_map >= 0 else -1
            numbers, regions = sorted({region.block for region in record.regions}), record.regions
        grants: list[BlockGrant] = []
        for number in numbers:
            grant, fds = self._blocks[number].grant(place)
            keys.append(f"block/{number}")
            place += len(fds)
            grants.append(_without_source(grant) if quarantined else grant)
        if settings.worker_cgroups:
            keys.append(CGROUPS)
        return keys, Assignment(
            worker=worker,
            incarnation=incarnation,
            name=name,
            endpoint=self._endpoint,
            userfaultfd=ufd,
            client_pidfd=client,
            quit_eventfd=QUIT,
            statistics_page=figures,
            control_page=CONTROL_PAGE,
            device=DEVICE if self._has_device else -1,
            fault_around=settings.fault_around,
            adaptive=settings.adaptive,
            handler_path=settings.handler_path,
            sandbox=settings.walls,
            cgroup=place if settings.worker_cgroups else -1,
            blocks=tuple(grants),
            regions=tuple(regions),
            transport=settings.transport,
            copied_map=copied,
        )


def _without_source(grant: BlockGrant) -> BlockGrant:
    """For a quarantined client: present pages are served, missing ones are poisoned for it."""
    return replace(grant, kind=QUARANTINED, detail="", source=-1)
