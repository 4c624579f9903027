"""Predictions and references of a cohort: pairing their files, and scoring pair by pair."""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from wmh_lora.errors import ConfigError, DataError, GridMismatchError
from wmh_lora.evaluation.layouts import ScanFile, find_scans_and_rest
from wmh_lora.evaluation.masks import check_labels
from wmh_lora.evaluation.metrics import ChallengeMetrics, evaluate
from wmh_lora.files import read_tsv
from wmh_lora.logs import collect_warnings
from wmh_lora.volume import Volume, corners_apart_mm

__all__ = [
    "Case",
    "Pair",
    "Pairing",
    "Unpaired",
    "evaluate_pair",
    "evaluate_pairs",
    "match_scans",
    "pair_folders",
    "read_participants",
]

#: Largest difference between two affines, in any of their elements, that passes without a note.
AFFINE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Pair:
    """A prediction and the reference that it is scored against.

    Attributes
    ----------
    series : str
        The cohort, or the method where two are compared.
    prediction, reference : ScanFile
        The two files.
    site : str
        Centre or scanner; empty where it is not known.
    """

    series: str
    prediction: ScanFile
    reference: ScanFile
    site: str = ""

    @property
    def name(self) -> str:
        """Name of the scan, the same for every prediction of it."""
        return self.reference.name

    @property
    def subject_key(self) -> str:
        """Subject, told apart from subjects of other sites that have the same label."""
        site = self.reference.site or self.prediction.site
        return f"{site}/{self.reference.subject}" if site else self.reference.subject

    @property
    def session(self) -> str:
        """Label of the visit, from whichever file tells it."""
        return self.reference.session or self.prediction.session


@dataclass(frozen=True)
class Unpaired:
    """A file without a counterpart: its series, what it was to be, and why it was left out."""

    series: str
    role: str
    path: Path
    reason: str


@dataclass(frozen=True)
class Pairing:
    """All files of two folders: either in a pair, or named as unpaired."""

    pairs: list[Pair]
    unpaired: list[Unpaired]


_ALONE = "no counterpart"
_SEVERAL = "several possible counterparts"
_OTHERWISE = "named otherwise than the others"


@dataclass(frozen=True)
class Case:
    """A scored pair.

    Attributes
    ----------
    pair : Pair
        What was compared.
    metrics : ChallengeMetrics
        On the geometry of the reference, as the challenge does.
    grid_note : str
        How the two affines differ; empty where they agree.
    note : str
        What else a reader should know; empty as a rule.
    """

    pair: Pair
    metrics: ChallengeMetrics
    grid_note: str = ""
    note: str = ""


def pair_folders(
    series: str,
    predictions: Path,
    references: Path,
    *,
    layout: str = "auto",
    sites: Mapping[str, str] | None = None,
) -> Pairing:
    """Find the masks in two folders and pair them by subject, session and scan.

    Parameters
    ----------
    series : str
        Name of the cohort or method.
    predictions, references : Path
        Folders, each in any layout of `wmh_lora.evaluation.layouts`.
    layout : str
        Of the references; the predictions' is found out, as tools write their own.
    sites : mapping, optional
        Site by subject, see `read_participants`; where it tells a site, the layout does not count.

    Raises
    ------
    DataError
        A folder holds no mask, or nothing in one belongs to anything in the other.
    """
    reference, rest = find_scans_and_rest(references, "mask", layout)
    paired = pair_with(series, predictions, reference, f"in {references}", sites=sites)
    unpaired = [Unpaired(series, "reference", path, _OTHERWISE) for path in rest]
    return Pairing(paired.pairs, paired.unpaired + unpaired)


