"""vhost-user back-ends on lazily populated memory: ``BackEnd`` attaches one, its ``talk`` has the questions of the
conversation, ``rings`` and ``blk`` help to drive it. See ``docs/vhost-user.md``."""

from __future__ import annotations

from .back_end import BackEnd, GuestMemory

__all__ = ["BackEnd", "GuestMemory"]
