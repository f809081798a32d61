"""``python -m postcopy_sources``: the program behind ``postcopy source``."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING

from postcopy_kernel import log_queue
from postcopy_kernel.descriptors import raise_descriptor_limit
from postcopy_kernel.process import die_with_parent, title_process
from postcopy_kernel.program_start import prepare
from postcopy_protocol.display import printable
from postcopy_protocol.errors import BadInput, PostcopyError

if TYPE_CHECKING:
    from .qemu.settings import QemuSettings
    from .settings import Settings
    from .source import PageSource


STORE_READERS = 32
"""Threads that may wait for a store: those of background pieces must not keep urgent ones from being read."""


def main() -> int:
    """Exit status: 0 ended in order, 1 could not serve, 2 usage."""
    prepare()
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["qemu"] and "--from" not in arguments:
            _serve_qemu(arguments[1:])
        else:
            _serve_files(arguments)
    except BadInput as error:
        return _fail(str(error), 2)
    except PostcopyError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.filename or 'file'}: {error.strerror}", 1)
    except KeyboardInterrupt:
        return 130
    return 0


def _serve_files(arguments: list[str]) -> None:
    from .settings import parse

    settings = parse(arguments)
    _begin(settings, ", ".join([*settings.files, *settings.snapshots]))
    from .serving import serve

    sources = _sources(settings)
    serve(
        sources,
        settings.listen,
        curve=settings.access.curve,
        allow=settings.access.allow,
        plain_tcp=settings.access.plain_tcp,
        identity=settings.identity,
        readers=max(settings.readers, STORE_READERS) if settings.snapshots else settings.readers,
        read_timeout=settings.read_timeout,
        transport=settings.transport,
    )
    for source in sources:
        if end := getattr(source, "end", None):
            end()


def _serve_qemu(arguments: list[str]) -> None:
    from .qemu.settings import parse

    settings = parse(arguments)
    _begin(settings, f"qemu {settings.mode}")
    from .qemu.program import run

    run(settings)


def _begin(settings: Settings | QemuSettings, what: str) -> None:
    log_queue.set_up(settings.log_format, settings.log_level)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the end of a terminal is not the end of the service
    if settings.die_with_parent:
        die_with_parent(settings.die_with_parent, signal.SIGTERM)
    raise_descriptor_limit()
    title_process(f"postcopy_sources: {what} at {settings.listen}")


def _sources(settings: Settings) -> list[PageSource]:
    if settings.runtime_dir:
        from .supervisor_source import SupervisorSource

        return [SupervisorSource(settings.runtime_dir, name, settings.trust_uids) for name in settings.files]
    from .file_source import FileSource

    files = [FileSource(name, path, copy=settings.copy_on_serve) for name, path in settings.files.items()]
    return [*files, *_snapshots(settings)]


def _snapshots(settings: Settings) -> list[PageSource]:
    if not settings.snapshots:
        return []
    from postcopy_wire.curve import KEYS, PLAIN

    from .storage.chunk_cache import ChunkCache, default_directory
    from .storage.peers import OPTIONS, Peers
    from .storage.store_source import open_sources

    size = settings.chunk_cache_size
    directory = settings.chunk_cache or default_directory(os.environ)
    return [
        *open_sources(
            settings.snapshots,
            ChunkCache(directory, size) if size else None,
            partial(
                Peers,
                keys=settings.peer_keys,
                plain_tcp=settings.plain_peers,
                options=(KEYS, PLAIN) if settings.for_serve else OPTIONS,
                transport=settings.transport,
            ),
            record=settings.record,
            replay=settings.replay,
        )
    ]


def _fail(text: str, status: int) -> int:
    name = "serve" if "--for-serve" in sys.argv else "source"
    print(f"postcopy {name}: {printable(' '.join(text.split()))}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
