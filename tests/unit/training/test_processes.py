"""Several processes do what one would do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from wmh_lora.errors import ConfigError
from wmh_lora.training.checkpoint import Checkpoint, load_newest_checkpoint
from wmh_lora.training.processes import Processes, RunningStatistics


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _train(fakes: ModuleType, folder: Path, count: int, *options: str) -> Checkpoint:
    """Six steps of three micro-batches, shared by ``count`` processes."""
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(fakes.__file__), str(folder), "6", "0", "--full", *options]
    processes = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
        own_environment = {k: str(v) for k, v in {**shared, **own}.items()}
        processes.append(subprocess.Popen(command, env={**environment, **own_environment}))
    assert [process.wait(timeout=120) for process in processes] == [0] * count
    checkpoint = load_newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def _losses(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == "train"]


def test_two_processes_take_the_steps_of_one(fakes: ModuleType, tmp_path: Path) -> None:
    """Dropout, BatchNorm in training, and three micro-batches that two cannot share evenly."""
    net = fakes.tiny_net(adaptation="full")
    fakes.tiny_trainer(tmp_path / "one", net=net, steps=6, accumulation=3).run()
    one = load_newest_checkpoint(tmp_path / "one" / "checkpoints")
    assert one is not None
    two = _train(fakes, tmp_path / "two", 2)
    for first, second in zip(_losses(tmp_path / "one"), _losses(tmp_path / "two"), strict=True):
        assert first["step"] == second["step"]
        for name in ("loss", "focal", "dice", "boundary", "heads", "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-6, abs=1e-6), name
    assert (two.step, two.samples_seen) == (6, one.samples_seen)
    for name, tensor in one.model.items():
        # BatchNorm takes the bias before it out: its gradient is rounding, which AdamW scales up.
        if name in ("encoder.down.bias", "encoder.norm.running_mean"):
            continue
        torch.testing.assert_close(two.model[name], tensor, rtol=1e-4, atol=1e-6)
    assert two.model["encoder.norm.num_batches_tracked"] == 18


def test_running_statistics_are_those_of_one_process(torch_generator: torch.Generator) -> None:
    batches = torch.randn(5, 4, 3, 6, 6, generator=torch_generator) * 2 + 1
    alone = nn.BatchNorm2d(3)
    shares = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    kept = [RunningStatistics(layer) for layer in shares]
    for part, batch in enumerate(batches):
        alone(batch)
        shares[part % 2](batch)
        kept[part % 2].collect(len(batches) - 1 - part)
    for first, second in zip(*(statistics.changes for statistics in kept), strict=True):
        first += second
    kept[0].finish(len(batches))
    torch.testing.assert_close(shares[0].running_mean, alone.running_mean)
    torch.testing.assert_close(shares[0].running_var, alone.running_var)
    assert shares[0].num_batches_tracked == 5


def test_more_processes_than_micro_batches_are_refused(fakes: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.accumulation"):
        fakes.tiny_trainer(tmp_path, processes=Processes(0, 3))


def test_a_process_that_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = Processes.launched("cpu")
    assert (found.rank, found.count, found.device.type, found.first) == (0, 1, "cpu", True)
    gradient = torch.ones(2)
    found.sum([gradient])
    assert gradient.tolist() == [1, 1]
    assert found.any(True)
    assert not found.any(False)
