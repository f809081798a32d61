"""Post-copy memory: usable before its contents have arrived.

``attach()`` maps a block of memory whose pages arrive when they are touched. ``Supervisor`` serves blocks from Python.
The public names are those in ``__all__``; each is imported at its first use, so ``import postcopy`` is fast.

Example::

    import postcopy

    with postcopy.Supervisor({"ram0": "weights.bin"}) as supervisor:
        with postcopy.attach("ram0", supervisor.runtime_dir) as block:
            print(bytes(block.buf[:16]))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from postcopy_protocol.version import PACKAGE

if TYPE_CHECKING:
    from .block import Block
    from .client import attach
    from .errors import (
        AttachDenied,
        AttachTimeout,
        BadInput,
        BadMessage,
        BadVersion,
        NoSuchBlock,
        NoSupervisor,
        PageLost,
        PageTimeout,
        PostcopyError,
        UserfaultfdUnavailable,
    )
    from .listing import BlockInfo, blocks
    from .sigbus import explain_sigbus
    from .supervisor import Supervisor

__version__ = PACKAGE

__all__ = [
    "AttachDenied",
    "AttachTimeout",
    "BadInput",
    "BadMessage",
    "BadVersion",
    "Block",
    "BlockInfo",
    "NoSuchBlock",
    "NoSupervisor",
    "PageLost",
    "PageTimeout",
    "PostcopyError",
    "Supervisor",
    "UserfaultfdUnavailable",
    "attach",
    "blocks",
    "explain_sigbus",
]

_MODULES = {
    "attach": ".client",
    "Block": ".block",
    "BlockInfo": ".listing",
    "Supervisor": ".supervisor",
    "blocks": ".listing",
    "explain_sigbus": ".sigbus",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, ".errors"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
