"""vhost-user back-ends on lazily populated memory. ``BackEnd`` attaches one; its ``talk`` makes the protocol's
questions; ``virtqueue`` and ``blk`` drive a virtio-blk device. See ``docs/vhost-user.md``."""

from __future__ import annotations

from ..errors import BackEndGone, BackEndTimeout, VhostUserError
from .back_end import BackEnd, GuestMemory

__all__ = ["BackEnd", "BackEndGone", "BackEndTimeout", "GuestMemory", "VhostUserError"]
