"""A whole training run: put the parts together, in a run folder that says what was done."""

from __future__ import annotations

import functools
import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmh_lora._version import __version__
from wmh_lora.config import InferenceConfig
from wmh_lora.config_reading import from_dict, to_dict
from wmh_lora.data.dataset import build_stream
from wmh_lora.data.slices import SliceStream
from wmh_lora.data.sources import DataConfig, read_labelled, relative_to_root
from wmh_lora.errors import ConfigError
from wmh_lora.files import open_atomic
from wmh_lora.models.encoders import encoder_spec
from wmh_lora.models.model_file import ModelCard, file_sha256, save_model
from wmh_lora.models.network import WMHNet, build_network
from wmh_lora.models.registry import model_path
from wmh_lora.models.weights import resolve_base_weights
from wmh_lora.training.checkpoint import checkpoint_paths
from wmh_lora.training.locking import locks_run_folder
from wmh_lora.training.logbook import RunLogs
from wmh_lora.training.losses import SegmentationLoss
from wmh_lora.training.processes import Processes
from wmh_lora.training.settings import RunConfig, ValidationCase
from wmh_lora.training.start import start_from_model, train_t1_alone
from wmh_lora.training.trainer import Trainer
from wmh_lora.training.validate import Validator, validation_files

__all__ = ["program_versions", "read_run_folder", "train", "with_split_validation"]

_log = logging.getLogger("wmh_lora")
_DATA_FILE = "data.json"


@locks_run_folder
def train(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    on_step: Callable[[int, int, float], None] | None = None,
) -> bool:
    """Train a model as ``config`` says.

    Parameters
    ----------
    config
        The whole configuration.
    run_dir
        Folder of the run: ``config.json``, ``environment.json``, ``data.json`` (every file used
        with SHA-256, and the split), ``metrics.jsonl``, ``checkpoints/``, ``best.safetensors``,
        ``last.safetensors`` and ``curves.png``.
    resume
        Continue from the newest checkpoint in ``run_dir``.
    on_step
        Called after every step with the steps done, the steps in all and the loss.

    Returns
    -------
    bool
        True when all steps are done, False when a signal stopped the run early.

    Raises
    ------
    ConfigError
        If a setting is wrong, data are absent, the folder holds another run, or another training
        is going on in it.
    DataError
        If files have changed since the manifest was made; the message names all of them.
    """
    settings = config.training
    processes = Processes.launched(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    config = with_split_validation(config)
    validate = Validator(config) if config.validation else None
    base_weights = _base_weights(config)
    base_sha256 = "" if base_weights is None else file_sha256(base_weights)
    net = build_network(config.model, base_weights, for_training=True, seed=settings.seed)
    start = model_path(settings.start_from) if settings.start_from else None
    if start is not None:
        start_from_model(net, config, base_sha256, start)
    if settings.trained == "t1":
        net = train_t1_alone(net)
    _check_sizes(config, net.size_multiple)
    if settings.gradient_checkpointing:
        _checkpoint_gradients(net.encoder, config.model.encoder)
    stream = _build_stream(config, run_dir, processes)
    config = _in_steps(config, stream)
    if processes.first:
        files = stream.files() + ([] if start is None else [start])
        _prepare_folder(config, run_dir, resume, files)
    logs = RunLogs(run_dir, tensorboard=config.training.tensorboard) if processes.first else None
    trainer = Trainer(
        net,
        SegmentationLoss(config.model.structures, config.loss),
        stream,
        config.training,
        run_dir,
        validate=validate,
        save_model=functools.partial(_save_model, config, base_sha256),
        on_record=logs,
        processes=processes,
    )
    steps = config.training.steps

    def show(step: int, loss: float) -> None:
        if on_step is not None and processes.first:
            on_step(step, steps, loss)

    try:
        return trainer.run(resume=resume, on_step=show)
    finally:
        if logs is not None:
            logs.close()


def with_split_validation(config: RunConfig) -> RunConfig:
    """Fill the validation scans in from the split, unless the configuration lists its own."""
    data = from_dict(DataConfig, config.data)
    if config.validation or not data.manifest:
        return config
    part = read_labelled(data, "validation")
    cases = []
    for scan in part.scans:
        t1 = scan.usable_t1 if config.model.t1_channels else ""
        image, mask, t1 = (
            relative_to_root(part.manifest.file(path), data) if path else ""
            for path in (scan.image, scan.mask, t1)
        )
        cases.append(ValidationCase(image, mask, scan.name, t1=t1, subject=scan.subject))
    if not cases:
        _log.warning("the split has no validation part: no best model is chosen, only the last")
    return replace(config, validation=tuple(cases))


def _build_stream(config: RunConfig, run_dir: Path, processes: Processes) -> Any:
    """Make the stream of samples; the first process alone fills the caches."""
    settings = config.training

    def build() -> Any:
        return build_stream(
            config.data,
            settings.seed,
            settings.crop,
            config.preprocess,
            config.model.structures,
            settings.samples_per_step,
            run_dir / "cache",
            in_channels=config.model.in_channels,
            t1_channels=config.model.t1_channels,
        )

    stream = build() if processes.first else None
    processes.any(False)
    return build() if stream is None else stream


def _in_steps(config: RunConfig, stream: Any) -> RunConfig:
    """Resolve the settings in epochs."""
    settings = config.training
    if not settings.epochs:
        return config
    if not isinstance(stream, SliceStream):
        raise ConfigError(
            "training.epochs counts passes over the slices of a manifest, and synthetic scans have "
            "no end: set training.steps instead, or data.real_lanes = 0 for the manifest alone."
        )
    return replace(config, training=settings.in_steps(stream.epoch_samples))


def read_run_folder(run_dir: Path) -> RunConfig:
    """Read the resolved configuration of a run.

    Raises
    ------
    ConfigError
        If the folder holds no run.
    """
    try:
        table = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run_dir} holds no readable config.json of a run: {error}.") from error
    return from_dict(RunConfig, table)


