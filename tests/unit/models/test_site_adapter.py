"""Adapter files: exact round trips, the right base alone, and a base that stays as it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.phantoms import head
from tests.site_scans import TWO_LAYERS, write_adapter, write_base
from wmh_lora import segment
from wmh_lora.config import InferenceConfig, ModelConfig
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.errors import AdapterMismatchError, ConfigError, DataError, WeightsError
from wmh_lora.models import site_adapter
from wmh_lora.models.encoders import ENCODERS
from wmh_lora.models.export import describe_export
from wmh_lora.models.export_bundle import METADATA_FILE, write_bundle
from wmh_lora.models.model_file import assemble_network, file_sha256, rewrite_card
from wmh_lora.models.network import build_network
from wmh_lora.models.registry import load_model
from wmh_lora.models.site_adapter import (
    LARGEST_BYTES,
    RANKS,
    AdapterCard,
    adapter_ranks,
    adapter_tensors,
    load_adapter,
    save_adapter,
)
from wmh_lora.training.adapt_network import Base


@pytest.fixture(autouse=True)
def _two_layer_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, spec in TWO_LAYERS.items():
        monkeypatch.setitem(ENCODERS, name, spec)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base.safetensors")


def _probability(model: Path, adapter: Path | None) -> np.ndarray:
    engine = WMHInferenceEngine(load_model(model, adapter=adapter), "cpu")
    return engine.predict(head()[0])


def test_a_loaded_adapter_computes_what_was_trained(base: Path, tmp_path: Path) -> None:
    """Merged and in half precision, the file does what the network with `peft` did."""
    path = write_adapter(base, tmp_path / "site.safetensors")
    source = Base(base, None, "lora")
    trained = source.learning_net(0)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            change = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.data = (parameter.data + change).half().float()
    slices = torch.rand(2, 3, 16, 24, generator=generator)
    with torch.no_grad():
        expected = trained(slices)
        plain = source.model().net(slices)
        found = load_model(base, adapter=path).net(slices)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, plain, atol=0.1)


def test_an_export_says_whose_adapter_is_in_it(base: Path, tmp_path: Path) -> None:
    model = load_model(base, adapter=write_adapter(base, tmp_path / "my-site.safetensors"))
    about = describe_export(model)
    assert about["name"] == f"{model.card.name} + my-site"
    assert model.adapter is not None
    assert about["adapter_sha256"] == model.adapter.sha256
    write_bundle(tmp_path / "bundle", model, about)
    metadata = json.loads((tmp_path / "bundle" / METADATA_FILE).read_text())
    assert metadata["name"] == about["name"]


def test_an_untrained_adapter_changes_nothing_but_rounding(base: Path) -> None:
    net = Base(base, None, "lora").learning_net(0)
    plain, _ = assemble_network(base)
    slices = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(net.train()(slices), plain(slices))


def test_adapters_are_switched_and_the_base_stays_as_it_was(base: Path, tmp_path: Path) -> None:
    content = base.read_bytes()
    before = _probability(base, None)
    first = write_adapter(base, tmp_path / "first.safetensors", seed=1)
    second = write_adapter(base, tmp_path / "second.safetensors", seed=2)
    maps = [_probability(base, path) for path in (first, second, first, None)]
    assert base.read_bytes() == content
    assert np.array_equal(maps[0], maps[2])
    assert np.array_equal(maps[3], before)
    assert np.abs(maps[0] - maps[1]).max() > 0.01
    assert np.abs(maps[0] - before).max() > 0.01


def test_report_and_settings_are_those_of_the_adapter(base: Path, tmp_path: Path) -> None:
    path = write_adapter(base, tmp_path / "site.safetensors")
    result = segment(head()[0], model=base, adapter=path, device="cpu")
    assert result.settings["threshold"] == 0.35
    assert result.settings["min_voxels"] == 2
    model = result.report()["model"]
    assert model["name"] == "base + site"
    assert model["adapter"] == "site"
    assert model["adapter_sha256"] == file_sha256(path)
    assert model["sha256"] == file_sha256(base)
    plain = segment(head()[0], model=base, device="cpu").report()["model"]
    assert plain["name"] == "base"
    assert "adapter" not in plain
    given = segment(head()[0], model=base, adapter=path, threshold=0.6, device="cpu")
    assert given.settings["threshold"] == 0.6


@pytest.mark.parametrize(
    ("planes", "expected"), [(1, (0.35, 0.2)), (3, (0.5, 0.35)), (0, (0.35, 0.35))]
)
def test_the_threshold_of_scans_of_another_kind_stays(
    base: Path, tmp_path: Path, planes: int, expected: tuple[float, float]
) -> None:
    site = load_adapter(write_adapter(base, tmp_path / "site.safetensors"))
    site = dataclasses.replace(site, card=dataclasses.replace(site.card, planes=planes))
    card = load_model(base).card
    two = InferenceConfig(threshold=0.5, threshold_three_planes=0.2)
    inference = site.adapt_card(dataclasses.replace(card, inference=two)).inference
    assert (inference.threshold_of(1), inference.threshold_of(3)) == expected
    assert inference.min_voxels == 2


def test_exports_of_a_model_and_its_adapters_are_kept_apart(base: Path, tmp_path: Path) -> None:
    path = write_adapter(base, tmp_path / "site.safetensors")
    assert load_model(base).checksum == file_sha256(base)
    assert load_model(base, adapter=path).checksum != file_sha256(base)


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    path = write_adapter(base, tmp_path / "site.safetensors")
    other = write_base(tmp_path / "other.safetensors", seed=4)
    with pytest.raises(AdapterMismatchError) as caught:
        load_model(other, adapter=path)
    message = str(caught.value)
    assert f"made for the model base with sha256 {file_sha256(base)[:12]}" in message
    assert f"{other} has {file_sha256(other)[:12]}" in message
    # the same weights under another card are another file
    changed = tmp_path / "changed.safetensors"
    card = load_model(base).card
    rewrite_card(base, dataclasses.replace(card, licence="other"), target=changed)
    with pytest.raises(AdapterMismatchError, match="--model"):
        load_model(changed, adapter=path)


def test_a_loaded_model_takes_no_second_adapter(base: Path, tmp_path: Path) -> None:
    path = write_adapter(base, tmp_path / "site.safetensors")
    with pytest.raises(ConfigError, match="loaded already"):
        segment(head()[0], model=load_model(base), adapter=path)


def test_what_is_no_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not a WMH-LoRA adapter"):
        load_model(base, adapter=base)
    path = write_adapter(base, tmp_path / "site.safetensors")
    with pytest.raises(WeightsError, match="not a WMH-LoRA model"):
        load_model(path)
    with pytest.raises(WeightsError, match=r"adapter file .* does not exist"):
        load_model(base, adapter=tmp_path / "absent")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        load_model(base, adapter=path)


def test_tensors_must_be_exactly_those_of_the_network(base: Path, tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(base, tmp_path / "site.safetensors"))
    net, _ = assemble_network(base)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for tensors, message in (
        ({**adapter.tensors, "extra": torch.zeros(1)}, "unexpected: extra"),
        (dict(list(adapter.tensors.items())[1:]), "missing"),
        ({**adapter.tensors, "lora.qkv.lora_a": torch.zeros(3, 8)}, "rank 3 found, rank 8"),
    ):
        with pytest.raises(AdapterMismatchError, match=message):
            dataclasses.replace(adapter, tensors=tensors).apply(net)
    after = net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_nothing_is_written_that_is_not_finite_too_large_or_in_the_way(
    base: Path, tmp_path: Path
) -> None:
    card = AdapterCard("site", "base", "0" * 64, {}, 0.5, 3)
    path = tmp_path / "site.safetensors"
    with pytest.raises(WeightsError, match="not finite"):
        save_adapter(path, {"decoder.x": torch.tensor([1e30])}, card)
    with pytest.raises(WeightsError, match=f"more than the {LARGEST_BYTES}"):
        save_adapter(path, {"decoder.x": torch.zeros(LARGEST_BYTES // 2)}, card)
    assert not path.exists()
    save_adapter(path, {"decoder.x": torch.zeros(1)}, card)
    with pytest.raises(DataError, match="exists already"):
        save_adapter(path, {"decoder.x": torch.ones(1)}, card)
    assert not load_file(path)["decoder.x"].any()
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="not a WMH-LoRA adapter"):
        load_adapter(path)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(encoder="compact", adaptation="full", decoder_channels=(96, 48, 32, 16)),
        ModelConfig(),
    ],
    ids=lambda config: config.encoder,
)
def test_adapters_of_the_packaged_encoders_have_room_for_the_full_rank(
    config: ModelConfig,
) -> None:
    net = build_network(config, None, for_training=False, unset_encoder=True)
    assert adapter_ranks(net, config.lora_targets) == dict.fromkeys(config.lora_targets, RANKS[0])


def test_the_rank_is_the_largest_that_the_file_has_room_for(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = assemble_network(base)
    own = sum(p.numel() for part in (net.adapter, net.decoder) for p in part.parameters())
    for rank in (*RANKS, 0):
        # two bytes a value: the layer has 8 inputs and 8 outputs
        monkeypatch.setattr(site_adapter, "LARGEST_BYTES", 2 * (own + 16 * rank) + 64_001)
        assert adapter_ranks(net, ("qkv",)) == ({"qkv": rank} if rank else {})
    monkeypatch.setattr(site_adapter, "LARGEST_BYTES", 2 * own + 64_000)
    with pytest.raises(WeightsError, match="fine-tune the whole model"):
        adapter_ranks(net, ("qkv",))


def test_starting_values_follow_from_the_seed(base: Path) -> None:
    nets = [adapter_tensors(Base(base, None, "lora").learning_net(seed)) for seed in (1, 1, 2)]
    name = "lora.qkv.lora_a"
    assert torch.equal(nets[0][name], nets[1][name])
    assert not torch.equal(nets[0][name], nets[2][name])


def test_only_low_rank_updates_and_decoder_learn(base: Path) -> None:
    net = Base(base, None, "lora").learning_net(0)
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in learning} == {"adapter", "decoder", "encoder"}
    assert all("lora_" in name for name in learning if name.startswith("encoder."))
    assert len(adapter_tensors(net)) == len(learning)
    full = Base(base, None, "full").learning_net(0)
    assert all(parameter.requires_grad for parameter in full.parameters())
