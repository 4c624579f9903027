"""The image encoder of SAM and MedSAM from the files in which it is published.

Three layouts of the same tensors are known, told apart by their keys:

- SAM's own [1]_, which MedSAM [2]_ shares: ``image_encoder.*`` beside prompt encoder and decoder;
- the image encoder alone, without that prefix;
- that of `SamModel` in the Hugging Face library: ``vision_encoder.*`` with other names inside.

References
----------
.. [1] Kirillov et al., Segment Anything, ICCV 2023, arXiv:2304.02643.
.. [2] Ma et al., Segment anything in medical images, Nature Communications 15:654, 2024.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from wmh_lora.errors import ConfigError, WeightsError
from wmh_lora.models.foreign_checkpoint import (
    check_finite,
    check_keys_and_shapes,
    checkpoint_file,
    read_state,
)
from wmh_lora.models.sam_vit import SAM_VIT_SPECS, SamViT
from wmh_lora.models.unset_values import unset_values

__all__ = ["encoder_key_of_hugging_face", "load_sam_vit", "sam_encoder_state"]

_SAM, _HUGGING_FACE = "image_encoder.", "vision_encoder."
# Of the whole model, parts that come after the image encoder. Their keys do not matter.
_OTHER_PARTS = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.")

_RENAMED = (
    (re.compile(r"^patch_embed\.projection\."), "patch_embed.proj."),
    (re.compile(r"^layers\."), "blocks."),
    (re.compile(r"^(blocks\.\d+\.)layer_norm([12])\."), r"\1norm\2."),
    (re.compile(r"^neck\.conv1\."), "neck.0."),
    (re.compile(r"^neck\.layer_norm1\."), "neck.1."),
    (re.compile(r"^neck\.conv2\."), "neck.2."),
    (re.compile(r"^neck\.layer_norm2\."), "neck.3."),
)


def encoder_key_of_hugging_face(key: str) -> str:
    """Translate a key of the Hugging Face vision encoder, without its prefix, to SAM's own.

    Examples
    --------
    >>> encoder_key_of_hugging_face("layers.11.layer_norm2.bias")
    'blocks.11.norm2.bias'
    >>> encoder_key_of_hugging_face("neck.conv2.weight")
    'neck.2.weight'
    """
    for pattern, replacement in _RENAMED:
        key = pattern.sub(replacement, key)
    return key


def sam_encoder_state(path: str | Path) -> dict[str, Tensor]:
    """Read the image encoder's tensors of a SAM checkpoint under SAM's keys, whatever its layout.

    Parameters
    ----------
    path : str or Path
        ``.pth``, ``.bin`` or ``.safetensors`` file, or a folder with one (see `checkpoint_file`).

    Returns
    -------
    dict of str to Tensor
        Keys without ``image_encoder.``; whether they are complete is not checked here.

    Raises
    ------
    WeightsError
        If the file cannot be read, or holds keys that belong to no part of SAM.
    """
    file = checkpoint_file(path)
    state = read_state(file)
    prefix = next((p for p in (_SAM, _HUGGING_FACE) if any(k.startswith(p) for k in state)), "")
    if not prefix:
        return state
    others = sorted(key for key in state if not key.startswith((prefix, *_OTHER_PARTS)))
    if others:
        raise WeightsError(
            f"{file} is no checkpoint of SAM: beside the image encoder it holds "
            f"{', '.join(others[:5])}{', ...' if len(others) > 5 else ''}. Name another file."
        )
    rename: Callable[[str], str] = str if prefix == _SAM else encoder_key_of_hugging_face
    return {
        rename(key.removeprefix(prefix)): value
        for key, value in state.items()
        if key.startswith(prefix)
    }


def load_sam_vit(path: str | Path, name: str) -> SamViT:
    """Read the image encoder of a SAM or MedSAM checkpoint.

    Memory: the encoder once, besides pages of the mapped file that the system can drop.

    Parameters
    ----------
    path : str or Path
        See `sam_encoder_state`. Half precision is widened.
    name : {"vit_b", "vit_l", "vit_h"}
        Size of the encoder that the file must hold.

    Returns
    -------
    SamViT
        On the CPU, float32, in eval mode, every parameter frozen.

    Raises
    ------
    ConfigError
        If there is no encoder of that name.
    WeightsError
        If the file cannot be read, does not hold exactly this encoder, or is not finite.
    """
    if name not in SAM_VIT_SPECS:
        known = ", ".join(SAM_VIT_SPECS)
        raise ConfigError(f"There is no SAM encoder called {name!r}; known are {known}.")
    file = checkpoint_file(path)
    state = sam_encoder_state(file)
    _check_size(file, state, name)
    with unset_values():  # all of them are replaced
        model = SamViT(SAM_VIT_SPECS[name])
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check_keys_and_shapes(file, state, shapes, layout=f"a checkpoint of SAM's {name} encoder")
    check_finite(file, state)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def _check_size(path: Path, state: Mapping[str, Tensor], name: str) -> None:
    """Raise WeightsError with a plain word if the file is another known encoder."""
    found = None
    if "patch_embed.seq.0.c.weight" in state:
        found = "LiteMedSAM's TinyViT"
    elif "pos_embed" in state:
        width = state["pos_embed"].shape[-1]
        found = next((known for known, spec in SAM_VIT_SPECS.items() if spec.dim == width), None)
    if found is not None and found != name:
        raise WeightsError(
            f"{path} holds the encoder {found}, expected {name}; name a file of {name}, or choose "
            f"the encoder that fits the file."
        )
