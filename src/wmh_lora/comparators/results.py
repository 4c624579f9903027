"""What one method gave in one fold: kept as JSON, so that a stopped comparison goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wmh_lora.config_reading import from_dict, to_dict
from wmh_lora.data.manifest import Manifest, Scan
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.evaluation.cohort import Case, Pair
from wmh_lora.evaluation.layouts import ScanFile
from wmh_lora.evaluation.metrics import ChallengeMetrics
from wmh_lora.files import open_atomic

__all__ = ["FoldResult", "ScoredScan", "case_of", "pair_of", "read_result", "write_result"]

_FORMAT = 1


@dataclass(frozen=True)
class ScoredScan:
    """One test scan.

    Attributes
    ----------
    scan
        Name in the manifest.
    mask
        Path of the predicted mask, below the comparison's folder.
    inference_seconds
        From the image in memory to the probability map, by the budget's clock.
    metrics
        By the names of `wmh_lora.evaluation.metrics.ChallengeMetrics`; None is undefined.
    grid_note
        How the affines of mask and reference differ, where they do.
    """

    scan: str
    mask: str
    inference_seconds: float
    metrics: Mapping[str, float | None]
    grid_note: str = ""


@dataclass(frozen=True)
class FoldResult:
    """One method in one fold.

    Attributes
    ----------
    fold, method
        Names.
    parameters, members
        Trained parameters, of all members together, and networks that are averaged.
    steps
        Optimiser steps of each member.
    training_seconds
        Of all members together, by the budget's clock.
    threshold, min_voxels
        As chosen on the validation part.
    validation_dice
        Mean over people with these settings.
    note
        What else a reader should know.
    scans
        The test part.
    """

    fold: str
    method: str
    parameters: int
    members: int
    steps: tuple[int, ...]
    training_seconds: float
    threshold: float
    min_voxels: int
    validation_dice: float
    note: str
    scans: tuple[ScoredScan, ...]


def write_result(result: FoldResult, path: Path) -> None:
    """Store a result, completely or not at all: its being there says that all of it is done."""
    document = {"format": _FORMAT, **to_dict(result)}
    with open_atomic(path, overwrite=True) as stream:
        stream.write((json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def read_result(path: Path) -> FoldResult:
    """Read what `write_result` wrote.

    Raises
    ------
    DataError
        If it is damaged, or of another format.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("format") != _FORMAT:
            raise ConfigError("another format")
        return from_dict(FoldResult, document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DataError(
            f"{path} is not the result of a comparison that this version can read ({error}); "
            "delete it to compute it again with --resume."
        ) from error


def pair_of(method: str, scan: Scan, mask: Path, manifest: Manifest) -> Pair:
    """Pair a mask with the reference of its scan."""
    reference = reference_of(scan, manifest)
    return Pair(method, replace(reference, path=mask), reference, site=scan.site)


def reference_of(scan: Scan, manifest: Manifest) -> ScanFile:
    """Return the mask of a scan of a manifest, and whose it is."""
    return ScanFile(manifest.file(scan.mask), scan.subject, scan.session, scan.run, scan.site)


def case_of(method: str, scored: ScoredScan, out_dir: Path, manifest: Manifest) -> Case:
    """Turn a stored scan back into a case of an evaluation.

    Raises
    ------
    DataError
        If the manifest has no such scan.
    """
    scan = next((scan for scan in manifest.scans if scan.name == scored.scan), None)
    if scan is None:
        raise DataError(
            f"The manifest {manifest.path} has no scan {scored.scan}, which a result in {out_dir} "
            "names; compare in another folder with -o."
        )
    values: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in scored.metrics.items()
    }
    pair = pair_of(method, scan, out_dir / scored.mask, manifest)
    return Case(pair, ChallengeMetrics(**values), scored.grid_note)
