"""The command line: one module for each command, assembled here. ``import postcopy`` imports none of them.

``serve``, ``source`` and the commands on snapshots are programs of other wings, with their own parser:
``postcopy.__main__`` starts them before anything is imported. Here they only appear in the list of commands, and in
shell completion."""

from __future__ import annotations

from importlib import import_module

import typer

# typer contains click from some version on; these are the same classes in all of them.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
ClickException: type[Exception] = UsageError.__bases__[0]
Abort: type[BaseException] = typer.Abort

_MODULES = {
    "demo": "demo",
    "status": "status",
    "stop": "stop",
    "resume": "stop",
    "export": "export",
    "cat": "cat",
    "verify": "verify",
    "load": "load",
    "top": "top",
    "doctor": "doctor",
    "keygen": "keygen",
    "systemd-unit": "service_files",
    "dashboard": "service_files",
    "alert-rules": "service_files",
    "attach": "attach",
    "probe": "probe",
    "restore": "restore",
    "trace": "trace",
}
"""The module of each command, in the order of ``postcopy --help``."""


def application(command: str = "") -> typer.Typer:
    """The command line: with ``command`` only that one, because importing all of them takes as long again."""
    app = typer.Typer(
        name="postcopy",
        help="Memory that is usable before its contents have arrived.",
        add_completion=True,
        no_args_is_help=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(_start)
    for program in (serve, source, pack, unpack, inspect, diff, gc):
        app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)(
            program
        )
    for name in [command] if command in _MODULES else _MODULES:
        module = import_module(f".{_MODULES[name]}", __name__)
        if hasattr(module, "add_to"):  # a group of commands
            module.add_to(app)
        else:
            app.command()(getattr(module, name.replace("-", "_")))
    return app


def _start(context: typer.Context, version: bool = typer.Option(False, "--version", help="Show the version.")) -> None:
    if version:
        from .. import __version__

        print(f"postcopy {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def serve() -> None:
    """Serve RAM blocks, in the foreground: NAME=SOURCE ... (see: postcopy serve --help)."""
    raise typer.BadParameter("serve must be the first argument: postcopy serve NAME=SOURCE ...")


def source() -> None:
    """Serve files as remote blocks: NAME=FILE ... --listen ENDPOINT (see: postcopy source --help)."""
    raise typer.BadParameter("source must be the first argument: postcopy source NAME=FILE ... --listen ENDPOINT")


def pack() -> None:
    """Write a file or a block into a store of snapshots: SOURCE STORE/NAME (see: postcopy pack --help)."""
    raise typer.BadParameter("pack must be the first argument: postcopy pack SOURCE STORE/NAME")


def unpack() -> None:
    """Write a snapshot to a file: STORE/NAME FILE (see: postcopy unpack --help)."""
    raise typer.BadParameter("unpack must be the first argument: postcopy unpack STORE/NAME FILE")


def inspect() -> None:
    """Show what a snapshot is, and check its chunks: STORE/NAME (see: postcopy inspect --help)."""
    raise typer.BadParameter("inspect must be the first argument: postcopy inspect STORE/NAME")


def diff() -> None:
    """Compare two snapshots: STORE/NAME STORE/NAME (see: postcopy diff --help)."""
    raise typer.BadParameter("diff must be the first argument: postcopy diff STORE/NAME STORE/NAME")


def gc() -> None:
    """Remove the chunks of a store that no snapshot needs: STORE (see: postcopy gc --help)."""
    raise typer.BadParameter("gc must be the first argument: postcopy gc STORE")
