"""Adapters as a standard PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

`peft.PeftModel.from_pretrained(encoder, folder)` reads what `export_peft` writes, and `import_peft`
reads what `PeftModel.save_pretrained` writes. The configuration names the base: the encoder under
``base_model_name_or_path``, the SHA-256 of its weights file under ``revision``.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from wmh_lora.errors import AdapterMismatchError, ConfigError, DataError, WeightsError
from wmh_lora.files import open_atomic, write_failure
from wmh_lora.logs import LOGGER
from wmh_lora.models.lora import check_tensors, lora_shapes, own_name, peft_config
from wmh_lora.models.lora_settings import LoraSettings

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["export_peft", "import_peft"]

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
# Our ending of a tensor's name, and peft's.
_ENDINGS = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
# Options of peft that change nothing of a trained adapter, or that `_settings` reads. Which layers
# are adapted is seen from the tensors.
_UNDERSTOOD = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora"),
    *("base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("inference_mode", "megatron_core", "qalora_group_size", "peft_type", "init_lora_weights"),
}
# Starts that leave the base weights alone; others, such as PiSSA, move part of them to the adapter.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


# --- writing --------------------------------------------------------------------------------


def export_peft(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    settings: LoraSettings,
    *,
    base_name: str,
    base_sha256: str,
    overwrite: bool = False,
) -> None:
    """Write adapters as a PEFT folder.

    Parameters
    ----------
    folder : str or Path
        Made if it is absent. Other files in it are left alone.
    tensors : Mapping
        What `wmh_lora.models.lora.extract_lora` returned.
    settings : LoraSettings
        As trained.
    base_name : str
        Name of the base encoder, e.g. ``"litemedsam"``.
    base_sha256 : str
        Checksum of its weights file; empty for an encoder with random weights.
    overwrite : bool
        Replace the two files if they exist.

    Raises
    ------
    AdapterMismatchError
        If the tensors are not those of the settings.
    DataError
        If a file exists, or cannot be written.
    """
    layers = _check_complete(tensors, settings)
    config = peft_config(layers, settings)
    config.base_model_name_or_path = base_name
    config.revision = base_sha256 or None
    config.inference_mode = True
    with tempfile.TemporaryDirectory() as temporary:
        config.save_pretrained(temporary)
        config_bytes = Path(temporary, CONFIG_FILE).read_bytes()
    named = {_peft_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    folder = Path(folder)
    contents = {
        folder / TENSOR_FILE: serialise(named, {"format": "pt"}),
        folder / CONFIG_FILE: config_bytes,
    }
    existing = [path for path in contents if path.exists()]
    if existing and not overwrite:
        raise DataError(
            f"{existing[0]} exists already and is left as it is; add --overwrite to replace it, "
            "or choose another output folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"Cannot make {folder}: {write_failure(folder, error)}.") from error
    for path, content in contents.items():
        with open_atomic(path, overwrite=overwrite) as stream:
            stream.write(content)


def _check_complete(tensors: Mapping[str, Tensor], settings: LoraSettings) -> list[str]:
    """Full names of the adapted layers, once all their tensors are there in the right rank."""
    layers = _layers(tensors)
    expected: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        rank = settings.ranks.get(own_name(layer))
        if rank is not None:
            a, b = (tensors.get(f"{layer}.{part}") for part in ("lora_a", "lora_b"))
            n_in, n_out = 0 if a is None else a.shape[-1], 0 if b is None else b.shape[0]
            expected |= {f"{layer}.lora_a": (rank, n_in), f"{layer}.lora_b": (n_out, rank)}
            if settings.dora:
                expected[f"{layer}.magnitude"] = (n_out,)
    check_tensors(tensors, expected, "the LoRA settings they are exported with")
    absent = set(settings.ranks) - {own_name(layer) for layer in layers}
    if absent or not layers:
        names = ", ".join(sorted(absent)) or "any layer"
        raise AdapterMismatchError(f"There are no adapters to export for {names}.")
    return layers


def _layers(tensors: Mapping[str, Tensor]) -> list[str]:
    """Full names of the layers that the tensors belong to."""
    return sorted({name.rpartition(".")[0] for name in tensors})


def _peft_name(name: str) -> str:
    """Name of a tensor in a PEFT folder."""
    layer, _, part = name.rpartition(".")
    return f"{_PREFIX}{layer}.{_ENDINGS[part]}"


# --- reading --------------------------------------------------------------------------------


def import_peft(
    folder: str | Path, encoder: nn.Module, *, base_name: str, base_sha256: str
) -> tuple[dict[str, Tensor], LoraSettings]:
    """Read adapters from a PEFT folder and check that they belong to ``encoder``.

    A folder that does not say which base it was trained on, as `PeftModel.save_pretrained` leaves
    it for a plain module, is taken with a warning: then only names and shapes are checked.

    Parameters
    ----------
    folder : str or Path
        With ``adapter_config.json`` and ``adapter_model.safetensors``.
    encoder : nn.Module
        The plain base encoder; it is not changed.
    base_name, base_sha256 : str
        Its name, and the checksum of its weights file (empty: random weights).

    Returns
    -------
    tensors : dict
        float32, named as by `wmh_lora.models.lora.extract_lora`.
    settings : LoraSettings
        What `wmh_lora.models.lora.merge_lora` needs with them.

    Raises
    ------
    AdapterMismatchError
        If the adapters are for another base, or tensors and configuration disagree.
    WeightsError
        If a file is absent or damaged, or uses options of `peft` that are not supported here.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _check_base(folder, config, base_name, base_sha256)
    tensors = _read_tensors(folder)
    try:
        settings = _settings(folder, config, tensors)
        expected = lora_shapes(encoder, settings)
    except ConfigError as error:
        raise AdapterMismatchError(
            f"The adapters in {folder} do not fit the encoder {base_name!r}: {error}"
        ) from error
    check_tensors(
        tensors, expected, f"the encoder {base_name!r} with the ranks that {folder} names"
    )
    return tensors, settings


