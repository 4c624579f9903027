"""PEFT folders: peft reads what we write, and the other way round."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wmh_lora.errors import AdapterMismatchError, DataError, WeightsError
from wmh_lora.models.lora import LoraSettings, lora_shapes, merge_lora
from wmh_lora.models.peft_folder import export_peft, import_peft

SHA256 = "5a" * 32
BASE: dict[str, Any] = {"base_name": "litemedsam", "base_sha256": SHA256}

LORA = LoraSettings({"qkv": 2, "proj": 2}, scale=1.5, dropout=0.05)
MIXED = LoraSettings({"qkv": 4, "proj": 1}, scale=0.75)
RSLORA = LoraSettings({"qkv": 4, "proj": 1}, scale=0.5, rslora=True)
DORA = LoraSettings({"qkv": 1, "proj": 3}, scale=1.0, dropout=0.1, dora=True)
ALL = pytest.mark.parametrize("settings", [LORA, MIXED, RSLORA, DORA], ids=str)


class Encoder(nn.Module):
    """Two blocks to adapt behind a convolution that is named as a target is, as in SAM."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.ModuleDict({"proj": nn.Conv1d(1, 1, 1)})
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(5, 7), "proj": nn.Linear(7, 5)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch["proj"](x[:, None])[:, 0]
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["proj"](torch.relu(block["qkv"](x)))
        return x


def _encoder() -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Encoder().eval()


