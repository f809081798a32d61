"""Makes the router or channel of the transport that a setting names. libzmq is imported only where it is used."""

from __future__ import annotations

from postcopy_protocol.zmtp import LARGEST

from .transport import LIBZMQ, Action, Channel, GoneHandler, MessageHandler, Router, ignore_gone


def open_router(
    transport: str,
    on_message: MessageHandler,
    on_gone: GoneHandler = ignore_gone,
    *,
    queue: int = 1000,
    largest: int = LARGEST,
    newcomers: bool = False,
) -> Router:
    """``queue``: messages that are kept for one peer; ``largest``: bytes of the largest message that peers may send;
    ``newcomers``: peers that connect are newcomers until ``trust`` is called for them."""
    if transport == LIBZMQ:
        from .libzmq import LibzmqRouter

        return LibzmqRouter(on_message, queue=queue, largest=largest)
    from .router import NativeRouter

    return NativeRouter(on_message, on_gone, queue=queue, largest=largest, newcomers=newcomers)


def preload(transport: str) -> None:
    """Import what a channel of this transport needs, in a process that forks its users."""
    if transport == LIBZMQ:
        from . import libzmq_channel  # noqa: F401
    else:
        from . import channel  # noqa: F401


def open_channel(transport: str, endpoint: str, identity: bytes, hello: bytes, on_held: Action) -> Channel:
    """Not connected yet. ``endpoint``: ``ipc://PATH``; ``identity``: the worker's routing id; ``hello``: the first
    message of every connection. ``on_held`` is called in the sending thread when a message is held: another thread is
    to call ``flush`` until none is."""
    if transport == LIBZMQ:
        from .libzmq_channel import LibzmqChannel

        return LibzmqChannel(endpoint, identity, hello, on_held)
    from .channel import NativeChannel

    return NativeChannel(endpoint, identity, hello, on_held)
