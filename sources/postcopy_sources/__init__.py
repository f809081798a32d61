"""Page sources: programs at the other end of a return path.

``python -m postcopy_sources NAME=FILE --listen ENDPOINT`` serves files; ``serve`` serves sources written in Python (see
docs/sources.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postcopy_protocol.errors import PageLost

    from .pushing import PushStream, StreamEnded
    from .serving import serve
    from .source import PageSource

__all__ = ["PageLost", "PageSource", "PushStream", "StreamEnded", "serve"]

_PLACES = {
    "PageLost": "postcopy_protocol.errors",
    "PageSource": f"{__name__}.source",
    "PushStream": f"{__name__}.pushing",
    "StreamEnded": f"{__name__}.pushing",
    "serve": f"{__name__}.serving",
}
"""Imported when they are used: the programs in here start faster without what they do not need."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
