"""Few-shot adaptation on phantoms: it learns, proves it, keeps to its time, or writes nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.processes import fresh_python
from tests.site_scans import FAINT, STRUCTURES, TWO_LAYERS, write_base, write_site
from wmh_lora import segment
from wmh_lora.data.dataset import build_stream
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.evaluation.metrics import dice
from wmh_lora.evaluation.selection import Setting
from wmh_lora.files import file_sha256
from wmh_lora.models.encoders import ENCODERS
from wmh_lora.models.model_file import load_model_file, read_model_card
from wmh_lora.models.registry import load_model
from wmh_lora.models.site_adapter import LARGEST_BYTES, load_adapter
from wmh_lora.training import adapt as adapt_module
from wmh_lora.training import adapt_learn
from wmh_lora.training.adapt import AdaptConfig, CrossValidation, adapt
from wmh_lora.training.tune_cases import TuningCase
from wmh_lora.volume import Volume

_REPOSITORY = Path(__file__).resolve().parents[3]
LEARNING = AdaptConfig(
    folds=2,
    steps=12,
    batch_size=4,
    lora_lr=5e-3,
    decoder_lr=5e-3,
    adapter_lr=5e-3,
    encoder_lr=5e-3,
    lanes=2,
    crops_per_scan=100,
    workers=0,
)
QUICK = replace(LEARNING, steps=2)


class Site:
    """A base model, scans whose lesions it misses, and what was learned from them."""

    def __init__(self, folder: Path) -> None:
        self.base = write_base(folder / "base.safetensors", steps=80)
        self.cases: list[TuningCase] = write_site(folder / "site", 3, lesion_level=FAINT)
        self.adapter = folder / "site.safetensors"
        self.base_sha256 = file_sha256(self.base)
        self.result: CrossValidation = adapt(self.cases, self.base, self.adapter, LEARNING)


@pytest.fixture(scope="module", autouse=True)
def _two_layer_encoder() -> Iterator[None]:
    ENCODERS.update(TWO_LAYERS)
    yield
    for name in TWO_LAYERS:
        del ENCODERS[name]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    torch.set_num_threads(1)
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def fresh(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what `tests.site_scans` left when it ran as a program, up to its end."""
    folder = tmp_path_factory.mktemp("fresh")
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
        "runpy.run_module('tests.site_scans', run_name='__main__')"
    )
    files = (site.cases[0].image, site.base, site.adapter)
    targets = (folder / "mask.nii.gz", folder / "copy.safetensors")
    done = fresh_python(code, _REPOSITORY, *files, *targets)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return folder


def test_a_site_is_learned_and_the_figures_are_of_held_out_scans(site: Site) -> None:
    result = site.result
    assert result.better
    assert result.adapted.mean() > max(result.base.mean(), result.default.mean()) + 0.5
    assert sorted(n for fold in result.folds for n in fold.scans) == [0, 1, 2]
    assert {fold.steps for fold in result.folds} == {LEARNING.steps}


def test_the_file_is_small_and_says_what_it_is(site: Site) -> None:
    assert site.adapter.stat().st_size < LARGEST_BYTES
    adapter = load_adapter(site.adapter)
    card, result = adapter.card, site.result
    assert (card.name, card.base_name) == ("site", "base")
    assert card.base_sha256 == site.base_sha256
    assert card.threshold == result.setting.threshold
    assert card.min_voxels == result.setting.min_voxels
    assert card.training["seed"] == 42
    assert card.training["steps"] == LEARNING.steps
    assert [scan["image_sha256"] for scan in card.scans] == [
        file_sha256(case.image) for case in site.cases
    ]
    found = card.cross_validation
    assert found["adapted_dice"] == pytest.approx(result.adapted.mean(), abs=1e-4)
    assert found["base_dice"] == pytest.approx(result.base.mean(), abs=1e-4)
    assert [fold["scans"] for fold in found["folds"]] == [list(f.scans) for f in result.folds]
    assert "p0" not in str(card)  # nobody's name
    assert {"wmh_lora", "torch", "numpy", "python"} <= set(card.versions)
    assert {tensor.dtype for tensor in load_file(site.adapter).values()} == {torch.float16}


def test_running_statistics_are_those_of_the_base(site: Site) -> None:
    names = load_adapter(site.adapter).tensors
    assert not [name for name in names if "running" in name or "tracked" in name]


def test_the_adapter_finds_the_lesions_of_a_scan_that_it_has_not_seen(
    site: Site, tmp_path: Path
) -> None:
    case = write_site(tmp_path, 5, lesion_level=FAINT)[4]
    assert case.reference is not None
    reference = Volume.read(case.reference).data > 0
    found = segment(case.image, model=site.base, adapter=site.adapter).mask > 0
    without = segment(case.image, model=site.base).mask > 0
    assert dice(reference, found) > 0.7
    assert not dice(reference, without) > 0.1
    assert file_sha256(site.base) == site.base_sha256


def test_a_fresh_process_makes_the_same_mask(site: Site, fresh: Path) -> None:
    expected = segment(site.cases[0].image, model=site.base, adapter=site.adapter).mask
    assert expected.any()
    assert np.array_equal(Volume.read(fresh / "mask.nii.gz").data, expected)


