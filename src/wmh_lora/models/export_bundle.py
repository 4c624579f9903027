"""A model as a MONAI bundle: a folder of fixed layout that `monai.bundle` reads.

The network in it is TorchScript and needs PyTorch alone. What comes before and after the network
(orientation, intensity landmarks, restoring the scan's grid) is not made of MONAI's transforms, so
``configs/inference.json`` calls this package for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch

from wmh_lora._version import __version__
from wmh_lora.config_reading import from_dict, to_dict
from wmh_lora.errors import ConfigError, WeightsError
from wmh_lora.models.base_weights import BASE_WEIGHTS
from wmh_lora.models.export_runtime import TorchScriptNetwork
from wmh_lora.models.model_file import ModelCard
from wmh_lora.models.registry import Model

__all__ = ["METADATA_FILE", "NETWORK_FILE", "is_bundle", "load_bundle", "write_bundle"]

METADATA_FILE = "configs/metadata.json"
NETWORK_FILE = "models/model.ts"
_CONFIG_FILE = "configs/inference.json"
_OURS = "wmh_lora"  # key of the metadata that marks a bundle as written here
_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
_MONAI_VERSION = "1.4.0"  # the oldest that the package works with

_INFERENCE: dict[str, Any] = {
    "imports": [
        "$from wmh_lora.engine import WMHInferenceEngine",
        "$from wmh_lora.models.export_bundle import load_bundle",
    ],
    "bundle_root": ".",
    "scan": "FLAIR.nii.gz",
    "output_dir": "$@bundle_root + '/eval'",
    "device": "auto",
    "network_def": {"_target_": "torch.jit.load", "f": f"$@bundle_root + '/{NETWORK_FILE}'"},
    "engine": "$WMHInferenceEngine(load_bundle(@bundle_root), @device)",
    "run": ["$@engine.segment(@scan).save(@output_dir)"],
}


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder is a bundle that `write_bundle` made."""
    try:
        metadata = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(metadata, dict) and _OURS in metadata


def write_bundle(folder: Path, model: Model, description: Mapping[str, str]) -> None:
    """Write all of a bundle but its network, which goes to `NETWORK_FILE`.

    Parameters
    ----------
    folder : Path
        Does not exist yet.
    model : Model
        The source.
    description : mapping
        From `wmh_lora.models.export.describe_export`.

    Raises
    ------
    OSError
        If the file system refuses.
    """
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir(parents=True)
    card = replace(model.card, name=description["name"])  # which tells a site's adapter as well
    metadata = _metadata(card, description)
    for name, content in ((METADATA_FILE, metadata), (_CONFIG_FILE, _INFERENCE)):
        text = json.dumps(content, indent=4, ensure_ascii=False)
        (folder / name).write_text(f"{text}\n", encoding="utf-8")
    (folder / "docs" / "README.md").write_text(_readme(card), encoding="utf-8")
    (folder / "LICENSE").write_text(_licence(card), encoding="utf-8")


def load_bundle(folder: str | Path) -> Model:
    """Read a bundle back as a model for `WMHInferenceEngine`.

    Parameters
    ----------
    folder : str or Path
        Root of the bundle.

    Raises
    ------
    WeightsError
        If the folder is not a bundle of this package, or is damaged.
    """
    folder = Path(folder)
    if not is_bundle(folder) or not (folder / NETWORK_FILE).is_file():
        raise WeightsError(
            f"{folder} is not a complete bundle of a WMH-LoRA model: expected {METADATA_FILE} with "
            f"the key {_OURS!r} and {NETWORK_FILE}; export the model again."
        )
    ours = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))[_OURS]
    try:
        card = from_dict(ModelCard, ours["card"])
        net = TorchScriptNetwork(folder / NETWORK_FILE, int(ours["size_multiple"]))
        return Model(net=net, card=card, path=folder, sha256=ours["model_sha256"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise WeightsError(
            f"The bundle {folder} cannot be read ({error}); export the model again."
        ) from error


def _metadata(card: ModelCard, description: Mapping[str, str]) -> dict[str, Any]:
    """`configs/metadata.json` in the layout of MONAI's schema, and what is ours under one key."""
    side = f"{description['size_multiple']}*n"
    common = {"spatial_shape": [side, side], "dtype": "float32", "is_patch_data": False}
    slices = card.model.in_channels
    return {
        "schema": _SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported from {card.name} by wmh-lora {__version__}"},
        "monai_version": _MONAI_VERSION,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": numpy.__version__,
        "required_packages_version": {"wmh-lora": __version__},
        "name": card.name,
        "task": "Segmentation of white matter hyperintensities",
        "description": "Finds white matter hyperintensities in FLAIR MRI, slice by slice.",
        "authors": "WMH-LoRA contributors",
        "copyright": "See LICENSE",
        "intended_use": "Research only; not a medical device.",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "MR",
                    "num_channels": slices,
                    "value_range": [0, 1],
                    "channel_def": {str(i): f"slice {i - slices // 2:+d}" for i in range(slices)},
                    **common,
                }
            },
            "outputs": {
                "pred": {
                    "type": "logits",
                    "format": "segmentation",
                    "num_channels": len(card.model.structures),
                    "value_range": [],
                    "channel_def": {str(i): name for i, name in enumerate(card.model.structures)},
                    **common,
                }
            },
        },
        _OURS: {**description, "card": to_dict(card)},
    }


def _licence(card: ModelCard) -> str:
    lines = [f"Trained parts of the model {card.name}: {card.licence or 'licence not stated'}."]
    base = BASE_WEIGHTS.get(card.model.encoder) if card.base_sha256 else None
    if base is not None:
        lines.append(f"Base encoder, {base.description}: {base.licence}, {base.homepage}.")
    lines.append("Licence texts: https://spdx.org/licenses/")
    return "\n".join([*lines, ""])


def _readme(card: ModelCard) -> str:
    return f"""# {card.name}

Segments white matter hyperintensities on FLAIR MRI. For research; not a medical device.

`models/model.ts` maps slices (B, {card.model.in_channels}, H, W) in [0, 1] to logits of
{", ".join(card.model.structures)}. `configs/inference.json` makes the slices and brings the result
back to the scan's grid with the Python package `wmh-lora` {__version__}, which must be installed.

From the folder of the bundle:

    python -m monai.bundle run --config_file configs/inference.json --scan FLAIR.nii.gz \\
        --output_dir out

This command of MONAI needs the package `fire`.
"""