def _base_weights(config: RunConfig) -> Path | None:
    """Checkpoint that the encoder begins with; None for an encoder that has none."""
    encoder, given = config.model.encoder, config.training.base_weights
    if encoder_spec(encoder).load is not None:
        return resolve_base_weights(encoder, given or None)
    if given:
        raise ConfigError(
            f"The encoder {encoder!r} has no base weights; leave out training.base_weights."
        )
    return None


def _check_sizes(config: RunConfig, multiple: int) -> None:
    """Raise ConfigError unless the network can take the crops and the scans."""
    sizes = {
        "training.crop": config.training.crop,
        "preprocess.multiple_px": config.preprocess.multiple_px,
    }
    for name, size in sizes.items():
        if size % multiple:
            raise ConfigError(
                f"{name} = {size} does not suit the network, whose images have sides that are "
                f"multiples of {multiple} pixels."
            )


def _checkpoint_gradients(encoder: Any, name: str) -> None:
    if not hasattr(encoder, "gradient_checkpointing"):
        raise ConfigError(
            f"The encoder {name!r} has no gradient checkpointing; leave out "
            "training.gradient_checkpointing."
        )
    encoder.gradient_checkpointing = True


def _save_model(
    config: RunConfig, base_sha256: str, net: WMHNet, path: Path, metadata: Mapping[str, Any]
) -> None:
    card = ModelCard(
        name=path.parent.name,
        model=config.model,
        preprocess=config.preprocess,
        inference=InferenceConfig(),
        base_sha256=base_sha256,
        training={"training": to_dict(config.training), "step": metadata["step"]},
        metrics={key: value for key, value in metadata.items() if key != "step"},
    )
    save_model(path, net, card)


def _prepare_folder(
    config: RunConfig, run_dir: Path, resume: bool, training_files: Sequence[Path]
) -> None:
    """Write what the run depends on; on resuming, compare with what it began with."""
    resumed = bool(checkpoint_paths(run_dir / "checkpoints"))
    if resumed:
        if not resume:
            raise ConfigError(
                f"{run_dir} already holds a run. Continue it with --resume, or choose another "
                "folder with -o."
            )
        _compare(read_run_folder(run_dir), config, run_dir)
    record = _data_record(config, training_files)  # reads every file: after what is quickly refused
    if resumed:
        _compare_split(run_dir / _DATA_FILE, record)
    run_dir.mkdir(parents=True, exist_ok=True)
    _write_json(run_dir / "config.json", to_dict(config))
    _write_json(
        run_dir / "environment.json",
        {**program_versions(), "torch_threads": torch.get_num_threads()},
    )
    _write_json(run_dir / _DATA_FILE, record)


def _data_record(config: RunConfig, training_files: Sequence[Path]) -> dict[str, Any]:
    """Return checksums of every file by its part, and the split.

    Raises
    ------
    ConfigError
        If a validation scan is among the training scans.
    """
    parts = {"training": training_files, "validation": validation_files(config)}
    record: dict[str, Any] = {
        name: {str(p): file_sha256(p) for p in paths} for name, paths in parts.items()
    }
    seen = set(record["training"].values())
    for case in config.validation:
        path = config.resolve(case.image)
        if record["validation"][str(path)] in seen:
            raise ConfigError(
                f"The validation scan {path} is among the training scans; leave it out of "
                "data.real or of the split's training part, or validate on another."
            )
    data = from_dict(DataConfig, config.data)
    if data.manifest:
        part = read_labelled(data, "train")
        record["split"] = {"manifest_sha256": part.manifest.sha256, **to_dict(part.split)}
    return record


def _compare_split(path: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on with another split: people trained on before could be validated on."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("split", record.get("split")) != record.get("split"):
        raise ConfigError(
            f"Manifest or split are not those that {path} was written with. Put them back, or "
            "begin a new run with -o."
        )


def program_versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "wmh_lora": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _compare(before: RunConfig, now: RunConfig, run_dir: Path) -> None:
    for table in ("model", "preprocess"):
        if getattr(before, table) != getattr(now, table):
            raise ConfigError(
                f"the [{table}] settings differ from those that the run in {run_dir} was started "
                "with. Use the same, or begin a new run with -o."
            )
    old, new = to_dict(before), to_dict(now)
    for table in ("training", "loss", "data"):
        for key in sorted(old[table].keys() | new[table].keys()):
            was, is_now = old[table].get(key), new[table].get(key)
            if was != is_now:
                _log.warning("%s.%s changed from %r to %r on resuming", table, key, was, is_now)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with open_atomic(path, overwrite=True) as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())
