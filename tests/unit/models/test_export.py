"""Exported files: what they compute, what they say, and that a failed export leaves nothing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.processes import fresh_python
from tests.small_models import small_model
from wmh_lora.errors import ConfigError, DataError, WeightsError
from wmh_lora.models import export_runtime
from wmh_lora.models.export import FORMATS, describe_export, export_model
from wmh_lora.models.export_bundle import load_bundle
from wmh_lora.models.registry import Model

NAMES = {
    "onnx": "net.onnx",
    "openvino": "net.xml",
    "torchscript": "net.ts",
    "monai-bundle": "bundle",
}
MODEL = small_model()

# What a user writes; PATH is the exported file. Neither may need this package.
RUN = {
    "onnx": """
import json, sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
logits = session.run(None, {"slices": numpy.load(sys.argv[2])})[0]
about = session.get_modelmeta().custom_metadata_map
""",
    "openvino": """
import json, sys, numpy, openvino
network = openvino.Core().read_model(sys.argv[1])
hint = {"INFERENCE_PRECISION_HINT": "f32"}
logits = openvino.compile_model(network, "CPU", hint)(numpy.load(sys.argv[2]))["logits"]
about = network.get_rt_info("wmh_lora").astype(dict)
about = {key: value.astype(str) for key, value in about.items()}
""",
    "torchscript": """
import json, sys, numpy, torch
extra = {"wmh_lora.json": ""}
network = torch.jit.load(sys.argv[1], _extra_files=extra)
logits = network(torch.from_numpy(numpy.load(sys.argv[2]))).numpy()
about = json.loads(extra["wmh_lora.json"])
""",
    "monai-bundle": """
import json, sys, numpy, torch
network = torch.jit.load(sys.argv[1] + "/models/model.ts")
logits = network(torch.from_numpy(numpy.load(sys.argv[2]))).numpy()
about = json.load(open(sys.argv[1] + "/configs/metadata.json"))["wmh_lora"]
del about["card"]
""",
}
REPORT = """
numpy.save(sys.argv[3], logits)
print(json.dumps(about))
assert "wmh_lora" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    paths = {kind: folder / name for kind, name in NAMES.items()}
    for kind in FORMATS:
        assert export_model(MODEL, paths[kind], kind) < 1e-5
    return paths


@pytest.mark.parametrize("kind", FORMATS)
def test_file_is_understood_without_this_package(
    kind: str, exported: dict[str, Path], tmp_path: Path, rng: np.random.Generator
) -> None:
    slices = rng.random((2, 3, 80, 48), dtype=np.float32)
    np.save(tmp_path / "slices.npy", slices)
    finished = fresh_python(
        RUN[kind] + REPORT, exported[kind], tmp_path / "slices.npy", tmp_path / "logits.npy"
    )
    assert finished.returncode == 0, finished.stderr
    with torch.inference_mode():
        expected = MODEL.net(torch.from_numpy(slices)).sigmoid().numpy()
    logits = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), expected, rtol=0, atol=1e-5)
    about = json.loads(finished.stdout)
    assert about == describe_export(MODEL)
    assert json.loads(about["structures"]) == ["wmh", "brain"]
    assert json.loads(about["preprocess"])["pixel_size_mm"] == 4.0
    assert about["threshold"] == "0.55"
    assert about["model_sha256"] == MODEL.sha256
    assert (about["licence"], about["base_licence"]) == ("MIT", "Apache-2.0")
    assert about["lesion_probability"] == "sigmoid(wmh) * sigmoid(brain)"


def test_nothing_but_the_results_is_left(exported: dict[str, Path]) -> None:
    names = {path.name for path in exported["onnx"].parent.iterdir()}
    assert names == {*NAMES.values(), "net.bin"}


@pytest.mark.parametrize("kind", FORMATS)
def test_existing_output_is_kept_unless_asked(kind: Any, exported: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="--overwrite"):
        export_model(MODEL, exported[kind], kind)


def test_output_is_replaced_on_request(exported: dict[str, Path]) -> None:
    other = small_model(seed=1)
    path = exported["torchscript"].with_name("replaced")
    export_model(MODEL, path, "monai-bundle")
    export_model(other, path, "monai-bundle", overwrite=True)
    assert load_bundle(path).sha256 == other.sha256


def test_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for name, kind in (("mine", "monai-bundle"), ("mine.onnx", "onnx")):
        (tmp_path / name).mkdir(exist_ok=True)
        with pytest.raises(DataError, match="not an export"):
            export_model(MODEL, tmp_path / name, kind, overwrite=True)  # type: ignore[arg-type]
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_fixed_size_is_the_only_one_taken(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / NAMES[kind]
    export_model(MODEL, path, kind, size=(48, 64))
    if kind == "onnx":
        runtime = importlib.import_module("onnxruntime")
        shape = runtime.InferenceSession(path).get_inputs()[0].shape
        assert shape[1:] == [3, 48, 64]
        assert isinstance(shape[0], str)
    else:
        model = importlib.import_module("openvino").Core().read_model(path)
        shape = model.inputs[0].partial_shape
        assert shape[0].is_dynamic
        assert [d.get_length() for d in list(shape)[1:]] == [3, 48, 64]


@pytest.mark.parametrize(
    ("kind", "name", "size", "words"),
    [
        ("onnx", "net.pt", None, r"ends in \.onnx"),
        ("openvino", "net.onnx", None, r"ends in \.xml"),
        ("onnx", "net.onnx", (40, 64), "multiples of 16"),
        ("onnx", "net.onnx", (0, 64), "multiples of 16"),
        ("torchscript", "net.ts", (48, 64), "any size"),
        ("tflite", "net.tflite", None, "known are onnx, openvino"),
    ],
)
def test_request_that_does_not_fit_is_refused(
    kind: Any, name: str, size: tuple[int, int] | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        export_model(MODEL, tmp_path / name, kind, size=size)
    assert list(tmp_path.iterdir()) == []


def test_other_modules_are_refused(tmp_path: Path) -> None:
    model = Model(nn.Identity(), MODEL.card, MODEL.path, MODEL.sha256)
    with pytest.raises(ConfigError, match="found Identity"):
        export_model(model, tmp_path / "net.ts", "torchscript")


@pytest.mark.parametrize(
    ("kind", "package"),
    [("onnx", "onnx"), ("onnx", "onnxruntime"), ("openvino", "openvino")],
)
def test_missing_package_is_named(
    kind: Any, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return importlib.import_module(name)

    monkeypatch.setattr(export_runtime, "import_module", without)
    with pytest.raises(ConfigError, match=rf"{package} is needed.*wmh-lora\[export\]"):
        export_model(MODEL, tmp_path / NAMES[kind], kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [3e-4, float("nan")])
def test_file_that_computes_something_else_is_not_kept(
    wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(self: Any, slices: Tensor) -> Tensor:
        logits: Tensor = self.script(slices)
        return torch.logit((logits.sigmoid() + wrong).clamp(1e-6, 1 - 1e-6))

    monkeypatch.setattr(export_runtime.TorchScriptNetwork, "forward", shifted)
    for kind in ("torchscript", "monai-bundle"):
        with pytest.raises(WeightsError, match="nothing was kept"):
            export_model(MODEL, tmp_path / NAMES[kind], kind)
    assert list(tmp_path.iterdir()) == []


def test_failing_exporter_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operator not supported\nlong dump")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(WeightsError, match=r"as onnx: RuntimeError: operator not supported\. No"):
        export_model(MODEL, tmp_path / "net.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not an existing folder"):
        export_model(MODEL, tmp_path / "absent" / "net.ts", "torchscript")
