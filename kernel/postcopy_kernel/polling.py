"""``poll()``, also in a program whose select module was emptied: eventlet removes ``select.poll`` from it.

The wait then blocks the whole thread, as a touch of a missing page does."""

from __future__ import annotations

import importlib.util
import select
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from select import poll as Poll


def poll() -> Poll:
    """A new poll object of the kernel's."""
    made: Poll = _select().poll()
    return made


@cache
def _select() -> ModuleType:
    if hasattr(select, "poll"):
        return select
    spec = importlib.util.find_spec("select")
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh
