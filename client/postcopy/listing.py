"""Which blocks a supervisor offers, without attaching one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from postcopy_kernel.descriptors import close_all

from .attach_socket import AttachConnection
from .client import TIMEOUT, directory_of, users_of
from .deadline import Deadline
from .session import program_name


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A block that can be attached. ``modes``: those that its supervisor allows this user."""

    name: str
    size: int
    page_size: int
    modes: tuple[str, ...]


def blocks(
    runtime_dir: str | os.PathLike[str] | None = None,
    timeout: float | None = TIMEOUT,
    *,
    trust_uid: int | Iterable[int] = (),
) -> list[BlockInfo]:
    """The blocks of the supervisor in ``runtime_dir``; arguments and exceptions are those of ``attach``.

    Example::

        for block in postcopy.blocks("/run/postcopy"):
            print(block.name, block.size, block.modes)
    """
    deadline = Deadline(timeout)
    connection = AttachConnection(directory_of(runtime_dir), deadline, users_of(trust_uid))
    try:
        close_all(connection.greet(program_name(), "native", deadline))
        listed = connection.list_blocks(deadline)
        connection.say_goodbye()
    finally:
        connection.close()
    return [
        BlockInfo(block.name, block.size, block.page_size, ("private", "shared") if block.shared else ("private",))
        for block in listed
    ]
