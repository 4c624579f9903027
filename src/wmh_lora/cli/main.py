"""The ``wmh-lora`` command: finds its subcommands, and turns errors into sentences and exit codes.

Exit codes: 0 all done; 1 some inputs failed, the rest are done; 2 usage or configuration.
"""

from __future__ import annotations

import io
import sys
from importlib import import_module
from typing import Any

import click

from wmh_lora._version import __version__
from wmh_lora.cli.errors import describe_error, exit_code

__all__ = ["cli", "main"]

# The function of a command carries the name of its module.
_COMMANDS = (
    "segment",
    "demo",
    "bids",
    "longitudinal",
    "models",
    "data",
    "train",
    "tune",
    "adapt",
    "evaluate",
    "compare",
    "export",
)


class _LazyGroup(click.Group):
    """Imports a subcommand when it is asked for, and catches what it raises."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(import_module(f"wmh_lora.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            raise  # click ends quietly when the reader of a pipe has gone
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"wmh-lora: {describe_error(error)}", err=True)
            ctx.exit(exit_code(error))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wmh-lora")
@click.option("-v", "--verbose", is_flag=True, help="Tell more about what is done.")
@click.option("--debug", is_flag=True, help="Show the traceback when something fails.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool, debug: bool) -> None:
    """Find white matter hyperintensities in FLAIR MRI."""
    from wmh_lora.logs import configure_logging

    configure_logging(verbose=verbose)
    ctx.obj = {"debug": debug}


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a name that a terminal or a file cannot show is shown with escapes, and ends nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    cli(prog_name="wmh-lora")


if __name__ == "__main__":
    main()
