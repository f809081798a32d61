"""``postcopy`` and ``python -m postcopy``: the entry point. An error ends the program with one line and a status.

0 done; 1 failed, or a check did not hold; 2 usage; 3 no supervisor in that runtime directory; 130 Ctrl-C."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from postcopy_kernel.program_start import drop_output, prepare
from postcopy_kernel.programs import command, environment

DONE, FAILED, USAGE, NO_SUPERVISOR, INTERRUPTED = 0, 1, 2, 3, 130
SNAPSHOT_COMMANDS = ("pack", "unpack", "inspect", "diff", "gc")
"""Commands of the sources wing: they read and write stores, and the blocks of supervisors."""


def main() -> None:
    """Run the command line of ``sys.argv`` and exit with its status."""
    prepare()
    arguments = sys.argv[1:]
    if arguments[:1] == ["serve"]:  # before anything is imported, so that the supervisor starts fast
        sys.exit(_serve(arguments[1:]))
    if arguments[:1] == ["source"]:
        sys.exit(_become("postcopy_sources", arguments[1:]))
    if arguments and arguments[0] in SNAPSHOT_COMMANDS:
        sys.exit(_become("postcopy_sources.storage", arguments))
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        status = FAILED
    except OSError as error:
        status = _complain(f"cannot write to stdout: {error.strerror}", FAILED)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if status in (FAILED, INTERRUPTED):
        drop_output()
    sys.exit(status)


def _serve(arguments: list[str]) -> int:
    """Become the supervisor program; returns only when it is not installed."""
    if find_spec("postcopy_supervisor") is None:
        return _complain("serve needs postcopy_supervisor: pip install 'postcopy[supervisor]'", FAILED)
    return _become("postcopy_supervisor", arguments)


def _become(program: str, arguments: list[str]) -> int:
    """Become another wing's program; returns only when that fails."""
    try:
        os.execve(sys.executable, command(program, *arguments), environment())
    except OSError as error:
        return _complain(f"cannot start {sys.executable}: {error.strerror}", FAILED)


def _run(arguments: list[str]) -> int:
    from .commands import Abort, ClickException, UsageError, application
    from .errors import BadInput, NoSupervisor, PostcopyError

    try:
        status = application(arguments[0] if arguments else "")(arguments, prog_name="postcopy", standalone_mode=False)
        return status if isinstance(status, int) else DONE
    except UsageError as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "postcopy"
        return _complain(f"{_message(error)} (see: {where} --help)", USAGE)
    except BadInput as error:
        return _complain(str(error), USAGE)
    except NoSupervisor as error:
        return _complain(str(error), NO_SUPERVISOR)
    except (Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except ClickException as error:
        return _complain(_message(error), FAILED)
    except PostcopyError as error:
        return _complain(str(error), FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", FAILED)


def _message(error: Exception) -> str:
    """The text of a typer error, without the box that typer draws around it."""
    format_message = getattr(error, "format_message", None)
    return str(format_message() if format_message is not None else error)


def _complain(text: str, status: int) -> int:
    from postcopy_protocol.display import printable

    print(f"postcopy: {printable(' '.join(text.split()))}", file=sys.stderr)
    return status


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # `python -m` has put the current directory there: what is imported from here on is not from it
    main()
