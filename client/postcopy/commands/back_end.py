"""``postcopy attach vhost-user``: a back-end's memory is blocks of ours, until it hangs up or somebody says Ctrl-C."""

from __future__ import annotations

import re
import select
import time
from typing import TYPE_CHECKING, Annotated

import typer

from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import parse_block_name

from ..errors import BackEndGone, BadInput, NoSupervisor, PostcopyError
from .options import RuntimeDir, Timeout, place

if TYPE_CHECKING:
    from ..vhost_user import BackEnd, GuestMemory

_REGION = re.compile(r"(?P<block>[^:@]+)(:(?P<offset>[^+@]+)\+(?P<size>[^@]+))?(@(?P<guest>.+))?")
_LOOK_EVERY = 0.2
_COME_BACK_EVERY = 0.1

Blocks = Annotated[
    list[str],
    typer.Option("--block", metavar="NAME[:OFFSET+SIZE][@GUEST]", help="A region of guest memory; 1 to 8 of them."),
]
Order = Annotated[
    str, typer.Option("--order", metavar="standard|rust-vmm", help="Of the messages: rust-vmm wants the table first.")
]
Process = Annotated[int | None, typer.Option("--pid", help="The back-end's process, if it did not make the socket.")]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(help="Attach what is not a client by itself.", no_args_is_help=False)
    group.callback()(_attach)
    group.command("vhost-user")(attach_vhost_user)
    app.add_typer(group, name="attach")


def _attach() -> None:
    """Attach what is not a client by itself."""


def attach_vhost_user(
    socket: Annotated[str, typer.Argument(metavar="SOCKET", help="Where the back-end listens.")],
    blocks: Blocks,
    name: Annotated[str, typer.Option("--name", help="For the status [default: the socket's].")] = "",
    pid: Process = None,
    order: Order = "standard",
    reconnect: Annotated[bool, typer.Option("--reconnect", help="Wait for a back-end that went to come back.")] = False,
    timeout: Timeout = 30.0,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Give a vhost-user back-end guest memory made of blocks; pages come when it touches them.

    Ends post-copy when every page has come. Stays until the back-end hangs up (status 1) or Ctrl-C."""
    from ..vhost_user import BackEnd

    memory = [parse_region(text) for text in blocks]
    if len(memory) > 8:
        raise BadInput(f"{len(memory)} regions: a back-end takes at most 8")
    while True:
        try:
            with BackEnd(socket, memory, runtime_dir, pid=pid, name=name, timeout=timeout, order=order) as back_end:
                _tell(back_end)
                _stay(back_end)
        except ValueError as error:
            raise BadInput(str(error)) from None
        except BackEndGone as error:
            if not reconnect:
                raise
            print(f"{error}; waiting for it", flush=True)
            pid = None  # whoever comes is another process
            _wait_for(socket)


def parse_region(text: str) -> GuestMemory:
    """``NAME[:OFFSET+SIZE][@GUEST]``; sizes as everywhere, addresses may be hexadecimal. Raises BadInput."""
    from ..vhost_user import GuestMemory

    match = _REGION.fullmatch(text)
    if match is None:
        raise BadInput(f"--block {text!r}: write NAME, NAME@GUEST, or NAME:OFFSET+SIZE@GUEST")
    size = match["size"]
    return GuestMemory(
        parse_block_name(match["block"]),
        _number(match["offset"] or "0"),
        _number(size) if size else None,
        _number(match["guest"]) if match["guest"] else None,
    )


def _number(text: str) -> int:
    if text.lower().startswith("0x"):
        try:
            return int(text, 16)
        except ValueError:
            raise BadInput(f"{text!r} is no hexadecimal number") from None
    return place(text)


def _tell(back_end: BackEnd) -> None:
    print(f"attached {back_end.path} (pid {back_end.pid})")
    names = {block.number: block.name for block in back_end.blocks.values()}
    for number, region in back_end.regions:
        print(f"  {format_size(region.size)} of {names[number]} from {region.offset} at {region.guest:#x}")
    for quirk in back_end.quirks:
        print(f"  quirk: {QUIRKS[quirk]}")
    print(end="", flush=True)


GONE = "the supervisor has gone without a word; its workers serve on"
QUIRKS = {
    "addresses-echoed": "the memory table came back with our addresses (libvhost-user); its maps told the true ones",
    "open-before-registered": "its memory is accessible before it is registered (DPDK): a touch then would be zeros",
    "registration-unproven": "that its memory is registered could not be seen (its process may not be looked into)",
}


def _stay(back_end: BackEnd) -> None:
    """Until the back-end has gone. Raises BackEndGone, NoSupervisor."""
    poll = select.poll()
    poll.register(back_end.pidfd, select.POLLIN)
    poll.register(back_end.channel, select.POLLIN)
    ended = alone = False
    while True:
        events = poll.poll(_LOOK_EVERY * 1000)
        if back_end.gone:
            raise BackEndGone(f"the back-end at {back_end.path} (pid {back_end.pid}) has gone")
        if events:
            raise PostcopyError(f"the back-end at {back_end.path} says something that nobody asked for")
        reason = back_end.side.ending
        if reason is not None and not ended:
            raise NoSupervisor(f"the supervisor has ended ({reason}): missing pages are SIGBUS in the back-end")
        if not ended and back_end.complete:
            back_end.end()
            ended = True
            print("all pages have come: post-copy has ended", flush=True)
        if alone == back_end.side.door.usable and not ended:
            alone = not alone
            print(GONE if alone else "another supervisor has taken over", flush=True)


def _wait_for(socket: str) -> None:
    """Until somebody listens again."""
    from ..vhost_user.channel import somebody_listens

    while not somebody_listens(socket):
        time.sleep(_COME_BACK_EVERY)
