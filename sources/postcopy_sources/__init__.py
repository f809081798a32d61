"""Page sources: programs at the other end of a return path. ``python -m postcopy_sources NAME=FILE --listen ENDPOINT``
serves files; ``serve`` serves what you write (see docs/sources.md)."""

from __future__ import annotations

from postcopy_protocol.errors import PageLost

from .serving import serve
from .source import PageSource, PushStream, StreamEnded

__all__ = ["PageLost", "PageSource", "PushStream", "StreamEnded", "serve"]
