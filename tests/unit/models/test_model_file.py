"""The model file: exact round trips, and one clear sentence for every defect."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.processes import fresh_python
from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig
from wmh_lora.config_reading import to_dict
from wmh_lora.errors import AdapterMismatchError, DataError, WeightsError
from wmh_lora.models.lora import extract_lora, load_lora_into_peft
from wmh_lora.models.model_file import (
    METADATA_KEY,
    ModelCard,
    file_sha256,
    load_model_file,
    load_network,
    load_trained_parts,
    read_model_card,
    rewrite_card,
    save_model,
    weights_sha256,
)
from wmh_lora.models.network import WMHNet, build_network

CONFIG = ModelConfig(lora_rank=2, decoder_channels=(16, 8, 8, 8))


@pytest.fixture(scope="module")
def net() -> WMHNet:
    """A network in which every trained tensor differs from its start, BatchNorm's included."""
    net = build_network(CONFIG, None, for_training=True, seed=5)
    generator = torch.Generator().manual_seed(6)
    for module in (net.adapter, net.decoder):
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator) * 0.1
                tensor.add_(noise + (0.5 if "running" in name else 0.0))
            else:
                tensor.fill_(7)
    random = {
        name: torch.rand(tensor.shape, generator=generator) * 0.1
        for name, tensor in extract_lora(net.encoder).items()
    }
    load_lora_into_peft(net.encoder, random)
    return net.eval()


@pytest.fixture
def card() -> ModelCard:
    return ModelCard(
        name="test",
        model=CONFIG,
        preprocess=PreprocessConfig(context_mm=2.0),
        inference=InferenceConfig(threshold=0.6),
        base_sha256="0" * 64,
        training={"data": "phantoms", "seed": 1},
        metrics={"dice": 0.5},
    )


@pytest.fixture
def path(tmp_path: Path, net: WMHNet, card: ModelCard) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(path, net, card)
    return path


def _rewrite(path: Path, card: dict[str, Any], **changes: torch.Tensor) -> None:
    tensors = {**load_file(path), **changes}
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(card)})


def test_card_and_tensors_come_back(path: Path, net: WMHNet, card: ModelCard) -> None:
    found, tensors = load_model_file(path)
    assert found == card == read_model_card(path)
    fresh = build_network(CONFIG, None, for_training=True, seed=5)
    load_lora_into_peft(fresh.encoder, load_trained_parts(fresh, tensors))
    expected = net.state_dict()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_half_precision_spares_running_statistics(
    tmp_path: Path, net: WMHNet, card: ModelCard
) -> None:
    path = tmp_path / "half.safetensors"
    save_model(path, net, card, half=True)
    types = {name: tensor.dtype for name, tensor in load_file(path).items()}
    for name, dtype in types.items():
        if name.endswith("num_batches_tracked"):
            assert dtype == torch.int64
        else:
            running = name.endswith(("running_mean", "running_var"))
            assert dtype == (torch.float32 if running else torch.float16), name
    assert all(t.dtype in (torch.float32, torch.int64) for t in load_model_file(path)[1].values())


def test_saving_replaces_the_file_and_leaves_nothing_beside_it(
    path: Path, net: WMHNet, card: ModelCard
) -> None:
    save_model(path, net, dataclasses.replace(card, name="second"))
    assert read_model_card(path).name == "second"
    assert list(path.parent.iterdir()) == [path]