def pair_with(
    series: str,
    predictions: Path,
    references: Sequence[ScanFile],
    whence: str,
    *,
    sites: Mapping[str, str] | None = None,
) -> Pairing:
    """Find the masks in a folder and pair them with references that are known.

    Parameters
    ----------
    series, predictions, sites
        See `pair_folders`.
    references : sequence of ScanFile
        At least one.
    whence : str
        Where they are, for messages: "in masks/".

    Raises
    ------
    DataError
        The folder holds no mask, or none that belongs to a reference.
    """
    predicted, rest = find_scans_and_rest(predictions, "mask")
    matches, left, right = match_scans(predicted, references)
    if not matches:
        raise DataError(
            f"No prediction in {predictions} belongs to a reference {whence}: "
            + why_none_match(left, right)
        )
    sites = sites or {}
    pairs = [
        Pair(series, p, r, site=sites.get(r.bare_subject) or r.site or p.site) for p, r in matches
    ]
    unpaired = [Unpaired(series, "prediction", f.path, why) for f, why in left]
    unpaired += [Unpaired(series, "reference", f.path, why) for f, why in right]
    unpaired += [Unpaired(series, "prediction", path, _OTHERWISE) for path in rest]
    return Pairing(pairs, unpaired)


def why_none_match(
    left: Sequence[tuple[ScanFile, str]], right: Sequence[tuple[ScanFile, str]]
) -> str:
    """Say why `match_scans` left every file alone, and what to do."""
    others = [(file, why) for file, why in (*left, *right) if why not in (_ALONE, _SEVERAL)]
    if others:  # what leaves the other side with several counterparts
        file, why = others[0]
        return f"{file.path}: {why}. Keep one file for each scan, or name a folder that does."
    names = (", ".join(repr(f.name) for f, _ in side[:3]) for side in (left, right))
    return (
        f"the first names are {' and '.join(names)}. Files are paired by subject, session and "
        "scan; rename them, or name the references' layout."
    )


def match_scans(
    first: Sequence[ScanFile], second: Sequence[ScanFile]
) -> tuple[list[tuple[ScanFile, ScanFile]], list[tuple[ScanFile, str]], list[tuple[ScanFile, str]]]:
    """Match files of the same scan, each with one other.

    Two files may match when their subjects are equal and session, scan and site are equal as far
    as both tell them. Files that agree in everything are matched first; of the rest, those that
    have one possible counterpart which has no other.

    Returns
    -------
    matches : list of pairs
        In the order of the second's names.
    left, right : lists of (ScanFile, reason)
        Files of the first and of the second that stay alone, and why.
    """
    groups: defaultdict[str, tuple[list[ScanFile], list[ScanFile]]] = defaultdict(lambda: ([], []))
    for side, files in enumerate((first, second)):
        for file in files:
            groups[file.bare_subject][side].append(file)
    matches: list[tuple[ScanFile, ScanFile]] = []
    alone: tuple[list[tuple[ScanFile, str]], list[tuple[ScanFile, str]]] = ([], [])
    for lefts, rights in groups.values():
        for agree in (_identical, _compatible):
            pairs = _unique_pairs(lefts, rights, agree)
            matches += pairs
            lefts = [a for a in lefts if all(a is not p for p, _ in pairs)]
            rights = [b for b in rights if all(b is not r for _, r in pairs)]
        for rest, own, others in ((alone[0], lefts, rights), (alone[1], rights, lefts)):
            rest += [(file, _reason_alone(file, own, others)) for file in own]
    matches.sort(key=lambda match: (match[1].site, match[1].name))
    return matches, alone[0], alone[1]


def evaluate_pair(pair: Pair) -> Case:
    """Read the two masks of a pair and score them.

    As in the challenge, only the shapes must agree, and the reference's geometry is used; affines
    that differ by more than `AFFINE_TOLERANCE` are noted.

    Raises
    ------
    UnreadableImageError
        A file cannot be read.
    GridMismatchError
        The two shapes differ.
    DataError
        The reference holds other values than 0, 1 and 2.
    """
    with collect_warnings() as notes:
        reference = Volume.read(pair.reference.path, allow_constant=True)
        prediction = Volume.read(pair.prediction.path, allow_constant=True)
    if reference.shape != prediction.shape:
        raise GridMismatchError(
            f"{pair.prediction.path} has shape {prediction.shape}, but its reference "
            f"{pair.reference.path} has {reference.shape}; resample the prediction to the "
            "reference's grid."
        )
    check_labels(pair.reference.path, reference.data)
    values = prediction.data[prediction.data != 0]
    values = values[np.isfinite(values)]
    if np.any(values != np.rint(values)):
        notes.append("the prediction holds fractions; voxels from 0.5 on count as lesion")
    elif len(labels := np.unique(values)) > 1:
        shown = ", ".join(f"{label:g}" for label in labels[:5])
        notes.append(
            f"the prediction holds several labels ({shown}); all from 1 on count as lesion"
        )
    return Case(
        pair=pair,
        metrics=evaluate(reference.data, prediction.data, reference.spacing_mm),
        grid_note=_grid_note(reference, prediction),
        note="; ".join(notes),
    )


