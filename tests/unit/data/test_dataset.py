"""The training stream: fixed by seed and index, mixed, labelled, and fed by the inference path."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from wmh_lora.config import PreprocessConfig
from wmh_lora.data.anatomy import Anatomy
from wmh_lora.data.augment import augment_crop, augment_scan
from wmh_lora.data.dataset import DataConfig, TrainingStream, build_stream
from wmh_lora.data.sources import read_masks
from wmh_lora.data.synthesis import Case
from wmh_lora.errors import ConfigError, DataError, GridMismatchError
from wmh_lora.preprocess import to_model_grid
from wmh_lora.volume import Volume, write_nifti

STRUCTURES = ("wmh", "ventricles", "brain")


def real_folder(root: Path) -> Path:
    """A BIDS folder with one labelled scan, whose ventricles nobody drew."""
    rng = np.random.default_rng(0)
    shape = (64, 72, 8)
    grids = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in shape), indexing="ij")
    radius = np.sqrt(np.sum(np.square(grids), axis=0))
    brain = radius < 1.0
    scalp = (radius < 1.1) & ~brain
    data = np.where(brain, 100.0, np.where(scalp, 300.0, 1.0)) + rng.normal(0.0, 2.0, shape)
    mask = np.zeros(shape, dtype=np.uint8)
    mask[20:26, 30:36, 3:5] = 1
    data[mask > 0] = 180.0
    volume = Volume(data.astype(np.float32), np.diag([3.0, 3.0, 7.0, 1.0]))
    anat = root / "sub-01" / "anat"
    manual = root / "derivatives" / "manual" / "sub-01" / "anat"
    anat.mkdir(parents=True)
    manual.mkdir(parents=True)
    write_nifti(anat / "sub-01_FLAIR.nii.gz", volume.data, volume)
    write_nifti(manual / "sub-01_space-orig_label-WMH_mask.nii.gz", mask, volume)
    write_nifti(
        manual / "sub-01_space-orig_label-brain_mask.nii.gz", brain.astype(np.uint8), volume
    )
    return root


@pytest.fixture
def stream(tmp_path: Path) -> TrainingStream:
    config = DataConfig(
        root=str(real_folder(tmp_path)), real=(".",), lanes=2, real_lanes=2, crops_per_scan=3
    )
    return TrainingStream(config, 7, 64, PreprocessConfig(pixel_size_mm=2.0), STRUCTURES)


def test_a_sample_depends_on_seed_and_index_alone(stream: TrainingStream) -> None:
    in_order = [stream.item(i) for i in range(10)]
    fresh = TrainingStream(stream.config, 7, 64, stream.preprocess_config, STRUCTURES)
    for index in (9, 2, 7):  # another order, another process's history
        again = fresh.item(index)
        np.testing.assert_array_equal(again.image, in_order[index].image)
        np.testing.assert_array_equal(again.target, in_order[index].target)
    other = TrainingStream(stream.config, 8, 64, stream.preprocess_config, STRUCTURES)
    assert not np.array_equal(other.item(0).image, in_order[0].image)


def test_samples_have_the_network_s_shape_and_say_what_is_labelled(stream: TrainingStream) -> None:
    samples = [stream.item(i) for i in range(12)]
    for sample in samples:
        assert sample.image.shape == (3, 64, 64)
        assert sample.target.shape == (3, 64, 64)
        assert sample.image.dtype == sample.target.dtype == np.float32
        assert 0.0 <= sample.image.min() <= sample.image.max() <= 1.0
        assert sample.valid.tolist() == [True, False, True], "nobody drew the ventricles"
        assert not sample.target[1].any()
    with_lesion = [s for s in samples if s.target[0].max() > 0.5]
    assert len(with_lesion) >= 6
    for sample in with_lesion:
        lesion = sample.target[0] > 0.9
        if lesion.sum() > 4:
            brain = (sample.target[2] > 0.9) & (sample.target[0] < 0.1)
            assert sample.image[1][lesion].mean() > sample.image[1][brain].mean()


def test_every_source_file_is_listed(stream: TrainingStream, tmp_path: Path) -> None:
    manual = tmp_path / "derivatives" / "manual" / "sub-01" / "anat"
    assert set(stream.files()) == {
        tmp_path / "sub-01" / "anat" / "sub-01_FLAIR.nii.gz",
        manual / "sub-01_space-orig_label-WMH_mask.nii.gz",
        manual / "sub-01_space-orig_label-brain_mask.nii.gz",
    }


def test_voxels_without_a_number_are_dark(stream: TrainingStream, tmp_path: Path) -> None:
    image = tmp_path / "sub-01" / "anat" / "sub-01_FLAIR.nii.gz"
    volume = Volume.read(image)
    data = volume.data.copy()
    data[:3], data[40:44, 40:44, 4] = np.nan, np.inf
    write_nifti(image, data, volume, overwrite=True)
    read = read_masks(image, ()).volume.data
    np.testing.assert_array_equal(read, np.where(np.isfinite(data), data, 0.0))
    assert all(np.isfinite(stream.item(index).image).all() for index in range(6))


def test_a_mask_of_another_grid_is_refused(stream: TrainingStream, tmp_path: Path) -> None:
    manual = tmp_path / "derivatives" / "manual" / "sub-01" / "anat"
    path = manual / "sub-01_space-orig_label-brain_mask.nii.gz"
    mask = Volume.read(path)
    mirrored = mask.affine @ np.diag([-1.0, 1.0, 1.0, 1.0])
    mirrored[0, 3] = mask.affine[0, 0] * (mask.shape[0] - 1)  # the same place, stored backwards
    write_nifti(path, mask.data[::-1], Volume(mask.data[::-1], mirrored), overwrite=True)
    with pytest.raises(GridMismatchError, match=r"sub-01_FLAIR.*label-brain_mask.*mm apart"):
        stream.item(0)


def test_a_folder_of_scans_without_any_mask_is_refused(
    stream: TrainingStream, tmp_path: Path
) -> None:
    for mask in (tmp_path / "derivatives").rglob("*_label-brain_mask.nii.gz"):
        mask.unlink()
    stream.prepare()  # one mask is enough
    for mask in (tmp_path / "derivatives").rglob("*_mask.nii.gz"):
        mask.unlink()
    again = TrainingStream(stream.config, 7, 64, stream.preprocess_config, STRUCTURES)
    with pytest.raises(DataError) as caught:
        again.prepare()
    assert str(tmp_path) in str(caught.value)
    assert "no scan has a mask" in str(caught.value)
    assert "derivatives/manual/sub-*/anat" in str(caught.value)


def write_t1(root: Path) -> Path:
    """Lay beside the scan of `real_folder` its T1: finer, with another origin, the lesion dark."""
    spacing_mm, origin_mm = np.array([2.5, 2.5, 3.5]), np.array([-6.0, -4.0, -3.0])
    shape = (84, 96, 18)
    x, y, z = (
        (start + step * np.arange(n)).reshape([-1 if axis == k else 1 for k in range(3)]) / scale
        for axis, (start, step, n, scale) in enumerate(
            zip(origin_mm, spacing_mm, shape, (3.0, 3.0, 7.0), strict=True)
        )
    )  # in voxels of the FLAIR
    radius = 1.1 * np.sqrt((x / 31.5 - 1) ** 2 + (y / 35.5 - 1) ** 2 + (z / 3.5 - 1) ** 2)
    data = np.select([radius < 1.0, radius < 1.1], [200.0, 90.0], 1.0)
    inside = [(19.5, 25.5), (29.5, 35.5), (2.5, 4.5)]
    lesion = np.ones(shape, dtype=bool)
    for places, (low, high) in zip((x, y, z), inside, strict=True):
        lesion &= (places > low) & (places < high)
    data[lesion] = 60.0
    data += np.random.default_rng(1).normal(0.0, 2.0, shape)
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = origin_mm
    path = root / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    volume = Volume(data.astype(np.float32), affine)
    write_nifti(path, volume.data, volume)
    return path


def test_a_real_scan_s_t1_shows_the_same_place(stream: TrainingStream, tmp_path: Path) -> None:
    t1 = write_t1(tmp_path)
    config, shape = stream.config, stream.preprocess_config
    with_t1 = TrainingStream(config, 7, 64, shape, STRUCTURES, t1_channels=3)
    assert t1 in with_t1.files()
    assert t1 not in stream.files()
    seen = 0
    for index in range(24):
        sample = with_t1.item(index)
        assert sample.t1 is not None
        assert sample.t1.shape == (3, 64, 64)
        assert 0.0 <= sample.t1.min() <= sample.t1.max() <= 1.0
        lesion = sample.target[0] > 0.9
        around = (sample.target[2] > 0.9) & (sample.target[0] < 0.1)
        if lesion.sum() > 8:
            seen += 1
            assert sample.image[1][lesion].mean() > sample.image[1][around].mean()
            assert sample.t1[1][lesion].mean() < sample.t1[1][around].mean() - 0.1
    assert seen > 8


def test_synthetic_scans_come_with_a_t1_where_one_is_asked_for() -> None:
    config = DataConfig(lanes=1)
    shape = PreprocessConfig(pixel_size_mm=3.0)
    with_t1 = TrainingStream(config, 7, 64, shape, STRUCTURES, t1_channels=1)
    sample = with_t1.item(0)
    assert sample.t1 is not None
    assert sample.t1.shape == (1, 64, 64)
    assert sample.t1.std() > 0
    alone = TrainingStream(config, 7, 64, shape, STRUCTURES).item(0)
    assert alone.t1 is None
    np.testing.assert_array_equal(alone.target, sample.target)


def test_a_label_map_is_registered_once_and_again_where_its_contents_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def register(path: Path) -> Anatomy:
        read.append(path)
        return Anatomy(
            "head", np.zeros((4, 4, 4), np.uint8), np.zeros((3, 2, 2, 2), np.float32), True
        )

    monkeypatch.setattr("wmh_lora.data.anatomy_cache.head_anatomy", register)
    source = tmp_path / "maps" / "head.nii.gz"
    source.parent.mkdir()
    cache = tmp_path / "cache"
    config = DataConfig(root=str(tmp_path), labelmaps="maps", cache=str(cache))
    for contents in (b"one", b"one", b"another"):
        source.write_bytes(contents)
        TrainingStream(config, 0, 0, PreprocessConfig(), STRUCTURES).prepare()
    assert read == [source, source]
    assert len(list(cache.glob("head-*.npz"))) == 2


def test_lanes_change_scans_at_different_times() -> None:
    stream = TrainingStream(
        DataConfig(lanes=4, crops_per_scan=8), 0, 32, PreprocessConfig(), STRUCTURES
    )
    made: list[int] = []
    stream._make_scan = lambda rng, lane: made.append(lane)  # type: ignore[method-assign,assignment,return-value]
    stream._crop = lambda rng, scan: scan  # type: ignore[method-assign,assignment,return-value]
    changes = []
    for turn in range(24):
        before = len(made)
        for lane in range(4):
            stream.item(turn * 4 + lane)
        changes.append(len(made) - before)
    assert changes[0] == 4
    assert max(changes[1:]) == 1, "one new scan at a time keeps generation even"
    assert sum(changes[1:]) >= 10


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="real_lanes"):
        DataConfig(lanes=2, real_lanes=3, real=("x",))
    with pytest.raises(ConfigError, match=r"data\.real"):
        DataConfig(real_lanes=1)
    with pytest.raises(ConfigError, match=r"data\.real names.*data\.real_lanes = 0"):
        DataConfig(real=("x",))
    with pytest.raises(ConfigError, match=r"data\.crops_per_scan = 0 must be at least 1"):
        DataConfig(crops_per_scan=0)
    with pytest.raises(ConfigError, match="cache"):
        DataConfig(labelmaps="x")
    arguments = (0, 32, PreprocessConfig(), STRUCTURES)
    with pytest.raises(ConfigError, match="colour"):
        build_stream({"colour": 1}, *arguments)
    with pytest.raises(DataError, match="FLAIR"):
        build_stream({"root": str(tmp_path), "real": ["."], "real_lanes": 1}, *arguments)


def test_a_crop_keeps_image_and_target_together() -> None:
    image = np.zeros((3, 96, 80), dtype=np.float32)
    target = np.zeros((1, 96, 80), dtype=np.float32)
    image[:, 40:60, 30:50] = 0.8
    target[0, 40:60, 30:50] = 1.0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        for real in (False, True):
            crop, label, _ = augment_crop(rng, image, target, np.array([50.0, 40.0]), 64, real=real)
            assert crop.shape == (3, 64, 64)
            assert label.shape == (1, 64, 64)
            bright = crop[1] > 0.4
            inside = label[0] > 0.5
            overlap = 2 * (bright & inside).sum() / (bright.sum() + inside.sum())
            assert overlap > 0.85
    small, _, _ = augment_crop(
        np.random.default_rng(0),
        image[:, :40, :40],
        target[:, :40, :40],
        np.array([5.0, 5.0]),
        64,
        real=False,
    )
    assert small.shape == (3, 64, 64)


def test_scan_augmentation_keeps_the_grid_and_the_labels() -> None:
    rng = np.random.default_rng(0)
    data = rng.uniform(10, 200, (40, 44, 6)).astype(np.float32)
    brain = np.zeros(data.shape, dtype=np.float32)
    brain[8:32, 8:36, 1:5] = 1.0
    case = Case(Volume(data, np.diag([0.9, 0.9, 7.0, 1.0])), {"brain": brain})
    for seed, extracted in itertools.product(range(10), (False, True)):
        varied = augment_scan(np.random.default_rng(seed), case, extracted=extracted)
        assert varied.volume.shape == data.shape
        np.testing.assert_array_equal(varied.volume.affine, case.volume.affine)
        np.testing.assert_array_equal(varied.masks["brain"], brain)
        assert np.isfinite(varied.volume.data).all()
        assert bool((varied.volume.data[:4] == 0).all()) == extracted
        assert varied.volume.data[16:24, 16:24, 2:4].mean() > 0


def test_scan_augmentation_of_z_scores_keeps_what_lies_below_zero() -> None:
    rng = np.random.default_rng(1)
    inside = np.sum((np.indices((40, 44, 8)).T - (20, 22, 4)) ** 2 / (340, 420, 20), -1).T < 1
    tissue = rng.choice([20.0, 100.0, 130.0, 180.0], inside.shape, p=[0.15, 0.5, 0.3, 0.05])
    raw = np.where(inside, tissue + rng.normal(0.0, 3.0, inside.shape), 0.0)
    scores = np.where(inside, (raw - raw[inside].mean()) / raw[inside].std(), 0.0)
    for seed in range(5):
        plain, scored = (
            augment_scan(
                np.random.default_rng(seed),
                Case(Volume(values.astype(np.float32), np.diag([0.9, 0.9, 7.0, 1.0])), {}),
            ).volume.data[inside]
            for values in (raw, scores)
        )
        assert np.corrcoef(plain, scored)[0, 1] > 0.9
        white = [np.median(c) / np.percentile(c, 99) for c in (plain, scored)]
        assert white[1] > 0.6 * white[0]  # its z-score is below zero


@pytest.mark.parametrize("extracted_share", [0.0, 1.0])
def test_caps_are_left_open_in_scans_without_a_head_alone(
    tmp_path: Path, extracted_share: float
) -> None:
    root = real_folder(tmp_path)
    image = root / "sub-01" / "anat" / "sub-01_FLAIR.nii.gz"
    volume = Volume.read(image)
    ventricles = np.zeros(volume.shape, np.uint8)
    ventricles[28:36, 38:46, 3:5] = 1
    data = volume.data.copy()
    data[27:37, 37:47, 3:5] = 140.0  # a bright rim that nobody has drawn
    data[ventricles > 0] = 20.0
    write_nifti(image, data, volume, overwrite=True)
    manual = root / "derivatives" / "manual" / "sub-01" / "anat"
    write_nifti(manual / "sub-01_space-orig_label-ventricles_mask.nii.gz", ventricles, volume)
    config = DataConfig(
        root=str(root),
        real=(".",),
        lanes=1,
        real_lanes=1,
        crops_per_scan=2,
        cap_reach_mm=6.0,
        extracted_share=extracted_share,
    )
    stream = TrainingStream(config, 7, 64, PreprocessConfig(pixel_size_mm=3.0), STRUCTURES)
    open_pixels = sum(int(np.isnan(stream.item(i).target[0]).sum()) for i in range(12))
    assert (open_pixels > 0) == (extracted_share == 1.0)


def test_isotropic_scans_are_shown_in_other_planes_and_thick_ones_are_not() -> None:
    config = DataConfig(lanes=1, other_planes_share=1.0)
    thin = Volume(np.zeros((8, 8, 8), np.float32), np.eye(4))
    thick = Volume(np.zeros((8, 8, 8), np.float32), np.diag([1.0, 1.0, 5.0, 1.0]))
    stream = TrainingStream(config, 7, 64, PreprocessConfig(pixel_size_mm=1.0), STRUCTURES)
    shown = [stream._plane(np.random.default_rng(seed), thin) for seed in range(20)]
    assert set(shown) == {"coronal", "sagittal"}
    assert {stream._plane(np.random.default_rng(seed), thick) for seed in range(20)} == {None}
    usual = TrainingStream(DataConfig(lanes=1), 7, 64, PreprocessConfig(), STRUCTURES)
    assert usual._plane(np.random.default_rng(0), thin) is None


def test_scans_whose_lesions_cannot_be_seen_are_drawn_again() -> None:
    config = DataConfig(lanes=1, min_excess=0.3)
    stream = TrainingStream(config, 7, 64, PreprocessConfig(pixel_size_mm=3.0), STRUCTURES)
    excess = []
    for seed in range(4):
        case, prepared = stream.visible_case(np.random.default_rng(seed))
        lesions = to_model_grid(case.masks["wmh"], prepared) > 0.5
        if lesions.any():
            excess.append(float(np.median(prepared.slices[lesions])) / 0.4 - 1.0)
    assert excess
    assert min(excess) >= 0.3


@pytest.mark.parametrize(("min_excess", "draws"), [(0.0, 1), (0.2, 4)])
def test_patience_ends_and_nothing_is_asked_by_default(
    monkeypatch: pytest.MonkeyPatch, min_excess: float, draws: int
) -> None:
    config = DataConfig(lanes=1, min_excess=min_excess)
    stream = TrainingStream(config, 7, 64, PreprocessConfig(pixel_size_mm=3.0), STRUCTURES)
    case = stream.synthetic_case(np.random.default_rng(0))
    dark = {**case.masks, "wmh": case.masks["ventricles"]}
    drawn: list[Case] = []

    def draw(rng: np.random.Generator) -> Case:
        drawn.append(Case(case.volume, dark))
        return drawn[-1]

    monkeypatch.setattr(stream, "synthetic_case", draw)
    assert stream.visible_case(np.random.default_rng(0))[0] is drawn[-1]
    assert len(drawn) == draws