def test_what_is_not_a_trained_network_is_not_saved(
    tmp_path: Path, net: WMHNet, card: ModelCard
) -> None:
    path = tmp_path / "model.safetensors"
    other = dataclasses.replace(card, model=dataclasses.replace(CONFIG, lora_rank=4))
    with pytest.raises(AdapterMismatchError, match="model card"):
        save_model(path, net, other)
    with pytest.raises(DataError, match="existing folder"):
        save_model(tmp_path / "absent" / "model.safetensors", net, card)
    bias = net.decoder.heads[0].bias
    assert isinstance(bias, torch.Tensor)
    before = bias.detach().clone()
    try:
        bias.data[0] = float("nan")
        with pytest.raises(WeightsError, match=r"decoder\.heads\.0\.bias.* not finite"):
            save_model(path, net, card)
    finally:
        bias.data.copy_(before)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_give_one_clear_sentence(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for part in (b"", b"not a model at all", content[:7], content[: len(content) // 2]):
        damaged.write_bytes(part)
        with pytest.raises(WeightsError, match="not a complete safetensors file") as caught:
            load_model_file(damaged)
        assert str(damaged) in str(caught.value)
        assert "\n" not in str(caught.value)
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(WeightsError, match="does not exist or is not a file"):
            load_model_file(absent)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="not a WMH-LoRA model"):
        read_model_card(path)


def test_tensors_must_be_exactly_those_of_the_network(path: Path, card: ModelCard) -> None:
    plain = to_dict(card)
    _rewrite(path, plain, extra=torch.zeros(1))
    with pytest.raises(AdapterMismatchError, match="unexpected: extra"):
        load_model_file(path)
    plain["model"]["lora_rank"] = 3
    _rewrite(path, plain)
    with pytest.raises(AdapterMismatchError, match="other shape: lora"):
        load_model_file(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "model format 99"),
        ({"colour": "red"}, "metadata.*invalid.*'colour'"),
        ({"model": {"encoder": "resnet"}}, "Unknown encoder 'resnet'"),
    ],
)
def test_metadata_this_version_cannot_use(
    path: Path, card: ModelCard, changes: dict[str, Any], message: str
) -> None:
    _rewrite(path, {**to_dict(card), **changes})
    with pytest.raises(WeightsError, match=message) as caught:
        load_model_file(path)
    assert path.name in str(caught.value)


# Runs where nothing of the training process is left. The base checkpoint of the test is a plain
# state dictionary: reading LiteMedSAM's layout has its own tests.
_FRESH_PROCESS = """
import sys
from pathlib import Path
import torch
from wmh_lora.models import model_file
from wmh_lora.models.network import ENCODERS, EncoderSpec
from wmh_lora.models.tiny_vit import TinyViT

model, base, slices, logits = map(Path, sys.argv[1:])

def load(path):
    encoder = TinyViT()
    encoder.load_state_dict(torch.load(path, weights_only=True))
    return encoder

torch.set_num_threads(2)
ENCODERS["litemedsam"] = EncoderSpec(TinyViT, load)
net, card = model_file.load_network(model, base)
assert not net.training
with torch.inference_mode():
    torch.save(net(torch.load(slices, weights_only=True)), logits)
heavy = {"peft", "transformers", "monai", "timm", "torchvision", "torch._dynamo"} & set(sys.modules)
assert not heavy, heavy
"""


def _fresh_process(*arguments: Path) -> subprocess.CompletedProcess[str]:
    return fresh_python(_FRESH_PROCESS, *arguments)


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 5e-3)])
def test_a_fresh_process_computes_the_same(
    tmp_path: Path, net: WMHNet, card: ModelCard, half: bool, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(7)
    model, base, slices, logits = (tmp_path / n for n in ("m.safetensors", "b.pt", "x.pt", "y.pt"))
    torch.save(build_network(CONFIG, None, for_training=False, seed=5).encoder.state_dict(), base)
    save_model(model, net, dataclasses.replace(card, base_sha256=file_sha256(base)), half=half)
    x = torch.rand(1, 3, 16, 24, generator=generator)
    torch.save(x, slices)
    finished = _fresh_process(model, base, slices, logits)
    assert finished.returncode == 0, finished.stderr
    with torch.inference_mode():
        expected = net(x)
    found = torch.load(logits, weights_only=True)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_other_base_weights_are_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_bytes(b"other")
    with pytest.raises(AdapterMismatchError, match=r"000000000000\.\.\..*other\.pth"):
        load_network(path, other)


def test_a_model_trained_in_full_holds_its_encoder(tmp_path: Path, card: ModelCard) -> None:
    config = ModelConfig(
        encoder="compact", adaptation="full", t1_channels=1, decoder_channels=(16, 8, 8, 8)
    )
    net = build_network(config, None, for_training=True, seed=8)
    generator = torch.Generator().manual_seed(9)
    x = torch.rand(2, 3, 16, 24, generator=generator)
    with torch.no_grad():
        net(x)  # moves the running statistics of the encoder, too
    path = tmp_path / "compact.safetensors"
    save_model(path, net.eval(), dataclasses.replace(card, model=config, base_sha256=""))
    stored = load_file(path)
    parts = {name.partition(".")[0] for name in stored}
    assert parts == {"adapter", "decoder", "encoder"}
    assert {n.removeprefix("encoder.") for n in stored if n.startswith("encoder.")} == set(
        net.encoder.state_dict()
    )
    loaded, _ = load_network(path)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), net(x), atol=1e-4, rtol=1e-4)
    _rewrite(path, to_dict(read_model_card(path)), **{"lora.x.lora_a": torch.zeros(1)})
    with pytest.raises(AdapterMismatchError, match="unexpected"):
        load_network(path)