def evaluate_pairs(
    pairs: Sequence[Pair], *, jobs: int = 1
) -> Iterator[tuple[Pair, Callable[[], Case]]]:
    """Score pairs, in their order.

    Parameters
    ----------
    pairs : sequence of Pair
        What to score.
    jobs : int
        Processes; 1 works in this one.

    Yields
    ------
    pair, outcome
        Calling `outcome` returns the case, or raises what `evaluate_pair` raised: a pair that
        fails does not stop the others.
    """
    if jobs == 1:
        for pair in pairs:
            yield pair, partial(evaluate_pair, pair)
        return
    # Not forked: threads of numerical libraries do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, max(1, len(pairs))), mp_context=context) as pool:
        futures = [pool.submit(evaluate_pair, pair) for pair in pairs]
        try:
            for pair, future in zip(pairs, futures, strict=True):
                wait([future])
                yield pair, future.result
        finally:
            for future in futures:
                future.cancel()


def read_participants(path: Path, column: str = "site") -> dict[str, str]:
    """Read each subject's site from a BIDS ``participants.tsv``.

    Parameters
    ----------
    path : Path
        Tab-separated, with a column ``participant_id`` (``sub-`` in front may be missing).
    column : str
        Which column tells the site.

    Returns
    -------
    dict
        Site by subject label, without ``sub-``; subjects of unknown site (``n/a``) are left out.

    Raises
    ------
    ConfigError
        The file cannot be read, or lacks a column.
    """
    try:
        rows = read_tsv(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Cannot read {path}: {error}; give a tab-separated text file."
        ) from error
    present = set(rows[0]) if rows else set()
    for needed in ("participant_id", column):
        if needed not in present:
            raise ConfigError(
                f"{path} has no column {needed!r}, only {sorted(map(str, present))}; it must be "
                "tab-separated with a header line and at least one row."
            )
    return {
        (row["participant_id"] or "").removeprefix("sub-"): row[column]
        for row in rows
        if row[column] not in (None, "", "n/a")
    }


def _grid_note(reference: Volume, prediction: Volume) -> str:
    difference = np.abs(reference.affine - prediction.affine)
    if difference.max() <= AFFINE_TOLERANCE:
        return ""
    apart_mm = corners_apart_mm(reference, prediction)
    return (
        f"affines differ by up to {difference.max():.3g}; equal voxels lie up to {apart_mm:.3g} "
        "mm apart"
    )


def _identical(a: ScanFile, b: ScanFile) -> bool:
    return (a.session, a.scan, a.site) == (b.session, b.scan, b.site)


def _compatible(a: ScanFile, b: ScanFile) -> bool:
    """Agree as far as both tell; a site may be told with or without the folders above it."""
    sites = f"/{a.site}".endswith(f"/{b.site}") or f"/{b.site}".endswith(f"/{a.site}")
    pairs = ((a.session, b.session), (a.scan, b.scan))
    return (sites or not (a.site and b.site)) and all(x == y or not (x and y) for x, y in pairs)


def _unique_pairs(
    lefts: Sequence[ScanFile],
    rights: Sequence[ScanFile],
    agree: Callable[[ScanFile, ScanFile], bool],
) -> list[tuple[ScanFile, ScanFile]]:
    pairs = []
    for left in lefts:
        partners = [right for right in rights if agree(left, right)]
        if len(partners) == 1 and sum(agree(other, partners[0]) for other in lefts) == 1:
            pairs.append((left, partners[0]))
    return pairs


def _reason_alone(file: ScanFile, own: Sequence[ScanFile], others: Sequence[ScanFile]) -> str:
    if not any(_compatible(file, other) for other in others):
        return _ALONE
    rivals = [other.path.name for other in own if other is not file and _compatible(other, file)]
    if rivals:
        return f"several files for one scan, such as {rivals[0]}"
    return _SEVERAL
