"""Settings of a comparison: which methods, on which division of the scans, with what budget."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wmh_lora.config import ModelConfig, PreprocessConfig
from wmh_lora.config_reading import from_dict, read_toml
from wmh_lora.data.sources import DataConfig
from wmh_lora.errors import ConfigError
from wmh_lora.training.losses import LossConfig
from wmh_lora.training.presets import config_path
from wmh_lora.training.settings import TrainingConfig, apply_overrides

__all__ = [
    "Budget",
    "ComparisonConfig",
    "DynUNetSettings",
    "MethodSettings",
    "ThresholdSettings",
    "UNet2dSettings",
    "UnetrSettings",
    "WMHLoraSettings",
    "method_settings",
    "read_comparison",
    "training_settings",
]


@dataclass(frozen=True)
class Budget:
    """What is compared, and how long each method may train.

    Attributes
    ----------
    methods
        Names of tables ``[methods.NAME]``, in the order of the report; all of them by default.
    against
        The method that differences are taken from; the first by default.
    folds
        Divisions of the split file; all by default.
    seconds
        Training time of each method in each fold, shared evenly by the members of an ensemble.
    clock
        ``cpu`` counts the processor time of the process, whatever else the machine does; ``wall``
        counts time as it passes, which is what a GPU needs.
    seed
        Of the first member; the next ones follow it.
    threads
        Threads of torch; 0 leaves torch's choice. Processor time is the sum over them.
    mirror
        Average every network's output over the four flips of a slice.
    checkpoint_minutes
        A training writes a checkpoint after so many minutes of its budget, and at its end.
    """

    methods: tuple[str, ...] = ()
    against: str = ""
    folds: tuple[str, ...] = ()
    seconds: float = 100.0
    clock: Literal["cpu", "wall"] = "cpu"
    seed: int = 42
    threads: int = 1
    mirror: bool = False
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name in ("seconds", "checkpoint_minutes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"Setting {name!r} must be above 0, found {value!r}.")
        for name in ("seed", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"Setting {name!r} must be 0 or more, found {getattr(self, name)}."
                )


@dataclass(frozen=True)
class WMHLoraSettings:
    """The package's own network, with ``model`` and ``loss`` as in a training configuration."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UNet2dSettings:
    """See `wmh_lora.comparators.unet2d.UNet2d`; ``members`` networks are averaged."""

    channels: tuple[int, ...] = (64, 96, 128, 256, 512)
    first_kernel: int = 5
    batch_norm: bool = True
    members: int = 3
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_counts("channels", self.channels, 2)
        if self.first_kernel < 1 or self.first_kernel % 2 == 0:
            raise ConfigError(f"Setting 'first_kernel' must be odd, found {self.first_kernel}.")
        _check_members(self.members)


@dataclass(frozen=True)
class DynUNetSettings:
    """MONAI's DynUNet, laid out for the spacing as by nnU-Net.

    Attributes
    ----------
    filters
        Channels of each resolution, fine to coarse; as many are used as the plan has resolutions.
    patch_px
        Slices, rows and columns of a patch.
    t1
        Show T1 beside FLAIR; zeros where a scan has none.
    supervised_levels
        Resolutions below the finest whose outputs are trained too.
    overlap
        Of sliding windows, as a share of their size.
    members
        Networks that are averaged.
    """

    filters: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    patch_px: tuple[int, int, int] = (16, 128, 128)
    t1: bool = False
    supervised_levels: int = 2
    overlap: float = 0.5
    members: int = 1
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_counts("filters", self.filters, 3)
        _check_counts("patch_px", self.patch_px, 3)
        _check_overlap(self.overlap)
        _check_members(self.members)
        if self.supervised_levels < 1:
            raise ConfigError(
                f"Setting 'supervised_levels' must be 1 or more, found {self.supervised_levels}."
            )


@dataclass(frozen=True)
class UnetrSettings:
    """MONAI's UNETR; the defaults are those of its publication but for the patch.

    Attributes
    ----------
    patch_px
        Slices, rows and columns of a patch, multiples of 16.
    feature_size, hidden_size, mlp_dim, num_heads
        Width of the convolutions, and of the transformer, its MLPs and its heads.
    t1, overlap, members
        As of `DynUNetSettings`.
    """

    patch_px: tuple[int, int, int] = (16, 96, 96)
    feature_size: int = 16
    hidden_size: int = 768
    mlp_dim: int = 3072
    num_heads: int = 12
    t1: bool = False
    overlap: float = 0.5
    members: int = 1
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(side < 16 or side % 16 for side in self.patch_px):
            raise ConfigError(f"Setting 'patch_px' must be multiples of 16, found {self.patch_px}.")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"Setting 'hidden_size' ({self.hidden_size}) must be a multiple of 'num_heads' "
                f"({self.num_heads})."
            )
        _check_overlap(self.overlap)
        _check_members(self.members)