def test_norms_are_covered(net: WMHNet) -> None:
    """The network under test has what older model files lost: BatchNorm statistics."""
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) > 5


class TestRewriteCard:
    def test_changes_the_card_and_no_bit_of_the_tensors(
        self, tmp_path: Path, net: WMHNet, card: ModelCard
    ) -> None:
        path = tmp_path / "half.safetensors"
        save_model(path, net, card, half=True)
        before, checksum = load_file(path), weights_sha256(path)
        tuned = dataclasses.replace(
            card, inference=InferenceConfig(threshold=0.3, tta="d4"), metrics={"dice": 0.7}
        )
        rewrite_card(path, tuned)
        assert read_model_card(path) == tuned
        assert weights_sha256(path) == checksum
        after = load_file(path)
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name]), name
        assert [file.name for file in tmp_path.iterdir()] == ["half.safetensors"]

    def test_writes_elsewhere_and_spares_what_is_there(self, path: Path, card: ModelCard) -> None:
        target, checksum = path.with_name("tuned.safetensors"), file_sha256(path)
        tuned = dataclasses.replace(card, name="tuned")
        rewrite_card(path, tuned, target=target)
        assert (read_model_card(target).name, file_sha256(path)) == ("tuned", checksum)
        with pytest.raises(DataError, match="--overwrite"):
            rewrite_card(path, card, target=target)
        rewrite_card(path, card, target=target, overwrite=True)
        assert read_model_card(target) == card

    def test_halves_what_is_stored_but_running_statistics(
        self, path: Path, card: ModelCard
    ) -> None:
        single, half = (path.with_name(f"{name}.safetensors") for name in ("single", "packed"))
        tensors = {n: t.float() if t.is_floating_point() else t for n, t in load_file(path).items()}
        _rewrite(path, to_dict(card), **tensors)
        rewrite_card(path, card, target=single)
        rewrite_card(path, card, target=half, half=True)
        packed = load_file(half)
        for name, tensor in load_file(single).items():
            whole = not tensor.is_floating_point() or "running" in name
            assert packed[name].dtype == (tensor.dtype if whole else torch.float16), name
            torch.testing.assert_close(packed[name].to(tensor.dtype), tensor, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        "change",
        [
            {"base_sha256": "1" * 64},
            {"model": dataclasses.replace(CONFIG, lora_alpha=99)},
            {"preprocess": PreprocessConfig(context_mm=9.0)},
        ],
    )
    def test_refuses_what_the_tensors_were_not_trained_for(
        self, path: Path, card: ModelCard, change: dict[str, Any]
    ) -> None:
        checksum = file_sha256(path)
        with pytest.raises(AdapterMismatchError, match=next(iter(change))):
            rewrite_card(path, dataclasses.replace(card, **change))
        assert file_sha256(path) == checksum

    def test_the_checksum_of_the_weights_sees_one_changed_value(
        self, path: Path, card: ModelCard
    ) -> None:
        checksum = weights_sha256(path)
        name, tensor = next(iter(sorted(load_file(path).items())))
        changed = tensor.clone()
        changed.view(-1)[0] += 1
        _rewrite(path, to_dict(card), **{name: changed})
        assert weights_sha256(path) != checksum
