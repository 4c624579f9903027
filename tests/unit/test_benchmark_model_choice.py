"""The study of what to train: each way trains what it says, and is scored with what it learned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.model_choice import LEARNING, _Study, finished_model, learning_net, study_text
from tests.site_scans import write_site
from wmh_lora.models.registry import model_path

_COMPUTER = {"cpu": "a CPU", "cores": 2, "threads": 2, "torch": "2.0"}


@pytest.mark.parametrize("name", LEARNING)
def test_what_was_learned_is_what_is_scored(name: str) -> None:
    what, base = LEARNING[name], model_path()
    torch.manual_seed(1)
    net = learning_net(base, None, what, seed=1)
    slices = torch.rand(1, 3, 64, 64)
    untouched = finished_model(base, None, what, net)
    with torch.no_grad():
        before = net(slices)
        torch.testing.assert_close(untouched.net(slices), before, atol=1e-3, rtol=1e-3)
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        learned = net(slices)
        scored = finished_model(base, None, what, net).net(slices)
    assert (learned - before).abs().max() > 0.05
    torch.testing.assert_close(scored, learned, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", LEARNING)
def test_only_what_is_named_is_trained(name: str) -> None:
    what = LEARNING[name]
    net = learning_net(model_path(), None, what, seed=1)
    parts = {"encoder": net.encoder, "adapter": net.adapter, "decoder": net.decoder}
    trained = {
        part: {n for n, p in module.named_parameters() if p.requires_grad}
        for part, module in parts.items()
    }
    # what stands for T1 is no site's to learn
    there = {p: [n for n, _ in m.named_parameters() if "t1_" not in n] for p, m in parts.items()}
    assert len(there["adapter"]) < len(list(net.adapter.parameters()))
    if what.everything:
        assert trained == {part: set(names) for part, names in there.items()}
        return
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in trained["encoder"]} == set(what.ranks)
    assert all(".lora_" in n for n in trained["encoder"])
    for part in ("adapter", "decoder"):
        assert trained[part] == (set(there[part]) if what.decoder else set())


@pytest.mark.parametrize("changed", ["reference", "other", "healthy", "weights", "version"])
def test_what_decides_a_result_is_in_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    *cases, other = write_site(tmp_path / "site", 3)
    files = {name: tmp_path / name for name in ("healthy", "model", "weights")}
    for name, path in files.items():
        path.write_bytes(name.encode())
    study = _Study(
        cases, other, files["healthy"], files["model"], files["weights"], 2.0, 42, tmp_path / "work"
    )
    before = study.identity
    assert before == study.identity == json.loads(json.dumps(before))
    assert before != dataclasses.replace(study, base_weights=None).identity
    if changed == "version":
        monkeypatch.setattr("benchmarks.model_choice.__version__", "0.0.0")
    else:
        masks = {"reference": cases[0].reference, "other": other.reference}
        changing = masks.get(changed) or files[changed]
        changing.write_bytes(b"changed")
    assert before != study.identity


def test_tables_hold_means_and_gains() -> None:
    looking = {
        "one view": {"dice": {"a": 0.5, "b": 0.7}, "other": [0.8], "healthy_ml": 0.1, "seconds": 2},
        "one plane": {"dice": {"a": 0.4, "b": 0.6}, "other": [0.7], "healthy_ml": 2, "seconds": 1},
    }
    learned = {
        "trained": 1234,
        "steps": [10, 11],
        "dice": {"b": 0.9, "a": 0.6},
        "other": [0.6, 0.5],
    }
    text = study_text(
        {"looking": looking, "learning": {"LoRA": learned}},
        command="run me",
        minutes=2,
        computer=_COMPUTER,
    )
    assert "| base, not trained | 0 |  | 0.600 |  | 0.700 |" in text
    assert "| LoRA | 1,234 | 10, 11 | 0.750 | +0.150 (" in text
    assert "| 0.550 |" in text
    assert "| one plane | 0.500 | -0.100 (" in text
    assert "| 0.700 | 2.00 | 1.0 |" in text
