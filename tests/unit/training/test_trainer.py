from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from wmh_lora.errors import ConfigError, WMHError
from wmh_lora.models import precision
from wmh_lora.models.network import WMHNet
from wmh_lora.training.checkpoint import checkpoint_paths, load_newest_checkpoint, trained_state
from wmh_lora.training.optimizer import parameter_groups
from wmh_lora.training.settings import TrainingConfig
from wmh_lora.training.start import train_t1_alone
from wmh_lora.training.trainer import Trainer


def _records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda text: pytest.fail(text)) for line in lines]


def _run_to(trainer: Trainer, step: int, **settings: Any) -> bool:
    def stop(done: int, _loss: float) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return trainer.run(on_step=stop, **settings)


def _assert_same(first: Trainer, second: Trainer) -> None:
    states = [trained_state(trainer.net) for trainer in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(first.average[name], second.average[name]) for name in first.average)
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (first, second)]
    for key, state in moments[0].items():
        assert all(torch.equal(value, moments[1][key][name]) for name, value in state.items())
    assert first.samples_seen == second.samples_seen


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": 0},
        {"workers": 2, "ema_decay": 0.9},
        {"precision": "bf16"},
        {"precision": "fp16"},
    ],
    ids=["plain", "workers-average", "bf16", "fp16"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    fakes: ModuleType, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = fakes.tiny_trainer(tmp_path / "whole", **changes)
    assert whole.run()
    # Random numbers that something else draws between the two parts must not matter.
    assert not _run_to(fakes.tiny_trainer(tmp_path / "parts", **changes), 5)
    torch.rand(7)
    resumed = fakes.tiny_trainer(tmp_path / "parts", **changes)
    assert resumed.run(resume=True)
    _assert_same(whole, resumed)
    steps = [record["step"] for record in _records(tmp_path / "parts")]
    assert steps == [record["step"] for record in _records(tmp_path / "whole")]


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_is_the_fastest_of_the_processor(
    fakes: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fast: bool,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: fast)
    trainer = fakes.tiny_trainer(tmp_path, precision="auto")
    assert trainer.dtype == expected
    assert not trainer.scaler.is_enabled()
    named = fakes.tiny_trainer(tmp_path, precision="fp16")
    assert named.dtype == torch.float16
    assert named.scaler.is_enabled()


@pytest.mark.parametrize(
    ("t1_channels", "adaptation"), [(1, "lora"), (0, "full")], ids=["t1", "full"]
)
def test_resuming_covers_t1_dropout_and_a_trained_encoder(
    fakes: ModuleType, tmp_path: Path, t1_channels: int, adaptation: str
) -> None:
    def trainer(name: str) -> Trainer:
        net = fakes.tiny_net(t1_channels=t1_channels, adaptation=adaptation)
        made: Trainer = fakes.tiny_trainer(tmp_path / name, fakes.BlobStream(t1=True), net)
        return made

    whole = trainer("whole")
    assert whole.run()
    assert not _run_to(trainer("parts"), 5)
    torch.rand(7)
    resumed = trainer("parts")
    assert resumed.run(resume=True)
    _assert_same(whole, resumed)
    start = dict(fakes.tiny_net(t1_channels=t1_channels, adaptation=adaptation).named_parameters())
    moved = {
        name
        for name, parameter in whole.net.named_parameters()
        if not torch.equal(parameter, start[name])
    }
    if t1_channels:
        assert {"adapter.t1_stem.weight", "adapter.t1_missing"} <= moved
        assert "encoder.stem.weight" not in moved
    else:
        assert {"encoder.stem.weight", "encoder.down.weight", "encoder.norm.weight"} <= moved


def test_only_an_encoder_in_training_updates_its_statistics(
    fakes: ModuleType, tmp_path: Path
) -> None:
    for adaptation, moves in (("lora", False), ("full", True)):
        net = fakes.tiny_net(adaptation=adaptation)
        fakes.tiny_trainer(tmp_path / adaptation, net=net, steps=2).run()
        mean = net.get_buffer("encoder.norm.running_mean")
        assert bool(mean.abs().max() > 0) is moves


class TestT1Dropout:
    def _seen(
        self, fakes: ModuleType, run_dir: Path, *, t1_channels: int = 1, **changes: Any
    ) -> tuple[list[bool], list[bool]]:
        """Which samples had T1, and which of them the network saw with it."""
        net = fakes.tiny_net(t1_channels=t1_channels)
        had: list[bool] = []
        shown: list[bool] = []
        forward = net.adapter.forward

        def note(slices: Any, t1: Any, present: Any) -> Any:
            shown.extend([False] * len(slices) if t1 is None else present.tolist())
            return forward(slices, t1, present)

        class Recorder(fakes.BlobStream):  # type: ignore[misc,name-defined]
            def item(self, index: int) -> Any:
                sample = super().item(index)
                had.append(sample.t1 is not None)
                return sample

        net.adapter.forward = note
        fakes.tiny_trainer(run_dir, Recorder(t1=True), net, steps=40, **changes).run()
        return had, shown

    def test_hides_about_the_share_asked_for_and_never_shows_what_is_missing(
        self, fakes: ModuleType, tmp_path: Path
    ) -> None:
        had, shown = self._seen(fakes, tmp_path / "half", t1_dropout=0.5)
        assert len(had) == len(shown) == 160
        assert all(h or not s for h, s in zip(had, shown, strict=True))
        assert 0.35 < sum(shown) / sum(had) < 0.65

    @pytest.mark.parametrize(("share", "channels"), [(0.0, 1), (1.0, 1), (0.0, 0)])
    def test_all_nothing_and_a_model_without_t1(
        self, fakes: ModuleType, tmp_path: Path, share: float, channels: int
    ) -> None:
        had, shown = self._seen(fakes, tmp_path, t1_channels=channels, t1_dropout=share)
        assert shown == (had if share == 0.0 and channels else [False] * len(had))


def test_the_scale_of_the_loss_is_restored(fakes: ModuleType, tmp_path: Path) -> None:
    """Half precision starts with a scale that is too large, and finds one that fits."""
    first = fakes.tiny_trainer(tmp_path, precision="fp16", steps=4)
    first.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    first.run()
    assert first.scaler.get_scale() == 2.0**96
    resumed = fakes.tiny_trainer(tmp_path, precision="fp16", steps=5)
    resumed.run(resume=True)
    assert resumed.scaler.get_scale() <= 2.0**96


def test_the_layout_of_random_numbers_is_that_of_micro_batches(
    fakes: ModuleType, tmp_path: Path
) -> None:
    """Numbers drawn by something else between two steps change nothing."""
    plain = fakes.tiny_trainer(tmp_path / "plain")
    plain.run()
    disturbed = fakes.tiny_trainer(tmp_path / "disturbed")
    disturbed.run(on_step=lambda *_: torch.rand(5))
    _assert_same(plain, disturbed)


def test_dropout_is_on_in_these_tests(fakes: ModuleType) -> None:
    """Otherwise they would not notice a random state that is not restored."""
    net = fakes.tiny_net().train()
    images = torch.rand(1, 3, 32, 32)
    assert not torch.equal(net(images), net(images))


def test_a_killed_run_continues_as_if_nothing_had_happened(
    fakes: ModuleType, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(fakes.__file__), str(tmp_path / "killed"), "12"]
    folder = tmp_path / "killed" / "checkpoints"
    with subprocess.Popen([*command, "0.05"], env=environment) as process:
        deadline = time.monotonic() + 300
        while not checkpoint_paths(folder) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    stopped_at = load_newest_checkpoint(folder)
    assert stopped_at is not None
    assert 0 < stopped_at.step < 12
    # A kill while a line is being written.
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "kind": "tra')
    subprocess.run([*command, "0", "--resume"], check=True, timeout=300, env=environment)

    fakes.tiny_trainer(tmp_path / "whole").run()
    expected = load_newest_checkpoint(tmp_path / "whole" / "checkpoints")
    found = load_newest_checkpoint(folder)
    assert expected is not None
    assert found is not None
    assert found.step == 12
    assert all(torch.equal(expected.model[name], found.model[name]) for name in found.model)
    train_steps = [r["step"] for r in _records(tmp_path / "killed") if r["kind"] == "train"]
    assert train_steps == [2, 4, 6, 8, 10, 12]


def test_the_loss_goes_down_on_a_few_crops(fakes: ModuleType, tmp_path: Path) -> None:
    trainer = fakes.tiny_trainer(
        tmp_path, fakes.BlobStream(distinct=4), steps=80, accumulation=1, batch_size=4
    )
    losses: list[float] = []
    trainer.run(on_step=lambda _step, loss: losses.append(loss))
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:5])


