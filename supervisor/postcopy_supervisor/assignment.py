"""What a worker is told at its birth, and the keys of its descriptors in the order of their places."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from postcopy_protocol.messages import Assignment, BlockGrant, RegionGrant

from .clients.client_zero import KEY as ZERO_KEY
from .clients.client_zero import NUMBER as ZERO

if TYPE_CHECKING:
    from .main_loop import MainLoop

QUARANTINED = "quarantined"
CGROUPS = "cgroups"
"""Key of the ``cgroup.procs`` files into which workers write themselves."""
QUIT, HOUSE_PAGE, DEVICE = 0, 1, 2
"""Places of what every worker gets under the key ``house``; the device is missing where there is none."""


def brief(house: MainLoop, worker: int, incarnation: int, quarantined: bool) -> tuple[list[str], Assignment]:
    """For the custodian: keys and assignment of one life of a worker (0: worker zero)."""
    keys, place = ["house"], DEVICE + house.has_device
    if worker == ZERO:
        keys.append(ZERO_KEY)
        name, ufd, client, figures, place = "zero", -1, -1, place, place + 1
        blocks, regions = list(house.blocks.values()), list[RegionGrant]()
    else:
        record, blocks = house.reception.grants(worker)
        house.reception.quarantine(worker, quarantined)
        keys.append(record.key)
        name, ufd, client, figures, place = record.name, place, place + 1, place + 2, place + 3
        regions = record.regions
    grants: list[BlockGrant] = []
    for block in blocks:
        grant, fds = block.grant(place)
        keys.append(f"block/{block.number}")
        place += len(fds)
        grants.append(_without_source(grant) if quarantined else grant)
    if house.settings.worker_cgroups:
        keys.append(CGROUPS)
    return keys, Assignment(
        worker=worker,
        incarnation=incarnation,
        name=name,
        endpoint=house.runtime.endpoint,
        userfaultfd=ufd,
        client_pidfd=client,
        quit_eventfd=QUIT,
        statistics_page=figures,
        control_page=HOUSE_PAGE,
        device=DEVICE if house.has_device else -1,
        fault_around=house.settings.fault_around,
        adaptive=house.settings.adaptive,
        handler_path=os.getcwd(),
        sandbox=house.settings.walls,
        cgroup=place if house.settings.worker_cgroups else -1,
        blocks=tuple(grants),
        regions=tuple(regions),
        transport=house.settings.transport,
    )


def _without_source(grant: BlockGrant) -> BlockGrant:
    """For a quarantined client: present pages are served, the others are poisoned for it."""
    return replace(grant, kind=QUARANTINED, detail="", source=-1)
