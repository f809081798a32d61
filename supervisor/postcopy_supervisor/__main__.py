"""``python -m postcopy_supervisor``: the program behind ``postcopy serve``."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import traceback

from postcopy_kernel import log_queue
from postcopy_kernel.program_start import prepare
from postcopy_kernel.userfaultfd import UserfaultfdUnavailable
from postcopy_protocol.display import printable
from postcopy_protocol.errors import BadInput, PostcopyError

log = logging.getLogger("postcopy")


def main() -> int:
    """Returns the exit status: 0 ended in order, 1 failed, 2 usage."""
    from .settings import parse

    prepare()
    try:
        settings = parse(sys.argv[1:])
    except BadInput as error:
        return _fail(str(error), 2)
    except OSError as error:  # the current directory is gone
        return _fail(_reason(error))
    log_queue.set_up(settings.log_format, settings.log_level)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the end of a terminal is not the end of the service
    from .assembly import serve

    try:
        serve(settings)
    except (PostcopyError, UserfaultfdUnavailable) as error:
        return _fail(str(error))
    except OSError as error:
        log.debug("cannot start", exc_info=error)
        return _fail(_reason(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(text: str, status: int = 1) -> int:
    print(f"postcopy serve: {printable(' '.join(text.split()))}", file=sys.stderr)
    return status


def _reason(error: OSError) -> str:
    """Which step of the start the system refuses, why, and what helps."""
    step = error.filename or traceback.extract_tb(error.__traceback__)[-1].name
    remedy = {
        errno.EMFILE: "; raise the limit of open files (ulimit -n, LimitNOFILE=) or serve fewer blocks",
        errno.ENFILE: "; this machine has no open file left (fs.file-max)",
        errno.ENOSYS: "; this kernel, or a seccomp filter around it, does not have that system call",
        errno.EPERM: "; a right is missing, or a seccomp filter refuses the system call",
    }
    return f"cannot start: {step}: {error.strerror or error}{remedy.get(error.errno or 0, '')}"


if __name__ == "__main__":
    sys.exit(main())
