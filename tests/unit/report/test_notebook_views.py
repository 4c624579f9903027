"""A result as tables, figure and page, as a notebook shows it."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from tests.processes import fresh_python
from tests.reported_scans import segmented_head
from wmh_lora.errors import ConfigError, DataError, GridMismatchError
from wmh_lora.postprocess import describe_lesions
from wmh_lora.report.frames import LESION_COLUMNS
from wmh_lora.report.html import scan_html
from wmh_lora.report.outputs import Segmentation
from wmh_lora.report.scan_figure import outline, scan_figure
from wmh_lora.report.tables import COHORT_COLUMNS, cohort_row, cohort_table
from wmh_lora.volume import Volume


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Segmentation:
    return segmented_head(tmp_path_factory.mktemp("scan"))


@pytest.fixture(scope="module")
def nothing(found: Segmentation) -> Segmentation:
    empty = np.zeros_like(found.mask)
    return replace(found, mask=empty, lesions=(), volume_ml=0.0)


def test_lesions_frame_says_what_the_report_says(found: Segmentation) -> None:
    frame = found.lesions_frame()
    assert frame.index.tolist() == [1, 2]
    assert frame.index.name == "lesion"
    assert frame["volume_ml"].sum() == pytest.approx(found.volume_ml)
    report = found.report()
    for (_, row), lesion, place in zip(
        frame.iterrows(), report["lesions"], report["regions"]["lesions"], strict=True
    ):
        centre = [row[f"centre_{axis}_mm"] for axis in ("right", "anterior", "superior")]
        assert centre == pytest.approx(lesion["centroid_mm"], abs=0.01)
        extent = [row[f"extent_{axis}_mm"] for axis in ("right", "anterior", "superior")]
        assert extent == pytest.approx(lesion["extent_mm"], abs=0.01)
        assert row["voxels"] == lesion["voxels"]
        for name in place.keys() - {"index"}:
            expected = place[name]
            if expected is None:
                assert pandas.isna(row[name]), name
            else:
                wanted = (
                    expected if isinstance(expected, str) else pytest.approx(expected, abs=1e-5)
                )
                assert row[name] == wanted, name


def test_every_column_of_lengths_and_volumes_names_its_unit() -> None:
    plain = {"voxels", "region", "mean_probability", "max_probability", "mean_uncertainty"}
    assert {c for c in LESION_COLUMNS if not c.endswith(("_mm", "_ml"))} <= plain | {
        "distance_to_ventricles_mm"
    }


def test_unknown_is_missing_and_types_do_not_depend_on_the_scan(
    found: Segmentation, nothing: Segmentation
) -> None:
    bare = replace(found, structure_masks={}, uncertainty=None)
    frames = [found.lesions_frame(), bare.lesions_frame(), nothing.lesions_frame()]
    for frame in frames:
        assert {name: str(kind) for name, kind in frame.dtypes.items()} == dict(LESION_COLUMNS)
    unknown = ["region", "distance_to_ventricles_mm", "mean_uncertainty"]
    assert frames[1][unknown].isna().all(axis=None)
    assert frames[2].shape == (0, len(LESION_COLUMNS))
    assert pandas.concat(frames).shape[0] == 4


def test_summary_frame_is_the_row_that_a_folder_run_writes(
    found: Segmentation, nothing: Segmentation
) -> None:
    for result in (found, nothing):
        frame = result.summary_frame()
        assert tuple(frame.columns) == COHORT_COLUMNS
        assert frame["lesion_count"].tolist() == [len(result.lesions)]
        table = io.StringIO(cohort_table([cohort_row("sub-01", result.report())]))
        plain = pandas.read_csv(table, sep="\t")
        for column in COHORT_COLUMNS:
            value, expected = frame[column][0], plain[column][0]
            assert pandas.isna(value) if pandas.isna(expected) else value == expected, column


def test_names_that_look_like_numbers_stay_names(tmp_path: Path) -> None:
    row = segmented_head(tmp_path, name="007_FLAIR.nii.gz").summary_frame().iloc[0]
    assert (row["scan"], row["file"]) == ("007", "007_FLAIR.nii.gz")
    in_memory = segmented_head().summary_frame().iloc[0]
    assert in_memory["scan"] == "scan"
    assert pandas.isna(in_memory["file"])


def test_plot_outlines_every_lesion_of_the_slices_it_shows(found: Segmentation) -> None:
    figure = found.plot(reference=found.mask, max_slices=6, columns=3)
    assert isinstance(figure, Figure)
    edges = {}
    for axes in figure.axes:
        slice_index = int(axes.get_title().removeprefix("k = "))
        blue, orange = (c for c in axes.collections if isinstance(c, LineCollection))
        assert len(blue.get_segments()) == len(orange.get_segments())
        edges[slice_index] = len(orange.get_segments())
    padded = np.pad(found.mask.astype(int), 1)
    for k in range(found.mask.shape[2]):
        plane = padded[:, :, k + 1]
        border = np.abs(np.diff(plane, axis=0)).sum() + np.abs(np.diff(plane, axis=1)).sum()
        assert edges.get(k, 0) == border


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SRA"])
def test_plot_names_the_slice_of_the_array(found: Segmentation, codes: str) -> None:
    """Whatever way the scan is stored, the named index is where its lesion is."""
    image = nib.nifti1.Nifti1Image(found.volume.data, found.volume.affine)
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(codes))
    turned = Volume.from_nibabel(image.as_reoriented(turn))
    mask = nib.nifti1.Nifti1Image(found.mask, found.volume.affine).as_reoriented(turn).get_fdata()
    figure = scan_figure(turned, mask, title=codes)
    axis = "ijk".index(figure.axes[0].get_title()[0])
    for axes in figure.axes:
        plane = mask.take(int(axes.get_title().split(" = ")[1]), axis=axis)
        (lines,) = (c for c in axes.collections if isinstance(c, LineCollection))
        assert bool(lines.get_segments()) == plane.any()


def test_outline_runs_along_pixels() -> None:
    shape = np.zeros((3, 4), bool)
    shape[1, 2] = True
    edges = {tuple(sorted(map(tuple, edge))) for edge in outline(shape).tolist()}
    assert edges == {
        ((1.5, 0.5), (2.5, 0.5)),
        ((1.5, 1.5), (2.5, 1.5)),
        ((1.5, 0.5), (1.5, 1.5)),
        ((2.5, 0.5), (2.5, 1.5)),
    }


def test_plot_of_a_scan_without_lesions(nothing: Segmentation) -> None:
    assert len(nothing.plot(max_slices=3).axes) == 3


def test_plot_refuses_what_cannot_be_drawn(found: Segmentation) -> None:
    with pytest.raises(GridMismatchError, match="figure needs both"):
        found.plot(reference=found.mask[:-1])
    with pytest.raises(ConfigError, match="at least one slice"):
        found.plot(columns=0)


def test_jupyter_shows_figure_and_result_without_pyplot(found: Segmentation) -> None:
    shown = DisplayFormatter(active_types=["image/png", "text/html", "text/plain"])
    content, _ = shown.format(found.plot(max_slices=2))
    with Image.open(io.BytesIO(content["image/png"])) as picture:
        assert picture.width > 300
    content, _ = shown.format(found)
    assert content["text/plain"] == (
        f"<Segmentation of sub-01_FLAIR.nii.gz: {found.volume_ml:.2f} mL in 2 lesions; "
        "48 x 56 x 6 voxels>"
    )
    assert f"{found.volume_ml:.2f} mL in 2 lesions" in content["text/html"]


def test_card_is_small_fetches_nothing_and_escapes(found: Segmentation) -> None:
    hostile = "<script>alert(1)</script>"
    card = replace(found, warnings=(hostile,))._repr_html_()
    assert len(card) < 150_000
    assert hostile not in card
    assert "&lt;script&gt;" in card
    assert not re.search(r"https?:|<script|<style|<link", card)
    (encoded,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', card)
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        assert picture.width <= 720
    assert "periventricular" in json.dumps(found.report())
    assert "Within 10 mm of the ventricles" in card


def test_card_of_a_result_without_lesions_or_structures(nothing: Segmentation) -> None:
    card = replace(nothing, structure_masks={}, uncertainty=None)._repr_html_()
    assert "0.00 mL in 0 lesions" in card
    assert "Largest" not in card


def test_page_is_that_of_the_command_line(tmp_path: Path, found: Segmentation) -> None:
    target = found.save_html(tmp_path / "page.html")
    assert target.read_text(encoding="utf-8") == scan_html(found, found.report())
    with pytest.raises(DataError, match="exists"):
        found.save_html(target)
    found.save_html(target, overwrite=True)


def test_missing_library_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, found: Segmentation
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for ask in (found.lesions_frame, found.summary_frame):
        with pytest.raises(ConfigError, match=r"needs pandas.*wmh-lora\[tables\]"):
            ask()
    with pytest.raises(ConfigError, match=r"needs matplotlib.*wmh-lora\[evaluate\]"):
        found.plot()


def test_inference_does_not_load_them() -> None:
    finished = fresh_python(
        "import sys, wmh_lora.engine, wmh_lora.report.outputs as o; repr(o.Segmentation);"
        "print([n for n in ('pandas', 'matplotlib', 'jinja2', 'IPython') if n in sys.modules])"
    )
    assert finished.stdout.strip() == "[]", finished.stderr


def test_lesions_of_the_frame_are_those_of_the_mask(found: Segmentation) -> None:
    again = describe_lesions(found.mask, found.volume.affine)
    assert found.lesions_frame()["volume_ml"].tolist() == [lesion.volume_ml for lesion in again]
