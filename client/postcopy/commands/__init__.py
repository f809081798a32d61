"""The command line: one module per group of commands, put together here. ``import postcopy`` imports none."""

from __future__ import annotations

import typer

from . import back_end, control, demo, doctor, load, memory, probe, source, top, trace

# typer has click inside from some version on; this is the same class in all of them.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
ClickException: type[Exception] = UsageError.__bases__[0]
Abort: type[BaseException] = typer.Abort


def application() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        name="postcopy",
        help="Memory that is usable before its contents have arrived.",
        add_completion=False,
        no_args_is_help=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(_start)
    for program in (serve, source.source):
        app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)(
            program
        )
    for group in (back_end, probe, demo, control, memory, load, top, trace, doctor, source):
        group.add_to(app)
    return app


def _start(context: typer.Context, version: bool = typer.Option(False, "--version", help="Show the version.")) -> None:
    if version:
        from .. import __version__

        print(f"postcopy {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def serve() -> None:
    """Serve RAM blocks, in the foreground: NAME=SOURCE ... (see: postcopy serve --help)."""
    raise typer.BadParameter("serve stands first: postcopy serve NAME=SOURCE ...")