def test_what_is_recorded(fakes: ModuleType, tmp_path: Path) -> None:
    fakes.tiny_trainer(tmp_path).run()
    record = _records(tmp_path)[-1]
    assert record["step"] == 12
    for name in ("loss", "focal", "dice", "grad_norm", "lr_lora", "seconds", "samples_per_s"):
        assert math.isfinite(record[name])
    assert 0 <= record["data_wait"] <= 1


def test_every_sample_is_used_once_in_order(fakes: ModuleType, tmp_path: Path) -> None:
    asked: list[int] = []

    class Recorder(fakes.BlobStream):  # type: ignore[misc,name-defined]
        def item(self, index: int) -> Any:
            asked.append(index)
            return super().item(index)

    _run_to(fakes.tiny_trainer(tmp_path, Recorder()), 3)
    fakes.tiny_trainer(tmp_path, Recorder()).run(resume=True)
    assert asked == list(range(12 * 4))


class _Scores:
    """Validation whose score is given; notes the weights and the mode it meets."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)
        self.weights: list[torch.Tensor] = []

    def __call__(self, net: WMHNet) -> Iterator[Mapping[str, Any]]:
        assert not net.training
        torch.rand(3)
        self.weights.append(net.get_parameter("encoder.proj.lora_A.weight").detach().clone())
        yield {"case": "ill", "score": self.scores.pop(0)}
        yield {"case": "healthy", "false_positive_ml": 0.5}


def test_the_best_model_is_kept(fakes: ModuleType, tmp_path: Path) -> None:
    saved: list[tuple[str, int]] = []
    trainer = fakes.tiny_trainer(tmp_path)
    trainer.validate = _Scores(0.3, 0.7, 0.6)
    trainer.save_model = lambda _net, path, data: saved.append((path.stem, data["step"]))
    trainer.run()
    assert [step for name, step in saved if name == "best"] == [4, 8]
    assert saved[-1] == ("last", 12)
    means = [r for r in _records(tmp_path) if r["kind"] == "validation_mean"]
    assert [(r["step"], r["score"], r["best_step"]) for r in means] == [
        (4, 0.3, 4),
        (8, 0.7, 8),
        (12, 0.6, 8),
    ]


def test_an_undefined_score_is_null_and_never_the_best(fakes: ModuleType, tmp_path: Path) -> None:
    trainer = fakes.tiny_trainer(tmp_path, steps=4)
    trainer.validate = _Scores(math.nan)
    trainer.run()
    assert _records(tmp_path)[-1]["score"] is None
    assert trainer.best_step == -1


def test_a_validation_that_a_signal_cut_short_is_done_on_resuming(
    fakes: ModuleType, tmp_path: Path
) -> None:
    def interrupted(net: WMHNet) -> Iterator[Mapping[str, Any]]:
        yield {"case": "first", "score": 0.5}
        os.kill(os.getpid(), signal.SIGTERM)
        yield {"case": "second", "score": 0.5}

    trainer = fakes.tiny_trainer(tmp_path, steps=4)
    trainer.validate = interrupted
    assert not trainer.run()  # the last validation is not done
    resumed = fakes.tiny_trainer(tmp_path, steps=4)
    resumed.validate = _Scores(0.5)
    assert resumed.run(resume=True)
    cases = [record.get("case") for record in _records(tmp_path) if record["kind"] == "validation"]
    assert cases == ["ill", "healthy"]


def test_validation_sees_averaged_weights_and_does_not_disturb(
    fakes: ModuleType, tmp_path: Path
) -> None:
    plain = fakes.tiny_trainer(tmp_path / "plain", ema_decay=0.9)
    plain.run()
    validated = fakes.tiny_trainer(tmp_path / "validated", ema_decay=0.9)
    scores = validated.validate = _Scores(0.1, 0.2, 0.3)
    validated.run()
    average = validated.average["encoder.proj.lora_A.weight"]
    assert torch.equal(scores.weights[-1], average)
    assert not torch.equal(validated.net.get_parameter("encoder.proj.lora_A.weight"), average)
    assert validated.net.training


def test_validation_may_draw_random_numbers(fakes: ModuleType, tmp_path: Path) -> None:
    plain = fakes.tiny_trainer(tmp_path / "plain")
    plain.run()
    validated = fakes.tiny_trainer(tmp_path / "validated")
    validated.validate = _Scores(0.1, 0.2, 0.3)
    validated.run()
    _assert_same(plain, validated)


def test_a_folder_with_a_run_is_not_overwritten(fakes: ModuleType, tmp_path: Path) -> None:
    fakes.tiny_trainer(tmp_path, steps=1).run()
    with pytest.raises(ConfigError, match="--resume"):
        fakes.tiny_trainer(tmp_path, steps=1).run()


def test_a_finished_run_resumes_to_nothing(fakes: ModuleType, tmp_path: Path) -> None:
    first = fakes.tiny_trainer(tmp_path, steps=2)
    first.run()
    again = fakes.tiny_trainer(tmp_path, steps=2)
    assert again.run(resume=True)
    _assert_same(first, again)


def test_learning_rates_may_change_on_resuming(fakes: ModuleType, tmp_path: Path) -> None:
    _run_to(fakes.tiny_trainer(tmp_path), 4)
    resumed = fakes.tiny_trainer(tmp_path, lora_lr=5e-4)
    resumed.run(resume=True)
    assert resumed.optimizer.param_groups[0]["peak_lr"] == 5e-4


def test_a_loss_that_stays_non_finite_ends_the_run(fakes: ModuleType, tmp_path: Path) -> None:
    class Broken(fakes.BlobStream):  # type: ignore[misc,name-defined]
        def item(self, index: int) -> Any:
            return super().item(index)._replace(image=np.full((3, 32, 32), np.nan, np.float32))

    trainer = fakes.tiny_trainer(tmp_path, Broken(), steps=50, accumulation=1)
    before = {name: p.detach().clone() for name, p in trainer.net.named_parameters()}
    with pytest.raises(WMHError, match="not finite in 20 steps"):
        trainer.run()
    assert all(torch.equal(before[name], p) for name, p in trainer.net.named_parameters())


def test_a_step_that_is_left_out_leaves_nothing(fakes: ModuleType, tmp_path: Path) -> None:
    """Neither weights nor running statistics, nor their averages."""

    class OnceBroken(fakes.BlobStream):  # type: ignore[misc,name-defined]
        def item(self, index: int) -> Any:
            sample = super().item(index)
            if index in (2, 5):
                return sample._replace(image=np.full((3, 32, 32), np.nan, np.float32))
            return sample

    trainer = fakes.tiny_trainer(tmp_path, OnceBroken(), steps=6, accumulation=1)
    assert trainer.run()
    for tensors in (trainer.net.state_dict(), trainer.average):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_t1_alone_is_trained_where_batches_show_none(fakes: ModuleType, tmp_path: Path) -> None:
    net = fakes.tiny_net(t1_channels=1)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer = fakes.tiny_trainer(tmp_path, fakes.BlobStream(), train_t1_alone(net), steps=2)
    assert trainer.run()
    for name, parameter in trainer.net.named_parameters():
        torch.testing.assert_close(parameter, start[name])


def test_parameter_groups(fakes: ModuleType) -> None:
    net = fakes.tiny_net()
    config = fakes.tiny_config(lora_lr=1e-4, adapter_lr=2e-4, decoder_lr=3e-4)
    groups = parameter_groups(net, config)
    counted = sum(len(group["params"]) for group in groups)
    assert counted == sum(p.requires_grad for p in net.parameters())
    rates = {group["name"]: group["peak_lr"] for group in groups}
    assert rates == {"lora": 1e-4, "adapter": 2e-4, "decoder": 3e-4}
    for group in groups:
        decayed = group["weight_decay"] > 0
        assert all((p.ndim >= 2) == decayed for p in group["params"])
    full = parameter_groups(fakes.tiny_net(adaptation="full"), fakes.tiny_config(encoder_lr=5e-4))
    assert [group["name"] for group in full[::2]] == ["lora", "adapter", "decoder", "encoder"]
    assert full[-1]["peak_lr"] == 5e-4
    names = {id(p): name for name, p in net.named_parameters()}
    lora = [names[id(p)] for group in groups[:2] for p in group["params"]]
    assert sorted(lora) == ["encoder.proj.lora_A.weight", "encoder.proj.lora_B.weight"]


def test_a_rate_of_zero_leaves_a_part_as_it_is(fakes: ModuleType, tmp_path: Path) -> None:
    net = fakes.tiny_net()
    parts = {"adapter": net.adapter, "decoder": net.decoder}
    before = {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}
    trainer = fakes.tiny_trainer(tmp_path, net=net, adapter_lr=0.0)
    assert trainer.run()
    changed = {
        name: any(
            not torch.equal(old, new)
            for old, new in zip(before[name], part.parameters(), strict=True)
        )
        for name, part in parts.items()
    }
    assert changed == {"adapter": False, "decoder": True}
    assert all(p.grad is None for p in net.adapter.parameters())


def test_a_rate_below_the_smallest_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora_lr.*0, or at least eta_min"):
        TrainingConfig(lora_lr=1e-8)
