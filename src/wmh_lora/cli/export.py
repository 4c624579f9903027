"""``wmh-lora export``: the network of a model for other runtimes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

__all__ = ["export"]


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Read ``HxW`` in pixels."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is not height x width, such as 208x168.", ctx, param)
    return int(match[1]), int(match[2])


@click.command()
@click.argument("model", metavar="[NAME|FILE]", default="default")
@click.option(
    "--format",
    "kind",
    required=True,
    # Those of wmh_lora.models.export, which must not be imported for --help.
    type=click.Choice(["onnx", "openvino", "torchscript", "monai-bundle"]),
    help="onnx: *.onnx; openvino: *.xml and *.bin; torchscript: *.ts; monai-bundle: a folder.",
)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    required=True,
    type=click.Path(path_type=Path),
    help="File or folder to write, in a folder that exists.",
)
@click.option(
    "--size",
    metavar="HxW",
    callback=_size,
    help="Fix height and width, for runtimes that want that; onnx and openvino alone.",
)
@click.option(
    "--weights",
    "base_weights",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Weights of the model's base encoder; the cached or installed ones by default.",
)
@click.option("--overwrite", is_flag=True, help="Replace what exists.")
def export(
    model: str,
    kind: Any,
    output: Path,
    size: tuple[int, int] | None,
    base_weights: Path | None,
    overwrite: bool,
) -> None:
    """Write the network of a model in a format that other programs run.

    NAME or FILE as for `wmh-lora segment --model`; the packaged model by default. The result maps
    slices (B, 3, H, W) in [0, 1] to logits, for any batch and size unless --size is given, and
    says itself what it needs: structures, threshold, preprocessing, licence. What was written is
    compared with the source on random slices, and not kept if it differs.
    """
    from wmh_lora.models.export import export_model
    from wmh_lora.models.registry import load_model

    loaded = load_model(model, base_weights=base_weights)
    difference = export_model(loaded, output, kind, size=size, overwrite=overwrite)
    click.echo(f"{output} (probabilities as the source's to {difference:.1g})")
