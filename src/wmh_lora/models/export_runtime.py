"""Exported networks as modules: (B, C, H, W) slices -> logits, computed outside PyTorch.

The runtimes use as many threads as PyTorch is set to at the moment of loading. They compute on the
CPU, wherever the slices are.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmh_lora.errors import ConfigError, WeightsError

__all__ = ["ExportedNetwork", "OnnxNetwork", "OpenVinoNetwork", "TorchScriptNetwork", "optional"]

_KEPT_SHAPES = 4  # full and last batch of a scan, upright and turned


def optional(package: str) -> Any:
    """Import an optional package.

    Raises
    ------
    ConfigError
        If it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"The package {package} is needed for this and cannot be imported ({error}); run "
            "`pip install wmh-lora[export]`."
        ) from error


def _unreadable(path: Path, runtime: str, error: Exception) -> WeightsError:
    reason = " ".join(str(error).split())[:200]
    return WeightsError(f"{runtime} cannot read {path}: {reason}; export the model again.")


class ExportedNetwork(nn.Module):
    """Base of the modules that run an exported file.

    Parameters
    ----------
    size_multiple : int
        Height and width of the slices must be multiples of it.
    """

    on_cpu_alone = True
    """Whether it computes on the CPU wherever it is moved to."""

    def __init__(self, size_multiple: int) -> None:
        super().__init__()
        self.size_multiple = size_multiple

    def compute(self, slices: Tensor) -> Tensor:
        """Map contiguous float32 slices on the CPU to logits."""
        raise NotImplementedError

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, C, H, W) in [0, 1] to logits (B, structures, H, W) on the same device."""
        logits = self.compute(slices.detach().to("cpu", torch.float32).contiguous())
        return logits.to(slices.device)


class TorchScriptNetwork(ExportedNetwork):
    """A TorchScript file.

    Raises
    ------
    WeightsError
        If the file cannot be read.
    """

    on_cpu_alone = False

    def __init__(self, path: Path, size_multiple: int) -> None:
        super().__init__(size_multiple)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r".*torch\.jit\.", DeprecationWarning)
                self.script = torch.jit.load(path, map_location="cpu")
        except (RuntimeError, ValueError) as error:
            raise _unreadable(path, "PyTorch", error) from error

    def forward(self, slices: Tensor) -> Tensor:
        """See `ExportedNetwork`; runs where the module is moved to."""
        # Specialising the graph to each shape takes seconds and gains nothing here.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            logits: Tensor = self.script(slices)
        return logits


class OnnxNetwork(ExportedNetwork):
    """An ONNX file in ONNX Runtime.

    Raises
    ------
    ConfigError
        If ONNX Runtime is not installed.
    WeightsError
        If the file cannot be read.
    """

    def __init__(self, path: Path, size_multiple: int) -> None:
        super().__init__(size_multiple)
        runtime = optional("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        # Threads that wait by spinning would take the processor from what follows the network.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise _unreadable(path, "ONNX Runtime", error) from error
        self._input = self._session.get_inputs()[0].name

    def compute(self, slices: Tensor) -> Tensor:
        """See `ExportedNetwork`."""
        return torch.from_numpy(self._session.run(None, {self._input: slices.numpy()})[0])


class OpenVinoNetwork(ExportedNetwork):
    """An OpenVINO file, in float32.

    It is compiled for each shape when that shape first occurs: a scan has two at most, and fixed
    shapes run faster than open ones.

    Raises
    ------
    ConfigError
        If OpenVINO is not installed.
    WeightsError
        If the file cannot be read.
    """

    def __init__(self, path: Path, size_multiple: int) -> None:
        super().__init__(size_multiple)
        self._core = optional("openvino").Core()
        try:
            self._model = self._core.read_model(path)
        except RuntimeError as error:
            raise _unreadable(path, "OpenVINO", error) from error
        self._threads = torch.get_num_threads()
        self._compiled: dict[tuple[int, ...], Any] = {}

    def compute(self, slices: Tensor) -> Tensor:
        """See `ExportedNetwork`."""
        shape = tuple(slices.shape)
        if shape not in self._compiled:
            if len(self._compiled) == _KEPT_SHAPES:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[shape] = self._compile(shape)
        # The result's memory belongs to the request, which writes over it the next time.
        return torch.from_numpy(self._compiled[shape](slices.numpy())[0].copy())

    def _compile(self, shape: tuple[int, ...]) -> Any:
        model = self._model.clone()
        model.reshape(list(shape))
        # Some processors would compute in bfloat16 unless told otherwise.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        return self._core.compile_model(
            model, "CPU", {**settings, "INFERENCE_NUM_THREADS": self._threads}
        )
