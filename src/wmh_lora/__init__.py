"""Find white matter hyperintensities in FLAIR MRI: small encoders, or large ones with LoRA.

In one call::

    import wmh_lora

    result = wmh_lora.segment("sub-01_FLAIR.nii.gz")
    print(result.volume_ml, len(result.lesions))
    result.save("results")

The names below are loaded when they are first used, so that importing the package, and asking the
command line for help, does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wmh_lora._version import __version__

if TYPE_CHECKING:
    from wmh_lora.engine import Segmentation, WMHInferenceEngine, load_model, segment
    from wmh_lora.models.registry import Model
    from wmh_lora.volume import Volume

__all__ = [
    "Model",
    "Segmentation",
    "Volume",
    "WMHInferenceEngine",
    "__version__",
    "load_model",
    "segment",
]

_SOURCES = {
    "Model": "wmh_lora.models.registry",
    "Segmentation": "wmh_lora.engine",
    "Volume": "wmh_lora.volume",
    "WMHInferenceEngine": "wmh_lora.engine",
    "load_model": "wmh_lora.engine",
    "segment": "wmh_lora.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_SOURCES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_SOURCES})
