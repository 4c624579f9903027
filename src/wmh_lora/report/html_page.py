"""From a template to one page that needs nothing else, and that may fetch nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from wmh_lora._version import __version__

__all__ = ["data_uri", "render_page"]


def render_page(
    template: str, *, scripts: Sequence[str], trusted: Sequence[str] = (), **values: Any
) -> str:
    """Fill a template of ``assets/viewer``.

    Everything that is put into the page is escaped, unless it is `Markup` already. The page's
    content security policy lets nothing be fetched, and runs only the scripts named here.

    Parameters
    ----------
    template : str
        File name.
    scripts : sequence of str
        Names of the page's own scripts.
    trusted : sequence of str
        Further hashes (``sha256-...``) of scripts that the page may start.
    values
        For the template.
    """
    style = _asset("report.css")
    code = "\n".join(_asset(name) for name in scripts)
    allowed = " ".join(f"'{entry}'" for entry in (_source_hash(code), *trusted))
    policy = (
        f"default-src 'none'; script-src {allowed}; "
        f"style-src '{_source_hash(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = _environment().get_template(template)
    return page.render(
        style=Markup(style),  # files of this package
        code=Markup(code),
        policy=Markup(policy),
        version=__version__,
        **values,
    )


def data_uri(content: bytes, media_type: str) -> str:
    """Return bytes as an address that holds them."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@cache
def _asset(name: str) -> str:
    return (resources.files("wmh_lora") / "assets" / "viewer" / name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