def _read_config(folder: Path) -> LoraConfig:
    """The folder's configuration, if it is one of plain LoRA, rsLoRA or DoRA."""
    from peft import LoraConfig

    path = folder / CONFIG_FILE
    if not path.is_file():  # peft would look for it on the internet
        raise WeightsError(f"{folder} is no PEFT adapter folder: it has no {CONFIG_FILE}.")
    try:
        values = dict(LoraConfig.from_json_file(str(path)))
        kind = values.get("peft_type")
        if kind != "LORA":
            raise WeightsError(f"{path} is of the kind {kind!r}; only 'LORA' can be read.")
        _check_options(path, values, LoraConfig().to_dict())
        config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path} is not a valid PEFT configuration: {error}") from error
    return config


def _check_options(path: Path, values: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Refuse options that have another value than for ``plain`` LoRA and are not understood.

    Later versions of peft have more options; what is off does not matter.
    """
    other = [
        f"{name} = {value!r}"
        for name, value in values.items()
        if name not in _UNDERSTOOD and value not in (plain.get(name), None, False)
    ]
    start = values.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        other.append(f"init_lora_weights = {start!r}")
    if other:
        raise WeightsError(f"{path} uses options that are not supported: {', '.join(other)}.")


def _check_base(folder: Path, config: LoraConfig, base_name: str, base_sha256: str) -> None:
    """Refuse adapters that were trained on another base."""
    name, sha256 = config.base_model_name_or_path, config.revision
    if name and name != base_name:
        raise AdapterMismatchError(
            f"The adapters in {folder} were trained on the encoder {name!r}, not on {base_name!r}; "
            "choose that encoder."
        )
    if sha256 and sha256 != base_sha256:
        found = f"{base_sha256[:12]}..." if base_sha256 else "none (random weights)"
        raise AdapterMismatchError(
            f"The adapters in {folder} were trained on {base_name} weights with sha256 "
            f"{sha256[:12]}..., but these have {found}; use the weights they were trained on."
        )
    if not name or (base_sha256 and not sha256):
        LOGGER.warning("%s does not say which base weights it was trained on", folder)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors under our names, as float32."""
    path = folder / TENSOR_FILE
    if not path.is_file():
        if (folder / _PICKLE_FILE).is_file():
            raise WeightsError(
                f"{folder / _PICKLE_FILE} is a pickle, which can run any program when it is read, "
                f"and is left alone; get the adapter as {TENSOR_FILE} "
                "(save_pretrained(..., safe_serialization=True))."
            )
        raise WeightsError(f"{folder} is no PEFT adapter folder: it has no {TENSOR_FILE}.")
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is not a complete safetensors file ({error}).") from error
    return {_own_tensor_name(path, name): tensor.float() for name, tensor in stored.items()}


def _own_tensor_name(path: Path, name: str) -> str:
    """Our name of a tensor of a PEFT folder."""
    for ours, theirs in _ENDINGS.items():
        if name.startswith(_PREFIX) and name.endswith(f".{theirs}"):
            return f"{name.removeprefix(_PREFIX).removesuffix(theirs)}{ours}"
    raise AdapterMismatchError(f"{path} has the tensor {name!r}, which belongs to no LoRA adapter.")


def _settings(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoraSettings:
    """Settings of the layers that have tensors: one rank by layer name, one scale for all."""
    from peft.utils.other import get_pattern_key

    ranks_by_pattern, alphas_by_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    ranks: dict[str, int] = {}
    scales: list[float] = []
    for layer in _layers(tensors):
        rank = ranks_by_pattern.get(get_pattern_key(ranks_by_pattern, layer), config.r)
        alpha = alphas_by_pattern.get(get_pattern_key(alphas_by_pattern, layer), config.lora_alpha)
        if not (isinstance(rank, int) and rank >= 1 and isinstance(alpha, (int, float))):
            raise WeightsError(f"{folder}: the rank {rank!r} or alpha {alpha!r} is no number.")
        if ranks.setdefault(own_name(layer), rank) != rank:
            raise WeightsError(
                f"{folder}: {layer} has rank {rank}, other layers of that name have another; "
                "a rank for each layer name is supported."
            )
        scales.append(alpha / rank)
    if not scales:
        raise WeightsError(f"{folder / TENSOR_FILE} holds no adapters.")
    if not all(math.isclose(scale, scales[0]) for scale in scales):
        raise WeightsError(
            f"{folder}: alpha / rank differs between layers ({min(scales):g} to {max(scales):g}); "
            "one scale for all is supported."
        )
    return LoraSettings(
        ranks, scales[0], config.lora_dropout, rslora=config.use_rslora, dora=config.use_dora
    )
