"""``python -m postcopy_sources.storage COMMAND``: the program behind ``postcopy pack, unpack, inspect, diff, gc``."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

from postcopy_kernel.program_start import drop_output, prepare
from postcopy_protocol.display import printable
from postcopy_protocol.errors import BadInput, PostcopyError


def main() -> int:
    """Exit status: 0 done, 1 failed, or a check did not hold, 2 usage."""
    prepare()
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    signal.signal(signal.SIGTERM, _end)
    try:
        logging.basicConfig(level="WARNING", format=f"postcopy {command}: %(message)s")
        from .program import run

        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BadInput as error:
        return _fail(command, str(error), 2)
    except PostcopyError as error:
        return _fail(command, str(error), 1)
    except OSError as error:
        drop_output()
        return _fail(command, f"{error.filename or 'output'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130
    return status


def _end(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends it as Ctrl-C does: marks are removed, what was done stays for the next try."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _fail(command: str, text: str, status: int) -> int:
    print(f"postcopy {command}: {printable(' '.join(text.split()))}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
