"""Which figures an evaluation gets, with their captions, and which scans are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from wmh_lora.errors import ConfigError
from wmh_lora.evaluation.cohort import Case, match_scans
from wmh_lora.evaluation.layouts import find_scans
from wmh_lora.evaluation.masks import challenge_masks
from wmh_lora.report.error_maps import Example, example_slice, predictions_grid
from wmh_lora.report.evaluation import MAIN_MEASURES, Evaluation
from wmh_lora.report.figures import Series, bland_altman, boxes, correlation
from wmh_lora.volume import Volume

__all__ = ["FIGURES", "draw_figures", "example_of", "images_of", "shown_cases"]

#: Caption by the stem of the figure's files.
FIGURES: dict[str, str] = {
    "bland_altman": "Bland-Altman plot of lesion volumes: bias (solid) and 95 % limits of "
    "agreement (dashed), with their 95 % intervals (bars).",
    "correlation": "Predicted against reference volume, with the line of identity.",
    "groups": "The challenge's measures by group: box, median and every scan; whiskers reach to "
    "the last scan within 1.5 box lengths.",
    "predictions": "Slices with most lesion. Errors: found by both (bright), missed (middle), "
    "false (dark).",
}


def draw_figures(evaluation: Evaluation, examples: Sequence[Example] = ()) -> dict[str, Figure]:
    """Draw every figure that the evaluation has something for.

    Parameters
    ----------
    evaluation : Evaluation
        With at least one case.
    examples : sequence of Example
        Slices of single scans, see `example_of`.

    Returns
    -------
    dict
        Figure by a key of `FIGURES`.
    """
    volumes = [
        Series(
            name,
            [case.metrics.reference_ml for case in evaluation.of(name)],
            [case.metrics.prediction_ml for case in evaluation.of(name)],
        )
        for name in evaluation.series
    ]
    groups = [
        (label, [[getattr(case.metrics, m.key) for case in cases] for m in MAIN_MEASURES])
        for label, cases in _groups(evaluation)
    ]
    figures = {
        "bland_altman": bland_altman(volumes),
        "correlation": correlation(volumes),
        "groups": boxes(MAIN_MEASURES, groups),
    }
    if examples:
        figures["predictions"] = predictions_grid(examples)
    return figures


def example_of(case: Case, image: Path, *, with_series: bool) -> Example:
    """Read a scored scan and its image, and cut out the slice to show.

    Parameters
    ----------
    case : Case
        The scan.
    image : Path
        Its FLAIR.
    with_series : bool
        Name the series in the title.

    Raises
    ------
    UnreadableImageError
        The image cannot be read.
    GridMismatchError
        It does not have the shape of the masks.
    """
    reference, prediction = (
        Volume.read(file.path, allow_constant=True).data
        for file in (case.pair.reference, case.pair.prediction)
    )
    series = f"{case.pair.series}: " if with_series else ""
    title = f"{series}{case.pair.name}, Dice {case.metrics.dice:.3f}"
    return example_slice(title, Volume.read(image), *challenge_masks(reference, prediction))


def images_of(evaluation: Evaluation, series: str, folder: Path) -> dict[Path, Path]:
    """Find the FLAIR of each scored scan of a series.

    Returns
    -------
    dict
        Image by the path of the reference; scans without an image are left out.

    Raises
    ------
    DataError
        The folder holds no image.
    """
    references = [case.pair.reference for case in evaluation.of(series)]
    matches, _, _ = match_scans(find_scans(folder, "image"), references)
    return {reference.path: image.path for image, reference in matches}


def shown_cases(
    evaluation: Evaluation, images: Mapping[Path, Path], names: Sequence[str] = ()
) -> list[Case]:
    """Choose the scans to show.

    Parameters
    ----------
    evaluation : Evaluation
        What was scored.
    images : mapping
        FLAIR by the path of the reference; the scans that can be shown.
    names : sequence of str
        Scans to show; by default the worst, the middle and the best by Dice, or of two methods the
        worst and the best of the first.

    Raises
    ------
    ConfigError
        A name is not that of a scored scan with an image.
    """
    able = [case for case in evaluation.cases if case.pair.reference.path in images]
    if names:
        missing = sorted(set(names) - {case.pair.name for case in able})
        if missing:
            known = ", ".join(sorted({case.pair.name for case in able})[:10]) or "none"
            raise ConfigError(
                f"Cannot show {', '.join(missing)}: no scored scan with an image has that name. "
                f"There are: {known}."
            )
        return [case for name in names for case in able if case.pair.name == name]
    of_methods = evaluation.kind == "methods"
    ranked = sorted(
        (
            case
            for case in able
            if not np.isnan(case.metrics.dice)
            and not (of_methods and case.pair.series != evaluation.series[0])
        ),
        key=lambda case: (case.metrics.dice, case.pair.name),
    )
    if not ranked:
        return []
    middle = set() if of_methods else {len(ranked) // 2}
    chosen = [ranked[place] for place in sorted({0, len(ranked) - 1} | middle)]
    if not of_methods:
        return chosen
    files = [case.pair.reference.path for case in chosen]
    return [case for file in files for case in able if case.pair.reference.path == file]


def _groups(evaluation: Evaluation) -> list[tuple[str, list[Case]]]:
    """Return sites where one series has them, else the series."""
    if evaluation.kind != "single":
        return [(name, evaluation.of(name)) for name in evaluation.series]
    (only,) = evaluation.series
    sites = sorted({case.pair.site for case in evaluation.cases}, key=lambda name: (not name, name))
    if sites == [""]:
        return [(only, list(evaluation.cases))]
    return [
        (site or "n/a", [case for case in evaluation.cases if case.pair.site == site])
        for site in sites
    ]