def test_equal_seeds_give_equal_files(site: Site, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    results = []
    for _ in range(2):
        adapt(site.cases[:2], site.base, again, QUICK, force=True, overwrite=True)
        results.append(load_adapter(again).tensors)
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


def test_what_is_not_better_is_not_written_unless_forced(site: Site, tmp_path: Path) -> None:
    known = write_site(tmp_path / "known", 2)  # lesions that the base finds
    spoilt = replace(QUICK, decoder_lr=0.5)
    target = tmp_path / "site.safetensors"
    with pytest.raises(DataError, match=r"did not help: .* is 0\.\d+ with it and 1\.000 without"):
        adapt(known, site.base, target, spoilt)
    assert not target.exists()
    result = adapt(known, site.base, target, spoilt, force=True)
    assert not result.better
    assert load_adapter(target).card.cross_validation["better"] is False


def test_a_target_in_the_way_is_seen_before_any_work(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "site.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(DataError, match="exists already"):
        adapt([], site.base, target)
    with pytest.raises(DataError, match="not an existing folder"):
        adapt([], site.base, tmp_path / "absent" / "site.safetensors")
    assert target.read_bytes() == b"mine"


def test_other_structures_are_taught_as_the_base_sees_them(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid, taught = [], {}

    def look(*arguments: Any, **options: Any) -> Any:
        stream = build_stream(*arguments, **options)
        valid.append(stream.item(0).valid.tolist())
        taught.update({p.name: Volume.read(p).data for p in stream.files() if "ventr" in p.name})
        return stream

    monkeypatch.setattr(adapt_learn, "build_stream", look)
    adapt(site.cases[:2], site.base, tmp_path / "x.safetensors", QUICK, force=True)
    assert valid == [[True] * len(STRUCTURES)] * 4  # first steps, two folds, all scans
    model = load_model(site.base)
    for case, mask in zip(site.cases[:2], (taught[n] for n in sorted(taught)), strict=True):
        expected = segment(case.image, model=model).structure_masks["ventricles"]
        assert expected.any()
        assert np.array_equal(mask, expected)


def test_full_fine_tuning_writes_a_model(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "full.safetensors"
    config = replace(LEARNING, method="full", steps=3)
    adapt(site.cases[:2], site.base, target, config, force=True)
    card = read_model_card(target)
    assert card.model.adaptation == "full"
    assert card.training["adapted_from_sha256"] == site.base_sha256
    _, before = load_model_file(site.base)
    _, after = load_model_file(target)
    changed = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-3)}
    assert {"encoder.stem.weight", "encoder.qkv.weight"} <= changed
    assert not [name for name in changed if "running" in name]
    with pytest.raises(ConfigError, match="Unknown method"):
        adapt(site.cases, site.base, tmp_path / "x", replace(LEARNING, method="half"))  # type: ignore[arg-type]


# --- interruptions and time -------------------------------------------------------------------


def test_an_interruption_leaves_nothing(site: Site, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, text: str) -> None:
        if text.startswith("fold 1") and "loss" in text:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        adapt(site.cases[:2], site.base, tmp_path / "x.safetensors", LEARNING, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_half_file(fresh: Path) -> None:
    assert [path.name for path in fresh.glob("[!.]*")] == ["mask.nii.gz"]


class FakeTime:
    """A clock that only `advance` moves."""

    def __init__(self, step_s: Callable[[str], float]) -> None:
        self.now, self.step_s = 0.0, step_s

    def advance(self, done: int, total: int, text: str) -> None:
        self.now += self.step_s(text)


def _timed(
    site: Site,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    step_s: Callable[[str], float],
) -> tuple[CrossValidation, FakeTime]:
    clock = FakeTime(step_s)
    for module in (adapt_module, adapt_learn):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    config = replace(LEARNING, steps=1000, minutes=1.0, batch_size=1, lanes=1)
    result = adapt(site.cases[:2], site.base, target, config, force=True, progress=clock.advance)
    return result, clock


def test_as_many_steps_are_taken_as_the_time_allows(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "site.safetensors"
    result, clock = _timed(site, target, monkeypatch, lambda text: 1.0)
    steps = {fold.steps for fold in result.folds}
    assert len(steps) == 1
    assert 10 <= steps.pop() < 20
    assert 40 < clock.now <= 60


def test_a_machine_that_gets_slower_does_not_break_the_deadline(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "site.safetensors"
    slow = lambda text: 2.5 if "fold" in text or "all" in text else 0.8  # noqa: E731
    result, clock = _timed(site, target, monkeypatch, slow)
    assert clock.now <= 62
    assert "for time" in caplog.text
    assert target.exists()
    assert all(fold.steps < 10 for fold in result.folds)


@pytest.mark.parametrize(
    ("slow", "seconds"), [("base model", 20.0), ("first steps", 20.0), ("first steps", 40.0)]
)
def test_too_little_time_is_said_early(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, seconds: float
) -> None:
    target = tmp_path / "site.safetensors"
    with pytest.raises(ConfigError, match=r"1 minutes are too few .* give about \d+"):
        _timed(site, target, monkeypatch, lambda text: seconds if slow in text else 0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"minutes": 0.0}, {"folds": 1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        AdaptConfig(**wrong)


@pytest.mark.parametrize(
    ("default", "base", "adapted", "better"),
    [(0.5, 0.6, 0.61, True), (0.6, 0.5, 0.55, False), (0.5, 0.6, 0.6, False)],
)
def test_better_is_above_the_base_with_its_own_settings_and_with_chosen_ones(
    default: float, base: float, adapted: float, better: bool
) -> None:
    result = CrossValidation(
        names=("a", "b"),
        default=np.array([default - 0.1, default + 0.1]),
        base=np.array([base, base]),
        adapted=np.array([adapted + 0.2, adapted - 0.2]),
        folds=(),
        setting=Setting(0.5, 3, "none"),
        seconds=0.0,
    )
    assert result.better is better
