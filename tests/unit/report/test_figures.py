"""Figures are files that repeat, whose text is text, and which survive odd data."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from wmh_lora.errors import DataError, GridMismatchError
from wmh_lora.evaluation.measures import MEASURES
from wmh_lora.report.error_maps import example_slice, predictions_grid
from wmh_lora.report.figures import (
    Series,
    bland_altman,
    boxes,
    correlation,
    save_figure,
    threshold_curve,
)
from wmh_lora.volume import Volume

SERIES = Series("Utrecht", [1.0, 4.0, 9.0, 20.0], [1.5, 3.0, 10.0, 18.0])
THRESHOLDS = np.linspace(0.1, 0.9, 9)


def curve() -> Figure:
    mean = 0.8 - (THRESHOLDS - 0.5) ** 2
    return threshold_curve(THRESHOLDS, mean, mean - 0.05, mean + 0.05, 0.5)


def scan() -> tuple[Volume, np.ndarray, np.ndarray]:
    image = np.zeros((30, 40, 5), np.float32)
    image[5:25, 5:35] = 100.0
    reference = np.zeros(image.shape, bool)
    reference[10:14, 10:14, 3] = True
    return Volume(image, np.diag([1.0, 1.0, 5.0, 1.0])), reference, np.roll(reference, 1, 0)


FIGURES: dict[str, Callable[[], Figure]] = {
    "bland_altman": lambda: bland_altman([SERIES]),
    "correlation": lambda: correlation([SERIES] * 3),
    "boxes": lambda: boxes(MEASURES[:2], [("A", [[0.1, 0.9], [3.0, 4.0]]), ("B", [[0.5], [2.0]])]),
    "predictions": lambda: predictions_grid([example_slice("01", *scan())]),
    "threshold": curve,
}


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering for print takes time, and shows nothing that is tested here."""
    monkeypatch.setattr("wmh_lora.report.figures._PRINT_DPI", 40)


@pytest.mark.parametrize("name", ["bland_altman", "boxes", "predictions"])
def test_files_repeat_and_hold_text(tmp_path: Path, name: str) -> None:
    contents = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        png, svg = save_figure(FIGURES[name](), tmp_path / folder / name)
        contents.append((png.read_bytes(), svg.read_bytes()))
    assert contents[0] == contents[1]
    text = contents[0][1].decode("utf-8")
    assert "<text" in text
    assert "<dc:date>" not in text
    assert re.search(rb"matplotlib", contents[0][0], re.IGNORECASE) is None


@pytest.mark.parametrize("name", list(FIGURES))
def test_letters_are_large_enough_for_print(name: str) -> None:
    figure = FIGURES[name]()
    sizes = [float(text.get_fontsize()) for text in figure.findobj(Text) if text.get_text()]
    assert min(sizes) >= 8.0
    assert figure.get_figwidth() <= 7.0  # inches: the width of a page without its margins


def test_existing_files_are_kept(tmp_path: Path) -> None:
    save_figure(curve(), tmp_path / "a")
    with pytest.raises(DataError, match="exists already"):
        save_figure(curve(), tmp_path / "a")
    save_figure(curve(), tmp_path / "a", overwrite=True)


@pytest.mark.parametrize(
    "volumes", [[], [0.0], [0.0, 0.0], [1.0, 1.0, 1.0]], ids=["none", "one", "empty", "equal"]
)
def test_odd_volumes(volumes: list[float]) -> None:
    series = [Series("x", volumes, volumes), SERIES]
    bland_altman(series).draw_without_rendering()
    correlation(series).draw_without_rendering()


def test_boxes_leave_out_what_is_undefined() -> None:
    figure = boxes(MEASURES[:1], [("A", [[math.nan, 0.5]]), ("B", [[math.nan]])])
    offsets = [len(np.asarray(points.get_offsets())) for points in figure.axes[0].collections]
    assert offsets == [1]


class TestExample:
    def test_shows_the_slice_with_most_lesion_the_right_way_round(self) -> None:
        volume, reference, prediction = scan()
        example = example_slice("01", volume, reference, prediction)
        assert example.reference.sum() == 16
        assert (example.reference & example.prediction).sum() == 12
        # one voxel to the right of the patient is one column to the left of the reader
        columns = [
            np.flatnonzero(m.any(axis=0))[0] for m in (example.reference, example.prediction)
        ]
        assert columns[0] - columns[1] == 1
        assert example.pixel_mm == (1.0, 1.0)

    def test_shows_the_slice_with_most_errors(self) -> None:
        volume = Volume(np.random.default_rng(0).random((20, 20, 4), np.float32), np.eye(4))
        reference, prediction = np.zeros((2, *volume.shape), bool)
        reference[4:12, 4:12, 1] = prediction[4:12, 4:12, 1] = True
        reference[4:8, 4:8, 2] = True
        assert example_slice("01", volume, reference, prediction).prediction.any()
        wrong = example_slice("01", volume, reference, prediction, most="errors")
        assert wrong.reference.sum() == 16
        assert not wrong.prediction.any()

    def test_empty_masks_and_an_empty_image(self) -> None:
        volume = Volume(np.zeros((20, 20, 4), np.float32), np.eye(4))
        empty = np.zeros(volume.shape, bool)
        predictions_grid([example_slice("x", volume, empty, empty)])

    def test_another_grid(self) -> None:
        volume, reference, prediction = scan()
        with pytest.raises(GridMismatchError, match="01"):
            example_slice("01", volume, reference[:-1], prediction)


def test_names_with_dollar_signs_are_no_formulas() -> None:
    pairs = Series("cost$\\bad$ a_$x$_b", [1.0, 2.0, 3.0], [1.1, 2.2, 2.9])
    for figure in (bland_altman([pairs]), correlation([pairs])):
        svg = io.BytesIO()
        figure.savefig(svg, format="svg")
        assert b"cost$" in svg.getvalue()
