"""The exceptions of the client: those of the protocol, and what this wing adds.

::

    PostcopyError
     |-- ...                      see postcopy_protocol.errors
     |-- UserfaultfdUnavailable   also an OSError, with the kernel's errno
     |-- PageTimeout              also a TimeoutError: ensure() reached its timeout; the pages may still arrive
     |-- BackEndGone              no vhost-user back-end, or it closed the connection
     |-- BackEndTimeout           also a TimeoutError: a vhost-user back-end does not answer
     `-- VhostUserError           a vhost-user back-end broke the protocol, or lacks a feature
"""

from __future__ import annotations

from postcopy_kernel.userfaultfd import UserfaultfdUnavailable as KernelUnavailable
from postcopy_protocol import errors
from postcopy_protocol.errors import (
    AttachDenied,
    AttachTimeout,
    BadInput,
    BadMessage,
    BadVersion,
    NoSuchBlock,
    NoSupervisor,
    PageLost,
    PostcopyError,
)
from postcopy_protocol.vhost_user import VhostUserError

__all__ = [
    "AttachDenied",
    "AttachTimeout",
    "BackEndGone",
    "BackEndTimeout",
    "BadInput",
    "BadMessage",
    "BadVersion",
    "NoSuchBlock",
    "NoSupervisor",
    "PageLost",
    "PageTimeout",
    "PostcopyError",
    "UserfaultfdUnavailable",
    "VhostUserError",
    "unavailable",
]


class UserfaultfdUnavailable(errors.UserfaultfdUnavailable, KernelUnavailable):
    """This process cannot have a userfaultfd; the text names the remedy."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class PageTimeout(PostcopyError, TimeoutError):
    """``Block.ensure`` reached its timeout; the pages may still arrive."""


class BackEndGone(PostcopyError):
    """No vhost-user back-end listens there, or it has closed the connection."""


class BackEndTimeout(PostcopyError, TimeoutError):
    """A vhost-user back-end has not answered in time; it may be waiting for a page."""


def _show_as(module: str, *kinds: type[Exception]) -> None:
    """Name the module from which users import these exceptions: tracebacks show it."""
    for kind in kinds:
        kind.__module__ = module


_show_as("postcopy", PostcopyError, NoSupervisor, NoSuchBlock, AttachDenied, AttachTimeout, PageLost, PageTimeout)
_show_as("postcopy", BadInput, BadMessage, BadVersion, UserfaultfdUnavailable)
_show_as("postcopy.vhost_user", BackEndGone, BackEndTimeout, VhostUserError)


def unavailable(error: OSError) -> UserfaultfdUnavailable:
    """The client's exception for an error of the kernel wing."""
    return UserfaultfdUnavailable(error.errno, error.strerror or str(error))
