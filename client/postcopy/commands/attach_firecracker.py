"""``postcopy attach firecracker``: the page-fault handler of Firecracker's snapshots, for any number of machines."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from postcopy_protocol.arguments import user_id
from postcopy_protocol.copied_map import OWN
from postcopy_protocol.runtime_paths import runtime_directory
from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import parse_block_name

from ..errors import BadInput, NoSupervisor, PostcopyError
from .options import RuntimeDir, Timeout, TrustUid

if TYPE_CHECKING:
    from ..firecracker.listener import Listener, Newcomer
    from ..firecracker.machine import Machine

MODE_OF = dict(zip(("poison", "wait", "kill"), OWN, strict=True))
_CHECK_EVERY = 0.2
"""Seconds between two looks at which machines have ended."""


def attach_firecracker(
    sockets: Annotated[
        list[str],
        typer.Option("--listen", metavar="SOCKET", help="Where Firecracker connects (backend_path); repeat for more."),
    ],
    block: Annotated[
        str, typer.Option("--block", metavar="NAME", help="The block that is the snapshot's memory file.")
    ],
    vms: Annotated[int, typer.Option("--vms", min=0, help="End when so many have come and ended; 0: never.")] = 0,
    name: Annotated[str, typer.Option("--name", help="Name in the status [default: firecracker-PID].")] = "",
    name_from: Annotated[
        str, typer.Option("--name-from", metavar="socket|cmdline", help="The socket's name, or the machine's --id.")
    ] = "",
    when_lost: Annotated[
        str, typer.Option("--when-lost", metavar="poison|wait|kill", help="What a machine gets for a lost page.")
    ] = "poison",
    owner: Annotated[
        str, typer.Option("--socket-owner", metavar="UID[:GID]", help="Who may connect, as a jailer's user.")
    ] = "",
    allow_uid: Annotated[
        list[int] | None,
        typer.Option("--allow-uid", metavar="UID", min=0, help="A user whose machines are served."),
    ] = None,
    timeout: Timeout = 30.0,
    trust_uid: TrustUid = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Serve the page faults of Firecracker machines that are restored from one snapshot.

    Use SOCKET as backend_path of PUT /snapshot/load. Machines may come at once or one after the other. After Ctrl-C
    those that are attached go on: their workers serve them as long as they live."""
    from ..firecracker.listener import Listener

    if when_lost not in MODE_OF:
        raise BadInput(f"--when-lost {when_lost!r} is none of {', '.join(MODE_OF)}")
    if name_from not in ("", "socket", "cmdline") or (name and name_from):
        raise BadInput(f"--name-from {name_from!r} is socket or cmdline, and not beside --name")
    directory = os.path.abspath(runtime_directory(runtime_dir, os.environ))
    find_block(directory, parse_block_name(block))
    with closing(Listener(sockets, _owner(owner), frozenset(allow_uid or ()))) as listener:
        say(f"listening at {', '.join(sockets)} for machines with the memory of block {block}")
        serve_machines(listener, Serving(directory, block, timeout, name, name_from, MODE_OF[when_lost]), vms)


@dataclass(frozen=True, slots=True)
class Serving:
    """How machines are attached, and under which names."""

    directory: str
    block: str
    timeout: float
    name: str = ""
    name_from: str = ""
    mode: str = OWN[0]

    def name_of(self, newcomer: Newcomer) -> str:
        """Its name in the status; empty: by its pid."""
        if self.name_from == "socket":
            return os.path.basename(newcomer.path).partition(".")[0]
        return identity_of(newcomer.peer.pid) if self.name_from == "cmdline" else self.name


def identity_of(pid: int) -> str:
    """What the process's command line says behind ``--id``, as Firecracker's and the jailer's do; empty if nothing."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as line:
            words = line.read().split("\0")
    except OSError:
        return ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--id":
            return following
        if word.startswith("--id="):
            return word[len("--id=") :]
    return ""


def say(text: str) -> None:
    """Print a line in one piece: two threads do."""
    print(f"{text}\n", end="", flush=True)


def _owner(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    user, _, group = text.partition(":")
    return user_id(user), user_id(group) if group else -1


def find_block(directory: str, block: str) -> None:
    """A wrong name is better known now than when a machine has come. Raises PostcopyError."""
    from ..queries import Control

    with Control(directory) as control:
        names = [known["name"] for known in control.status()["blocks"]]
    if block not in names:
        raise BadInput(f"no block {block} here; there are {', '.join(sorted(names))}")


def serve_machines(listener: Listener, serving: Serving, vms: int, over: threading.Event | None = None) -> None:
    """Attach every machine that comes, until ``vms`` of them have ended (0: for ever), or until ``over`` is set while
    there is none. Raises NoSupervisor when the supervisor has ended in order."""
    machines: list[Machine] = []
    come = 0
    try:
        while machines or not ((vms and come >= vms) or (over is not None and over.is_set())):
            for one in listener.newcomers(_CHECK_EVERY):
                if isinstance(one, str):
                    say(one)
                elif (machine := _attach(one, serving)) is not None:
                    machines.append(machine)
                    come += 1
            for machine in [machine for machine in machines if machine.ended]:
                machines.remove(machine)
                machine.close()
                say(f"{machine.name} (pid {machine.pid}) has ended")
            for machine in machines:
                if (reason := machine.ending) is not None:
                    raise NoSupervisor(f"the supervisor has ended ({reason}): missing pages are SIGBUS in the machines")
    finally:
        for machine in machines:
            machine.close()


def _attach(newcomer: Newcomer, serving: Serving) -> Machine | None:
    from ..firecracker.machine import Machine

    pid = newcomer.peer.pid
    try:
        name = serving.name_of(newcomer)
        machine = Machine(newcomer, serving.directory, serving.block, name, serving.timeout, serving.mode)
    except (PostcopyError, OSError) as error:
        say(f"process {pid} is refused: {error}")
        return None
    regions = len(newcomer.regions)
    say(f"attached {machine.name} (pid {pid}): {format_size(machine.size)} in {regions} regions")
    return machine
