"""Page sources: programs at the other end of a return path.

``python -m postcopy_sources NAME=FILE --listen ENDPOINT`` serves files; ``serve`` serves sources written in Python (see
docs/sources.md).
"""

from __future__ import annotations

from postcopy_protocol.errors import PageLost

from .pushing import PushStream, StreamEnded
from .serving import serve
from .source import PageSource

__all__ = ["PageLost", "PageSource", "PushStream", "StreamEnded", "serve"]
