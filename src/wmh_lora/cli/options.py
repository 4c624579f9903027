"""What the user chose of model, settings and device, and the engine that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmh_lora.cli.imports import without_collection
from wmh_lora.errors import ConfigError
from wmh_lora.models.allocator import keep_freed_memory

if TYPE_CHECKING:
    from wmh_lora.config import PlaneMode, Precision, TtaMode
    from wmh_lora.engine import WMHInferenceEngine
    from wmh_lora.report.outputs import PageFormat

__all__ = ["Options", "make_engine", "require_t1_backend"]


@dataclass(frozen=True)
class Options:
    """What the user chose; None leaves a setting to the model."""

    out_dir: Path
    model: str = "default"
    base_weights: Path | None = None
    adapter: Path | None = None
    t1: Path | None = None
    register_t1: bool = False
    tta: TtaMode | None = None
    planes: PlaneMode | None = None
    zoom: float | None = None
    threshold: float | None = None
    min_voxels: int | None = None
    min_peak: float | None = None
    min_contrast: float | None = None
    adaptive: bool | None = None
    precision: Precision | None = None
    max_memory: str | None = None
    device: str = "auto"
    backend: str = "torch"
    page: PageFormat = "html"
    overwrite: bool = False
    threads: int | None = None
    debug: bool = False
    quiet: bool = False

    @property
    def inference(self) -> dict[str, Any]:
        """Fields of `wmh_lora.config.InferenceConfig`."""
        from wmh_lora.config import InferenceConfig

        names = [field.name for field in fields(InferenceConfig) if hasattr(self, field.name)]
        return {name: getattr(self, name) for name in names}


def require_t1_backend(backend: str) -> None:
    """Raise ConfigError for a backend whose networks take no T1."""
    if backend != "torch":
        raise ConfigError(f"The backend {backend} takes no T1; leave --backend out.")


def make_engine(options: Options) -> WMHInferenceEngine:
    """Load the model that was chosen onto the device that was chosen.

    Raises
    ------
    ConfigError
        If a setting cannot be used with this model.
    WeightsError, DeviceError
        If the model cannot be run.
    """
    with without_collection():
        import torch

        from wmh_lora.engine import WMHInferenceEngine, choose_device, load_model

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.max_memory is None:
        keep_freed_memory()
    device = choose_device(options.device)  # first: it fails faster than a model loads
    model = load_model(options.model, base_weights=options.base_weights, adapter=options.adapter)
    if options.backend != "torch":
        from wmh_lora.models.backends import with_backend

        model = replace(model, net=with_backend(model, options.backend))
    engine = WMHInferenceEngine(model, device)
    engine.settings(**options.inference)  # what cannot be used concerns every scan
    if options.t1 is not None:
        engine.require_t1()
    return engine
