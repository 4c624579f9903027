"""Exported networks: ONNX, OpenVINO, TorchScript and MONAI bundle, each checked before it is kept.

An exported file maps slices (B, C, H, W) in [0, 1] to logits and knows what is needed around it:
see `describe_export`. It holds the whole network, base encoder included, with adapters merged.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from wmh_lora._version import __version__
from wmh_lora.config_reading import to_dict
from wmh_lora.errors import ConfigError, DataError, WeightsError
from wmh_lora.files import write_failure
from wmh_lora.models.base_weights import BASE_WEIGHTS
from wmh_lora.models.export_bundle import NETWORK_FILE, is_bundle, write_bundle
from wmh_lora.models.export_layers import example_slices, trace_network, traceable, tracing
from wmh_lora.models.export_runtime import (
    ExportedNetwork,
    OnnxNetwork,
    OpenVinoNetwork,
    TorchScriptNetwork,
    optional,
)
from wmh_lora.models.network import WMHNet
from wmh_lora.models.registry import Model

__all__ = [
    "FORMATS",
    "TOLERANCE",
    "TORCHSCRIPT_METADATA",
    "ExportFormat",
    "describe_export",
    "export_model",
]

ExportFormat = Literal["onnx", "openvino", "torchscript", "monai-bundle"]
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)

TOLERANCE = 1e-4
"""Largest difference in probability from the source model that an exported file may have."""

TORCHSCRIPT_METADATA = "wmh_lora.json"
"""Name of the extra file with what a TorchScript file says about itself."""

_OPSET = 17  # the first with layer normalisation; ONNX Runtime 1.14 and OpenVINO 2023 read it
_ONNX_BYTES = 2**31 - 2**24  # a protobuf message ends at 2 GB
# (batch, height, width) of the check, rounded up to what the network takes: neither is the size
# of the traced example, and windows reach beyond the picture at one and are several at the other.
_CHECKED = ((1, 72, 120), (3, 240, 104))


@dataclass(frozen=True)
class _Format:
    """How one format is written and run; the suffix is empty for a folder."""

    suffix: str
    write: Callable[[Path, Model, tuple[int, int] | None], None]
    network: Callable[[Path, int], ExportedNetwork]
    packages: tuple[str, ...] = ()


def describe_export(model: Model, size: tuple[int, int] | None = None) -> dict[str, str]:
    """Return what an exported file says about itself, as text.

    Parameters
    ----------
    model : Model
        The source.
    size : (height, width), optional
        If the file takes this size alone.

    Returns
    -------
    dict
        ``structures``, ``preprocess``, ``inference`` and ``model`` are JSON, the rest is plain.
    """
    card, multiple = model.card, source_network(model).size_multiple
    allowed = f"multiples of {multiple}" if size is None else f"exactly {size[0]} and {size[1]}"
    base = BASE_WEIGHTS.get(card.model.encoder) if card.base_sha256 else None
    described = model.describe()
    sha256 = described.pop("sha256")
    lesion = "sigmoid(wmh)" + (" * sigmoid(brain)" if "brain" in card.model.structures else "")
    return {
        **described,
        "licence": card.licence,
        "structures": json.dumps(card.model.structures),
        "threshold": f"{card.inference.threshold:g}",
        "preprocess_version": str(card.preprocess.version),
        "preprocess": json.dumps(to_dict(card.preprocess), sort_keys=True),
        "inference": json.dumps(to_dict(card.inference), sort_keys=True),
        "model": json.dumps(to_dict(card.model), sort_keys=True),
        "model_sha256": sha256,
        "base_licence": "" if base is None else base.licence,
        "size_multiple": str(multiple),
        "input": f"slices: float32 (B, {card.model.in_channels}, H, W) in [0, 1], neighbours as "
        f"outer channels; H and W {allowed}; T1, if the network knows it, counts as missing",
        "output": f"logits: float32 (B, {len(card.model.structures)}, H, W), one channel for each "
        "of the structures",
        "lesion_probability": lesion,
        "package_version": __version__,
    }


def export_model(
    model: Model,
    path: str | Path,
    kind: ExportFormat,
    *,
    size: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> float:
    """Write a model's network in another format and compare what was written with the source.

    Parameters
    ----------
    model : Model
        From `load_model`.
    path : str or Path
        A file ending in ``.onnx``, ``.xml`` (its weights go beside it, in ``.bin``) or ``.ts``; for
        a bundle, a folder.
    kind : {"onnx", "openvino", "torchscript", "monai-bundle"}
        Format.
    size : (height, width), optional
        Fix the size in pixels, for runtimes that want that; ONNX and OpenVINO alone. By default
        any multiple of the network's ``size_multiple`` can be given. The batch is always open.
    overwrite : bool
        Replace what exists. A folder is replaced only if it is a bundle.

    Returns
    -------
    float
        Largest difference in probability from the source, on random slices of two sizes.

    Raises
    ------
    ConfigError
        If the format, the ending or the size does not fit, or an optional package is missing.
    WeightsError
        If the network cannot be exported, or the written file computes something else.
    DataError
        If the target exists, or cannot be written.
    """
    path, net = Path(path), source_network(model)
    form = _check_request(path, kind, size, net)
    _check_target(path, form, overwrite)
    with _folder_beside(path) as folder:
        draft = folder / path.name
        try:
            form.write(draft, model, size)
        except (RuntimeError, ValueError, TypeError) as error:
            raise WeightsError(
                f"{model.path} cannot be written as {kind}: {_first_line(error)}. Nothing was "
                "kept; try another format."
            ) from error
        exported = form.network(draft, net.size_multiple)
        difference = _difference(net, exported, model.card.model.in_channels, size)
        if not difference <= TOLERANCE:  # NaN as well
            raise WeightsError(
                f"The {kind} file of {model.path} differs from it by up to {difference:.2g} in "
                f"probability, allowed is {TOLERANCE:g}; nothing was kept. Try another format, or "
                "other versions of torch and of the format's packages."
            )
        _move(draft, path, form)
    return difference


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def source_network(model: Model) -> WMHNet:
    """Return the network that an export is made of.

    Raises
    ------
    ConfigError
        If it is none of this package's, but an exported one, say.
    """
    if not isinstance(model.net, WMHNet):
        raise ConfigError(
            f"Only a network of this package can be exported, found {type(model.net).__name__}."
        )
    return model.net


# --- the request ------------------------------------------------------------------------------


def _check_request(path: Path, kind: str, size: tuple[int, int] | None, net: WMHNet) -> _Format:
    """Look the format up; refuse what does not fit, before any work is done."""
    if kind not in _FORMATS:
        raise ConfigError(f"Unknown export format {kind!r}; known are {', '.join(FORMATS)}.")
    form = _FORMATS[kind]
    for package in form.packages:
        optional(package)
    if path.suffix != form.suffix and form.suffix:
        raise ConfigError(f"A file of format {kind} ends in {form.suffix}, found {path}.")
    if size is None:
        return form
    if kind not in ("onnx", "openvino"):
        raise ConfigError(f"The format {kind} takes any size; leave out the size {size}.")
    multiple = net.size_multiple
    if min(size) < 1 or size[0] % multiple or size[1] % multiple:
        raise ConfigError(
            f"Height and width must be positive multiples of {multiple} pixels for this network, "
            f"found {size[0]}x{size[1]}."
        )
    return form


def _check_target(path: Path, form: _Format, overwrite: bool) -> None:
    for target in _targets(path, form):
        if not target.exists() and not target.is_symlink():
            continue
        if not overwrite:
            raise DataError(
                f"{target} exists already and is left as it is; add --overwrite to replace it, "
                "or choose another output."
            )
        replaceable = is_bundle(target) if form.suffix == "" else not target.is_dir()
        if not replaceable:
            raise DataError(
                f"{target} exists and is not an export of this format, so that it is not replaced; "
                "choose another output."
            )


def _targets(path: Path, form: _Format) -> list[Path]:
    """What is put in place, the file that makes it complete last."""
    return [path.with_suffix(".bin"), path] if form.suffix == ".xml" else [path]


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder on the target's file system, gone after the block."""
    folder = path.parent / f".wmh-lora-{secrets.token_hex(6)}.tmp"
    try:
        folder.mkdir()
    except OSError as error:
        raise DataError(f"Cannot write {path}: {write_failure(path, error)}.") from error
    try:
        yield folder
    except OSError as error:
        raise DataError(f"Cannot write {path}: {write_failure(path, error)}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(draft: Path, path: Path, form: _Format) -> None:
    """Put the checked draft in its place."""
    sources = _targets(draft, form)
    for source, target in zip(sources, _targets(path, form), strict=True):
        if target.is_dir():
            target.rename(draft.parent / ".replaced")  # goes with the folder
        source.replace(target)


# --- the formats ------------------------------------------------------------------------------


def _write_torchscript(path: Path, model: Model, _: tuple[int, int] | None) -> None:
    extra = {TORCHSCRIPT_METADATA: json.dumps(describe_export(model), indent=2)}
    traced = trace_network(source_network(model), model.card.model.in_channels)
    with tracing():
        torch.jit.save(traced, path, _extra_files=extra)


def _write_onnx(path: Path, model: Model, size: tuple[int, int] | None) -> None:
    onnx = optional("onnx")
    net = source_network(model)
    if sum(p.numel() * p.element_size() for p in net.parameters()) > _ONNX_BYTES:
        raise ConfigError("An ONNX file holds less than 2 GB; choose another format.")
    axes = {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
    with tracing():
        torch.onnx.export(
            traceable(net),
            (example_slices(net, model.card.model.in_channels, size),),
            str(path),
            dynamo=False,
            opset_version=_OPSET,
            input_names=["slices"],
            output_names=["logits"],
            dynamic_axes={"slices": axes, "logits": axes},
        )
    document = onnx.load(str(path))
    document.producer_name, document.producer_version = "wmh-lora", __version__
    onnx.helper.set_model_props(document, describe_export(model, size))
    onnx.checker.check_model(document)
    onnx.save(document, str(path))


def _write_openvino(path: Path, model: Model, size: tuple[int, int] | None) -> None:
    openvino = optional("openvino")
    channels = model.card.model.in_channels
    shape = openvino.PartialShape([-1, channels, *(size or (-1, -1))])
    with tracing():
        document = openvino.convert_model(
            trace_network(source_network(model), channels), input=[shape]
        )
    document.inputs[0].get_tensor().set_names({"slices"})
    document.outputs[0].get_tensor().set_names({"logits"})
    for key, value in describe_export(model, size).items():
        document.set_rt_info(value, ["wmh_lora", key])
    openvino.save_model(document, path, compress_to_fp16=False)


def _write_monai_bundle(path: Path, model: Model, _: tuple[int, int] | None) -> None:
    write_bundle(path, model, describe_export(model))
    _write_torchscript(path / NETWORK_FILE, model, None)


def _bundle_network(path: Path, size_multiple: int) -> ExportedNetwork:
    return TorchScriptNetwork(path / NETWORK_FILE, size_multiple)


_FORMATS: Mapping[str, _Format] = {
    "onnx": _Format(".onnx", _write_onnx, OnnxNetwork, ("onnx", "onnxruntime")),
    "openvino": _Format(".xml", _write_openvino, OpenVinoNetwork, ("openvino",)),
    "torchscript": _Format(".ts", _write_torchscript, TorchScriptNetwork),
    "monai-bundle": _Format("", _write_monai_bundle, _bundle_network),
}


# --- the check --------------------------------------------------------------------------------


@torch.inference_mode()
def _difference(
    net: WMHNet, exported: ExportedNetwork, in_channels: int, size: tuple[int, int] | None
) -> float:
    """Largest difference in probability on random slices, NaN if either computes one."""
    generator = torch.Generator().manual_seed(0)
    multiple, largest = net.size_multiple, torch.zeros(())
    for batch, *least in _CHECKED:
        height, width = size or (-(-side // multiple) * multiple for side in least)
        slices = torch.rand(batch, in_channels, height, width, generator=generator)
        difference = (exported(slices).sigmoid() - net(slices).sigmoid()).abs().max()
        largest = torch.maximum(largest, difference)
    return float(largest)
