"""Settings of one training run: frozen dataclasses read from TOML, with overrides."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from wmh_lora.config import ModelConfig, PreprocessConfig
from wmh_lora.config_reading import from_dict, read_toml
from wmh_lora.data.sources import DataConfig
from wmh_lora.errors import ConfigError
from wmh_lora.training.losses import LossConfig
from wmh_lora.training.presets import config_path

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10 has no TOML reader of its own
    import tomli as tomllib

__all__ = ["RunConfig", "TrainingConfig", "ValidationCase", "apply_overrides", "read_run_config"]


@dataclass(frozen=True)
class TrainingConfig:
    """Everything about the optimisation; the hardware changes none of it, but for ``auto`` choices.

    Attributes
    ----------
    steps
        Optimiser steps of the whole run, unless ``epochs`` are given.
    epochs
        Passes over the training slices of a manifest. ``steps``, ``warmup_steps``,
        ``restart_steps``, ``checkpoint_steps``, ``keep_steps`` and ``validate_steps`` then follow
        from the settings in epochs, and a checkpoint is written after every epoch.
    warmup_epochs, restart_epochs, checkpoint_epochs, validate_epochs
        As the settings in steps; every ``checkpoint_epochs``-th checkpoint is kept for good. They
        count only together with ``epochs``; the defaults are the published ones.
    batch_size, accumulation
        Crops in one forward pass, and forward passes in one optimiser step, those of all
        processes together.
    crop
        Side of the square training crops, pixels; 0 for whole slices.
    base_weights
        Checkpoint of the base encoder; the installed or cached one by default.
    start_from
        Model file, or name of a packaged model, whose weights are the first; empty to begin with
        none. It has the same ``[model]`` settings, or lacks T1.
    trained
        ``all`` that ``model.adaptation`` allows, or ``t1``: the convolution that T1 enters by, and
        nothing else, so that without T1 the model stays what it was.
    seed
        Seed of initial weights, dropout and the sample stream.
    lora_lr, adapter_lr, decoder_lr, encoder_lr
        Peak learning rates of LoRA matrices, channel adapter, decoder, and an encoder that is
        trained in full; 0 leaves their weights as they are (running statistics of BatchNorm move).
    eta_min
        Learning rate at the end of the cosine.
    warmup_steps
        Steps of linear warm-up.
    schedule, restart_steps
        ``cosine`` to the last step, or ``warm-restarts`` every ``restart_steps`` steps.
    weight_decay
        AdamW decay of matrices and kernels; biases and norms have none.
    betas
        AdamW moment decays.
    grad_clip
        Largest global gradient norm.
    precision
        ``fp32``, or ``bf16`` or ``fp16`` for autocast of the forward pass, the latter with a scaled
        loss; ``auto`` for the one that the device is fastest in.
    device
        ``auto`` for a GPU where there is one, or ``cpu``.
    gradient_checkpointing
        Compute parts of the encoder again in the backward pass: less memory, more time.
    t1_dropout
        Share of the samples with T1 whose T1 is hidden, so that the model also learns to do
        without; in [0, 1], of models with ``t1_channels`` only.
    ema_decay
        Decay of the moving average of the weights that validation and export use; 0 for none.
    workers
        Processes that make samples; 0 makes them in the main process.
    threads
        Threads of torch; 0 leaves torch's choice.
    checkpoint_minutes, checkpoint_steps, keep_checkpoints
        A checkpoint is written when either interval has passed (0 switches one off); so many of
        the newest are kept.
    keep_steps
        Checkpoints at multiples of it are kept for good; 0 for none.
    validate_steps, validation_stride, validation_batch
        Steps between validations (0: at the end only), every n-th slice, slices in one pass.
    log_steps
        Steps averaged in one record of ``metrics.jsonl``.
    tensorboard
        Write the records to ``tensorboard/`` too; needs the package ``tensorboard``.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    steps: int = 6000
    epochs: int = 0
    warmup_epochs: int = 5
    restart_epochs: int = 25
    checkpoint_epochs: int = 10
    validate_epochs: int = 1
    batch_size: int = 4
    accumulation: int = 1
    crop: int = 128
    base_weights: str = ""
    start_from: str = ""
    trained: Literal["all", "t1"] = "all"
    seed: int = 42
    lora_lr: float = 3e-4
    adapter_lr: float = 3e-4
    decoder_lr: float = 3e-4
    encoder_lr: float = 3e-4
    eta_min: float = 1e-6
    warmup_steps: int = 200
    schedule: Literal["cosine", "warm-restarts"] = "cosine"
    restart_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    gradient_checkpointing: bool = False
    t1_dropout: float = 0.5
    ema_decay: float = 0.0
    workers: int = 1
    threads: int = 0
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    keep_steps: int = 0
    validate_steps: int = 500
    validation_stride: int = 1
    validation_batch: int = 4
    log_steps: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("log_steps", "validation_stride", "validation_batch"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup_steps", "workers", "threads", "validate_steps", "seed", "crop"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("epochs", "warmup_epochs", "checkpoint_epochs", "validate_epochs"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.keep_steps >= 0, "keep_steps", self.keep_steps, "0 or more")
        for name in ("checkpoint_minutes", "checkpoint_steps", "weight_decay", "eta_min"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("lora_lr", "adapter_lr", "decoder_lr", "encoder_lr"):
            rate = getattr(self, name)
            allowed = rate == 0 or rate >= self.eta_min
            _require(allowed, name, rate, f"0, or at least eta_min ({self.eta_min})")
        _require(self.grad_clip > 0, "grad_clip", self.grad_clip, "above 0")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        _require(0 <= self.t1_dropout <= 1, "t1_dropout", self.t1_dropout, "in [0, 1]")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "betas",
            self.betas,
            "two numbers in [0, 1)",
        )
        known = self.precision in ("auto", "fp32", "bf16", "fp16")
        _require(known, "precision", self.precision, "auto, fp32, bf16 or fp16")
        _require(self.device in ("auto", "cpu"), "device", self.device, "auto or cpu")
        _require(self.trained in ("all", "t1"), "trained", self.trained, "all or t1")
        known = self.schedule in ("cosine", "warm-restarts")
        _require(known, "schedule", self.schedule, "cosine or warm-restarts")
        if self.schedule == "warm-restarts":
            name = "restart_epochs" if self.epochs else "restart_steps"
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")

    @property
    def samples_per_step(self) -> int:
        """Crops in one optimiser step."""
        return self.batch_size * self.accumulation

    def in_steps(self, epoch_samples: int) -> TrainingConfig:
        """Turn what is set in epochs into steps; without epochs nothing changes.

        Parameters
        ----------
        epoch_samples
            Samples of an epoch, a multiple of `samples_per_step`.
        """
        if not self.epochs:
            return self
        steps = epoch_samples // self.samples_per_step
        return replace(
            self,
            steps=self.epochs * steps,
            warmup_steps=self.warmup_epochs * steps,
            restart_steps=self.restart_epochs * steps,
            checkpoint_steps=steps,
            keep_steps=self.checkpoint_epochs * steps,
            validate_steps=self.validate_epochs * steps,
        )


@dataclass(frozen=True)
class ValidationCase:
    """One whole scan with its reference mask.

    Attributes
    ----------
    image
        FLAIR, relative to ``data.root`` if that is set.
    reference
        Mask of the lesions, non-zero inside, on the grid of the image; 2 is other pathology, which
        does not count either way. Empty for a scan known to hold no lesion.
    name
        Name in the log; the stem of the image by default.
    stride
        Every n-th slice of this case; 0 takes ``training.validation_stride``.
    t1
        T1 of the same head, for models with ``t1_channels``; empty to show them FLAIR alone.
    subject
        Whose scan it is; by default what the name says before ``_ses-<label>``.
    """

    image: str
    reference: str = ""
    name: str = ""
    stride: int = 0
    t1: str = ""
    subject: str = ""

    def __post_init__(self) -> None:
        _require(bool(self.image), "image", self.image, "the path of a scan")
        _require(self.stride >= 0, "stride", self.stride, "0 or more")


@dataclass(frozen=True)
class RunConfig:
    """A whole training configuration file.

    Attributes
    ----------
    model, preprocess, training, loss
        Tables of the same name.
    data
        Table of the sample stream, see `wmh_lora.data.sources.DataConfig`; ``root`` in it is the
        folder that relative paths start from (the working directory without it).
    validation
        Scans that are scored during training, never trained on; by default those of the split's
        validation part.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: Mapping[str, Any] = field(default_factory=dict)
    validation: tuple[ValidationCase, ...] = ()

    def resolve(self, path: str) -> Path:
        """Path of a data file named in the configuration."""
        return Path(str(self.data.get("root", ""))).expanduser() / path


def read_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a training configuration and apply ``key.key=value`` overrides.

    Parameters
    ----------
    path
        TOML file, or the name of a preset (`wmh_lora.training.presets`).
    overrides
        See `apply_overrides`.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a key is unknown, or a value is of the wrong type or out
        of range; the message names all of them.
    """
    table = apply_overrides(read_toml(config_path(path)), overrides)
    problems = []
    training = table.get("training")
    if isinstance(training, Mapping) and training.get("epochs") and "steps" in training:
        problems.append(
            "training.steps and training.epochs are both given: take one out, or set "
            "training.epochs = 0 to count in steps."
        )
    for kind, part in ((RunConfig, table), (DataConfig, table.get("data", {}))):
        try:
            from_dict(kind, part)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return from_dict(RunConfig, table)


def apply_overrides(table: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Copy of ``table`` with ``key.key=value`` settings replaced or added.

    The value is read as TOML; what is not TOML (a path, say) is taken as text. A number in the
    key counts in a list of tables, from 0.

    Raises
    ------
    ConfigError
        If an override has no ``=``, or leads through a value that is no table.

    Examples
    --------
    >>> apply_overrides({"training": {"steps": 10}}, ["training.steps=20", "data.root=some/path"])
    {'training': {'steps': 20}, 'data': {'root': 'some/path'}}
    """
    result: dict[str, Any] = copy.deepcopy(dict(table))
    for override in overrides:
        key, separator, text = override.partition("=")
        *parents, last = (part.strip() for part in key.split("."))
        if not separator or not last or not all(parents):
            raise ConfigError(f"--set {override!r} is not of the form key.key=value.")
        place: Any = result
        for part in parents:
            if isinstance(place, list) and part.isdigit() and int(part) < len(place):
                place = place[int(part)]
            elif isinstance(place, dict):
                place = place.setdefault(part, {})
            else:
                place = None
        if not isinstance(place, dict):
            raise ConfigError(f"--set {override!r}: {'.'.join(parents)} is not a table.")
        place[last] = _toml_value(text.strip())
    return result


def _toml_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r} is out of range: it must be {expected}.")
