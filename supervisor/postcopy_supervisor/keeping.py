"""What is kept for workers and for a successor: by the custodian, in records, and by the service manager."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from postcopy_protocol.codec import encode
from postcopy_protocol.messages import WhenOrphaned

from .blocks import RamBlock
from .pool.custodian_client import CustodianClient, Store
from .recovery.descriptor_store import DescriptorStore
from .recovery.inventory import Custodian
from .recovery.plan import CGROUPS, LIFELINE, SHARED, Plan
from .recovery.records import Records
from .runtime import RuntimeDirectory, cgroup_procs
from .settings import Settings


class OwnDescriptors(Protocol):
    """The supervisor's own that every worker gets; ``device``: /dev/userfaultfd, or -1."""

    @property
    def quit(self) -> int: ...
    @property
    def control(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def lifeline(self) -> int: ...


def _stores(runtime: RuntimeDirectory, blocks: Mapping[int, RamBlock], store: DescriptorStore | None) -> list[Store]:
    """What the custodian keeps is here too, for the case that it dies with the supervisor."""
    originals = {f"block/{n}": bytes(block.opened.original) for n, block in blocks.items() if block.opened.original}
    records = Records(runtime.path, originals)
    return [records, store] if store is not None else [records]


def open_custodian(
    settings: Settings,
    runtime: RuntimeDirectory,
    plan: Plan,
    own: OwnDescriptors,
    blocks: Mapping[int, RamBlock],
    store: DescriptorStore | None,
    inherited: Custodian | None,
) -> CustodianClient:
    """The previous custodian, or one that is still to be started. ``store``: the service manager's."""
    orphaned = WhenOrphaned(int(settings.orphan_timeout * 1000), settings.poison_orphans)
    stores = _stores(runtime, blocks, store)
    custodian = CustodianClient(
        runtime.path, orphaned, device=own.device >= 0, log_format=settings.log_format, stores=stores
    )
    if inherited is not None:
        custodian.take_over(inherited.channel, inherited.pid, inherited.pidfd)
    elif plan.recovers:
        custodian.start()  # it died with the supervisor; the first orders are for it
    return custodian


def keep_for_workers(
    settings: Settings, custodian: CustodianClient, own: OwnDescriptors, blocks: Mapping[int, RamBlock]
) -> None:
    """Give the custodian what every worker gets."""
    custodian.keep(SHARED, b"", (own.quit, own.control) + ((own.device,) if own.device >= 0 else ()))
    custodian.keep(LIFELINE, b"", (own.lifeline,))
    if settings.worker_cgroups:
        custodian.keep(CGROUPS, b"", [cgroup_procs(path) for path in settings.worker_cgroups])
    for number, block in blocks.items():
        custodian.keep(f"block/{number}", encode(block.note()), block.grant(0)[1])
