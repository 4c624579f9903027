"""What mkdocs adds to ``docs/cli.md``: the help of every command, as the program prints it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from wmh_lora.cli.main import cli

__all__ = ["on_page_markdown"]

_PAGE = "cli.md"
_WIDTH = 88


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Append the help of all commands to the page of the command line."""
    if page.file.src_uri != _PAGE:
        return markdown
    return "\n".join([markdown, *_sections(cli, "wmh-lora", None)])


def _sections(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    """Give a heading and the help of a command, then those of its commands."""
    context = click.Context(
        command,
        parent=parent,
        info_name=name,
        terminal_width=_WIDTH,
        help_option_names=["-h", "--help"],
    )
    level = 3 if context.command_path.count(" ") > 1 else 2  # ``models list`` below ``models``
    yield f"{'#' * level} {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from _sections(found, child, context)
