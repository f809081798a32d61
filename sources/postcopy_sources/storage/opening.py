"""Which store a text names."""

from __future__ import annotations

from postcopy_protocol.sources import check_store

from .object_stores import open_object_store
from .stores import DirectoryStore, Store

COMMAND_SECONDS = 60.0
SERVING_SECONDS = 5.0
"""Clients wait."""


def open_store(text: str, patience: float = COMMAND_SECONDS) -> Store:
    """The store that a user named: a directory, or a URL. A request may take ``patience`` seconds. Raises BadInput,
    PostcopyError.

    Example::

        open_store("s3://snapshots/vms").get("vm1.caibx", 1 << 20)
    """
    return open_object_store(text, patience) if "://" in check_store(text) else DirectoryStore(text)
