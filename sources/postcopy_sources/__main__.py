"""``python -m postcopy_sources``: the program behind ``postcopy source``."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from postcopy_kernel import log_queue
from postcopy_kernel.descriptors import raise_descriptor_limit
from postcopy_kernel.process import die_with_parent, title_process
from postcopy_kernel.program_start import prepare
from postcopy_protocol.errors import BadInput, PostcopyError

if TYPE_CHECKING:
    from .settings import Settings
    from .source import PageSource


STORE_READERS = 32
"""Threads that may wait for a store: those of background pieces must not keep urgent ones from being read."""


def main() -> int:
    """Exit status: 0 ended in order, 1 could not serve, 2 usage."""
    from .settings import parse

    prepare()
    settings = None
    try:
        settings = parse(sys.argv[1:])
        log_queue.set_up(settings.log_format, settings.log_level)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the end of a terminal is not the end of the service
        if settings.die_with_parent:
            die_with_parent(settings.die_with_parent, signal.SIGTERM)
        raise_descriptor_limit()
        names = ", ".join([*settings.files, *settings.snapshots])
        title_process(f"postcopy_sources: {names} at {settings.listen}")
        from .serving import serve

        sources = _sources(settings)
        serve(
            sources,
            settings.listen,
            curve=settings.curve,
            allow=settings.allow,
            plain_tcp=settings.plain_tcp,
            identity=settings.identity,
            readers=max(settings.readers, STORE_READERS) if settings.snapshots else settings.readers,
            read_timeout=settings.read_timeout,
            transport=settings.transport,
        )
        for source in sources:
            if recording := getattr(source, "recording", None):
                recording.close()
    except (PostcopyError, OSError) as error:
        text = str(error) if isinstance(error, PostcopyError) else f"{error.filename or 'file'}: {error.strerror}"
        name = "serve" if settings is not None and settings.for_serve else "source"
        print(f"postcopy {name}: {text}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        return 130
    return 0


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
    from .storage.chunk_cache import ChunkCache, default_directory
    from .storage.store_source import open_sources

    size = settings.chunk_cache_size
    directory = settings.chunk_cache or default_directory(os.environ)
    return [
        *open_sources(
            settings.snapshots,
            ChunkCache(directory, size) if size else None,
            record=settings.record,
            replay=settings.replay,
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