@dataclass(frozen=True)
class ThresholdSettings:
    """See `wmh_lora.comparators.brightness`; ``k`` lists the multiples that are tried."""

    k: tuple[float, ...] = tuple(round(1.0 + 0.25 * step, 2) for step in range(29))

    def __post_init__(self) -> None:
        if not self.k or min(self.k) <= 0 or not all(map(math.isfinite, self.k)):
            raise ConfigError(f"Setting 'k' must list numbers above 0, found {list(self.k)}.")


MethodSettings = (
    WMHLoraSettings | UNet2dSettings | DynUNetSettings | UnetrSettings | ThresholdSettings
)

#: Settings by the ``kind`` of a method.
KINDS: Mapping[str, type[Any]] = {
    "wmh-lora": WMHLoraSettings,
    "unet-2d": UNet2dSettings,
    "dynunet": DynUNetSettings,
    "unetr": UnetrSettings,
    "threshold": ThresholdSettings,
}


@dataclass(frozen=True)
class ComparisonConfig:
    """A whole comparison file.

    Attributes
    ----------
    comparison
        What is compared.
    preprocess
        Of every method.
    training
        Settings that every trained method begins with, see
        `wmh_lora.training.settings.TrainingConfig`; the budget takes the place of ``steps``.
    data
        Manifest and split, see `wmh_lora.data.sources.DataConfig`.
    methods
        By name, a ``kind`` (its own name by default) and the settings of that kind.
    """

    comparison: Budget = field(default_factory=Budget)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    training: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Methods in the order of the report."""
        return self.comparison.methods or tuple(self.methods)

    @property
    def against(self) -> str:
        """The method that differences are taken from."""
        return self.comparison.against or self.names[0]


def read_comparison(path: str | Path, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """Read a comparison, by the name of a preset or its file, and apply ``key.key=value``.

    Raises
    ------
    ConfigError
        If the file cannot be read, or anything in it is unknown or out of range; the message
        names all that is wrong, and what may have been meant.
    """
    config = from_dict(
        ComparisonConfig, apply_overrides(read_toml(config_path(path, "compare")), overrides)
    )
    problems = []
    if not config.names:
        problems.append(f"{path} names no method: add tables [methods.NAME].")
    chosen = [*config.names, *([config.comparison.against] if config.comparison.against else [])]
    for name in dict.fromkeys(chosen):
        if name not in config.methods:
            problems.append(_unknown("method", name, config.methods))
        elif name not in config.names:
            problems.append(f"comparison.against = {name!r} is not among comparison.methods.")
    for name in config.methods:
        try:
            settings = method_settings(config, name)
            if not isinstance(settings, ThresholdSettings):
                training_settings(config, settings)
        except ConfigError as error:
            problems += [f"methods.{name}: {line}" for line in str(error).splitlines()]
    problems += _data_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def method_settings(config: ComparisonConfig, name: str) -> MethodSettings:
    """Read the table of one method.

    Raises
    ------
    ConfigError
        If its kind or one of its settings is unknown or out of range.
    """
    table = dict(config.methods[name])
    kind = table.pop("kind", name)
    if kind not in KINDS:
        raise ConfigError(_unknown("kind", str(kind), KINDS))
    settings: MethodSettings = from_dict(KINDS[kind], table)
    return settings


def training_settings(config: ComparisonConfig, settings: MethodSettings) -> TrainingConfig:
    """Merge the common training settings with those of a method."""
    own = getattr(settings, "training", {})
    merged = from_dict(TrainingConfig, {**config.training, **own})
    if merged.epochs:
        raise ConfigError("training.epochs has no effect here: comparison.seconds is the budget.")
    plain = TrainingConfig()
    for name in ("start_from", "trained", "gradient_checkpointing"):
        if getattr(merged, name) != getattr(plain, name):
            raise ConfigError(
                f"training.{name} has no effect here: every method is trained whole, from its "
                "encoder's base weights or from scratch."
            )
    if config.comparison.clock == "cpu" and merged.workers:
        raise ConfigError(
            "training.workers must be 0 with comparison.clock = 'cpu': the processor time of "
            "workers would not be counted."
        )
    return merged


def _data_problems(config: ComparisonConfig) -> list[str]:
    try:
        data = from_dict(DataConfig, config.data)
    except ConfigError as error:
        return str(error).splitlines()
    if not data.real_alone or data.fold:
        return [
            "A comparison needs data.manifest and data.split, without data.real_lanes; folds are "
            "chosen by comparison.folds, not data.fold."
        ]
    return []


def _unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}."
    return f"Unknown {what} {name!r}; {hint}"


def _check_counts(name: str, values: tuple[int, ...], least: int) -> None:
    if len(values) < least or min(values) < 1:
        raise ConfigError(
            f"Setting {name!r} must be {least} or more positive numbers, found {list(values)}."
        )


def _check_overlap(overlap: float) -> None:
    if not 0 <= overlap < 1:
        raise ConfigError(f"Setting 'overlap' must be in [0, 1), found {overlap}.")


def _check_members(members: int) -> None:
    if members < 1:
        raise ConfigError(f"Setting 'members' must be 1 or more, found {members}.")