def _tensors(settings: LoraSettings) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = lora_shapes(_encoder(), settings)
    return {name: 0.1 + torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def _merged(tensors: dict[str, Tensor], settings: LoraSettings) -> Encoder:
    encoder = _encoder()
    merge_lora(encoder, tensors, settings)
    return encoder


def _edit_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as `export_peft` writes it, with mixed ranks."""
    export_peft(tmp_path / "adapter", _tensors(MIXED), MIXED, **BASE)
    return tmp_path / "adapter"


# --- peft as the oracle ---------------------------------------------------------------------


@ALL
def test_peft_computes_with_our_folder_what_our_merge_computes(
    settings: LoraSettings, tmp_path: Path, torch_generator: torch.Generator
) -> None:
    x = torch.rand(3, 5, generator=torch_generator)
    export_peft(tmp_path, _tensors(settings), settings, **BASE)
    by_peft = PeftModel.from_pretrained(_encoder(), str(tmp_path)).eval()
    merged = _merged(_tensors(settings), settings)
    torch.testing.assert_close(by_peft(x), merged(x))
    assert not torch.allclose(merged(x), _encoder()(x), rtol=0.1)


@ALL
def test_we_read_what_peft_writes_again_from_our_folder(
    settings: LoraSettings, tmp_path: Path
) -> None:
    export_peft(tmp_path / "ours", _tensors(settings), settings, **BASE)
    # Without the option, peft asks the internet about the base model.
    by_peft = PeftModel.from_pretrained(_encoder(), str(tmp_path / "ours"))
    by_peft.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    for name in ("ours", "theirs"):
        tensors, found = import_peft(tmp_path / name, _encoder(), **BASE)
        assert found == settings
        assert tensors.keys() == _tensors(settings).keys()
        assert all(torch.equal(tensors[k], v) for k, v in _tensors(settings).items())
    with pytest.raises(AdapterMismatchError, match="sha256"):
        import_peft(tmp_path / "theirs", _encoder(), base_name="litemedsam", base_sha256="77" * 32)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "lora_alpha": 5, "target_modules": ["qkv"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["qkv"], "use_rslora": True},
        {"r": 3, "lora_alpha": 3, "target_modules": r".*blocks.*\.(qkv|proj)", "use_dora": True},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["0.qkv", "1.qkv", "0.proj", "1.proj"],
            "rank_pattern": {r"\d\.proj": 2},
            "alpha_pattern": {"^blocks.*proj": 4},
        },
    ],
    ids=str,
)
def test_we_compute_what_peft_trained_on_its_own(
    options: dict[str, Any],
    tmp_path: Path,
    torch_generator: torch.Generator,
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.rand(3, 5, generator=torch_generator)
    with torch.random.fork_rng(devices=[]):
        trained = get_peft_model(_encoder(), LoraConfig(**options)).eval()
    for name, parameter in trained.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.2 * torch.rand(parameter.shape, generator=torch_generator)
    trained.save_pretrained(str(tmp_path))
    with caplog.at_level(logging.WARNING, "wmh_lora"):
        tensors, settings = import_peft(tmp_path, _encoder(), **BASE)
    assert "does not say which base" in caplog.text
    torch.testing.assert_close(_merged(tensors, settings)(x), trained(x))


def test_names_in_the_folder_are_those_of_peft(tmp_path: Path) -> None:
    export_peft(tmp_path, _tensors(DORA), DORA, **BASE)
    start = "base_model.model.blocks.0.qkv"
    assert {
        n for n in load_file(tmp_path / "adapter_model.safetensors") if n.startswith(start)
    } == {
        f"{start}.lora_A.weight",
        f"{start}.lora_B.weight",
        f"{start}.lora_magnitude_vector",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("litemedsam", SHA256)


# --- another base ---------------------------------------------------------------------------


def test_another_base_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(AdapterMismatchError, match="'litemedsam', not on 'sam-vit-b'"):
        import_peft(folder, _encoder(), base_name="sam-vit-b", base_sha256=SHA256)
    with pytest.raises(AdapterMismatchError, match=r"sha256 5a5a5a5a5a5a\.\.\., .* 777777777777"):
        import_peft(folder, _encoder(), base_name="litemedsam", base_sha256="77" * 32)
    with pytest.raises(AdapterMismatchError, match="random weights"):
        import_peft(folder, _encoder(), base_name="litemedsam", base_sha256="")


def test_a_random_base_has_no_checksum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base: dict[str, Any] = {"base_name": "litemedsam", "base_sha256": ""}
    export_peft(tmp_path, _tensors(LORA), LORA, **base)
    assert import_peft(tmp_path, _encoder(), **base)[1] == LORA
    assert caplog.text == ""


def test_layers_and_widths_of_another_encoder_are_refused(folder: Path) -> None:
    wider = _encoder()
    wider.blocks[0] = nn.ModuleDict({"qkv": nn.Linear(5, 9), "proj": nn.Linear(9, 5)})
    with pytest.raises(AdapterMismatchError, match=r"blocks\.0\.qkv\.lora_b .* another width"):
        import_peft(folder, wider, **BASE)
    deeper = _encoder()
    deeper.blocks.append(nn.ModuleDict({"qkv": nn.Linear(5, 7), "proj": nn.Linear(7, 5)}))
    with pytest.raises(AdapterMismatchError, match=r"missing: blocks\.2\.proj\.lora_a"):
        import_peft(folder, deeper, **BASE)
    with pytest.raises(AdapterMismatchError, match="'proj', 'qkv'"):
        import_peft(folder, nn.Sequential(nn.Linear(5, 7)), **BASE)


# --- damaged or foreign folders -------------------------------------------------------------


def test_a_rank_that_the_tensors_do_not_have_is_named(folder: Path) -> None:
    _edit_config(folder, r=16, lora_alpha=12)
    with pytest.raises(AdapterMismatchError, match="rank 4 found, rank 16 expected"):
        import_peft(folder, _encoder(), **BASE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"modules_to_save": ["neck"]}, r"modules_to_save = \['neck'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"alpha_pattern": {}}, r"differs between layers \(0\.75 to 3\)"),
        ({"r": "four"}, "'four'"),
        ({"rank_pattern": {"proj": 0}}, "rank 0"),
        ({"rank_pattern": {"0.proj": 1, "1.proj": 2}}, r"blocks\.1\.proj has rank 2"),
        ({"peft_type": "IA3"}, "of the kind 'IA3'"),
        ({"use_later_invention": True}, "use_later_invention = True"),
        ({"lora_dropout": 1.5}, "dropout"),
    ],
    ids=str,
)
def test_what_cannot_be_represented_is_refused(
    folder: Path, values: dict[str, object], message: str
) -> None:
    _edit_config(folder, **values)
    with pytest.raises(WeightsError, match=message):
        import_peft(folder, _encoder(), **BASE)


def test_a_pickle_is_not_opened(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(WeightsError, match="is a pickle, which can run any program"):
        import_peft(folder, _encoder(), **BASE)


def test_incomplete_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no PEFT adapter folder"):
        import_peft(tmp_path, _encoder(), **BASE)
    tensor_file = folder / "adapter_model.safetensors"
    content = tensor_file.read_bytes()
    tensor_file.write_bytes(content[:-9])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        import_peft(folder, _encoder(), **BASE)
    save_file({"base_model.model.blocks.0.qkv.bias": torch.zeros(7)}, tensor_file)
    with pytest.raises(AdapterMismatchError, match=r"qkv\.bias', which belongs to no LoRA"):
        import_peft(folder, _encoder(), **BASE)
    save_file({}, tensor_file)
    with pytest.raises(WeightsError, match="holds no adapters"):
        import_peft(folder, _encoder(), **BASE)
    tensor_file.unlink()
    with pytest.raises(WeightsError, match=r"has no adapter_model\.safetensors"):
        import_peft(folder, _encoder(), **BASE)
    for text in ("{", "7", '{"peft_type": "LORA", "init_lora_weights": true, "r": 1, "bias": []}'):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(WeightsError, match=r"adapter_config\.json"):
            import_peft(folder, _encoder(), **BASE)


# --- writing --------------------------------------------------------------------------------


def test_existing_files_stay_unless_they_may_be_replaced(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == ["adapter_config.json", "adapter_model.safetensors"]
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"adapter_config\.json exists already"):
        export_peft(folder, _tensors(LORA), LORA, **BASE)
    assert [path.name for path in folder.iterdir()] == ["adapter_config.json"]
    export_peft(folder, _tensors(MIXED), MIXED, **BASE, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Cannot make"):
        export_peft(tmp_path / "file" / "adapter", _tensors(LORA), LORA, **BASE)


def test_tensors_that_are_not_those_of_the_settings_are_not_written(tmp_path: Path) -> None:
    tensors = _tensors(MIXED)
    cases = {
        "rank 4 found, rank 8 expected": (tensors, LoraSettings({"qkv": 8, "proj": 1})),
        "unexpected: .*proj": (tensors, LoraSettings({"qkv": 4})),
        r"missing: .*magnitude": (tensors, LoraSettings(MIXED.ranks, dora=True)),
        "no adapters to export for fc1": (tensors, LoraSettings({**MIXED.ranks, "fc1": 2})),
        "no adapters to export for any layer": ({}, LoraSettings({})),
        r"missing: blocks\.0\.qkv\.lora_b": (
            {k: v for k, v in tensors.items() if k != "blocks.0.qkv.lora_b"},
            MIXED,
        ),
    }
    for message, (found, settings) in cases.items():
        with pytest.raises(AdapterMismatchError, match=message):
            export_peft(tmp_path / "adapter", found, settings, **BASE)
    assert not (tmp_path / "adapter").exists()
