"""A whole training run: put the parts together, in a run folder that says what was done."""

from __future__ import annotations

import functools
import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmh_lora._version import __version__
from wmh_lora.config import InferenceConfig, from_dict, to_dict
from wmh_lora.data.dataset import build_stream
from wmh_lora.errors import ConfigError
from wmh_lora.files import open_atomic
from wmh_lora.models.model_file import ModelCard, file_sha256, save_model
from wmh_lora.models.network import WMHNet, build_network
from wmh_lora.models.weights import resolve_base_weights
from wmh_lora.training.checkpoint import checkpoint_paths
from wmh_lora.training.losses import SegmentationLoss
from wmh_lora.training.settings import RunConfig
from wmh_lora.training.trainer import Trainer
from wmh_lora.training.validate import Validator, validation_files

__all__ = ["read_run_folder", "train"]

_log = logging.getLogger("wmh_lora")


def train(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> bool:
    """Train a model as ``config`` says.

    Parameters
    ----------
    config
        The whole configuration.
    run_dir
        Folder of the run: ``config.json``, ``environment.json``, ``data.json`` (every file used
        with SHA-256), ``metrics.jsonl``, ``checkpoints/``, ``best.safetensors`` and
        ``last.safetensors``.
    resume
        Continue from the newest checkpoint in ``run_dir``.
    on_step
        Called after every step with the steps done and the loss.

    Returns
    -------
    bool
        True when all steps are done, False when a signal stopped the run early.

    Raises
    ------
    ConfigError
        If a setting is wrong, data are absent, or the folder holds another run.
    """
    settings = config.training
    if settings.threads:
        torch.set_num_threads(settings.threads)
    validate = Validator(config) if config.validation else None
    base_weights = resolve_base_weights(config.model.encoder, settings.base_weights or None)
    net = build_network(config.model, base_weights, for_training=True, seed=settings.seed)
    stream = build_stream(
        config.data, settings.seed, settings.crop, config.preprocess, config.model.structures
    )
    _prepare_folder(config, run_dir, resume, stream.files())
    trainer = Trainer(
        net,
        SegmentationLoss(config.model.structures, config.loss),
        stream,
        settings,
        run_dir,
        validate=validate,
        save_model=functools.partial(_save_model, config, file_sha256(base_weights)),
    )
    return trainer.run(resume=resume, on_step=on_step)


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
    if checkpoint_paths(run_dir / "checkpoints"):
        if not resume:
            raise ConfigError(
                f"{run_dir} already holds a run. Continue it with --resume, or choose another "
                "folder with -o."
            )
        _compare(read_run_folder(run_dir), config, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    _write_json(run_dir / "config.json", to_dict(config))
    _write_json(
        run_dir / "environment.json",
        {
            "wmh_lora": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "torch_threads": torch.get_num_threads(),
        },
    )
    parts = {"training": training_files, "validation": validation_files(config)}
    _write_json(
        run_dir / "data.json",
        {name: {str(p): file_sha256(p) for p in paths} for name, paths in parts.items()},
    )


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
