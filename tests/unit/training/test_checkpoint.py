from __future__ import annotations

import errno
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from wmh_lora.errors import DataError, WeightsError
from wmh_lora.training.checkpoint import (
    Checkpoint,
    checkpoint_paths,
    load_newest_checkpoint,
    load_trained_state,
    save_checkpoint,
    trained_state,
)


def _checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        samples_seen=4 * step,
        model={"weight": torch.full((3,), float(step))},
        optimizer={"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]},
    )


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(_checkpoint(step), tmp_path, keep=2)
    assert [path.name for path in checkpoint_paths(tmp_path)] == [
        "step_00000010.pt",
        "step_00000002.pt",
    ]
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.step, newest.samples_seen) == (10, 40)
    assert torch.equal(newest.model["weight"], torch.full((3,), 10.0))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign"])
def test_a_damaged_checkpoint_yields_to_the_one_before(tmp_path: Path, damage: str) -> None:
    save_checkpoint(_checkpoint(1), tmp_path)
    path = save_checkpoint(_checkpoint(2), tmp_path)
    if damage == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        content = path.read_bytes()
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "empty": b"", "text": b"oh no"}[damage]
        )
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 1


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    save_checkpoint(_checkpoint(1), tmp_path).write_bytes(b"oh no")
    with pytest.raises(WeightsError, match="none of the 1 checkpoints"):
        load_newest_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(_checkpoint(1), tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(DataError, match=r"no space is left.*--resume"):
        save_checkpoint(_checkpoint(2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
@pytest.mark.parametrize("limit_bytes", [1_000, 300_000], ids=["at once", "while it is written"])
def test_a_disk_that_fills_up_is_named_and_the_run_goes_on(
    fakes: ModuleType, tmp_path: Path, limit_bytes: int
) -> None:
    import resource

    folder = tmp_path / "checkpoints"
    fakes.tiny_trainer(tmp_path, steps=2).run()
    kept = [path.read_bytes() for path in checkpoint_paths(folder)]
    large = _checkpoint(3)
    large.model["weight"] = torch.zeros(1_000_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(DataError, match=r"step_00000003\.pt could not be written.*--resume"):
            save_checkpoint(large, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_bytes() for path in checkpoint_paths(folder)] == kept
    assert len(list(folder.iterdir())) == len(kept), "no temporary file is left"
    resumed = fakes.tiny_trainer(tmp_path, steps=4)
    assert resumed.run(resume=True)
    assert resumed.steps_done == 4


def test_checkpoints_at_the_intervals_asked_for_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_checkpoint(_checkpoint(step), tmp_path, keep=1, keep_steps=3)
    assert [int(path.stem[5:]) for path in checkpoint_paths(tmp_path)] == [7, 6, 3]


def test_a_checkpoint_with_a_random_state_still_loads(tmp_path: Path) -> None:
    """Runs were started when dropout drew from one stream of random numbers."""
    path = save_checkpoint(_checkpoint(3), tmp_path)
    content = torch.load(path, weights_only=True)
    del content["scaler"]
    torch.save({**content, "rng_state": torch.get_rng_state()}, path)
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.step, newest.scaler) == (3, {})


def test_frozen_parameters_are_not_stored(fakes: ModuleType) -> None:
    state = trained_state(fakes.tiny_net())
    assert "encoder.stem.weight" not in state
    assert "encoder.proj.lora_A.weight" in state
    assert any(name.endswith("running_mean") for name in state)


def test_the_state_goes_back_exactly(fakes: ModuleType) -> None:
    source, target = fakes.tiny_net(seed=1), fakes.tiny_net(seed=2)
    load_trained_state(target, trained_state(source), "test")
    for name, tensor in trained_state(target).items():
        assert torch.equal(tensor, trained_state(source)[name])


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_state_of_another_network_is_refused(fakes: ModuleType, change: str) -> None:
    net = fakes.tiny_net()
    state = trained_state(net)
    if change == "missing":
        del state["encoder.proj.lora_A.weight"]
    elif change == "unexpected":
        state["encoder.other"] = torch.zeros(1)
    else:
        state["encoder.proj.lora_A.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError, match=r"\[model\]"):
        load_trained_state(net, state, "the checkpoint")
