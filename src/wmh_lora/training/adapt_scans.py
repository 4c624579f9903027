"""The labelled scans of a site, laid out as training reads them, and dealt to folds."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmh_lora.data.catalog import make_manifest
from wmh_lora.data.manifest import Manifest, Scan, write_manifest
from wmh_lora.data.split import Split, SplitFile, write_split
from wmh_lora.data.strata import LOAD_BANDS_ML, deal, join_persons, order_by_stratum
from wmh_lora.errors import DataError
from wmh_lora.files import file_sha256, image_suffix
from wmh_lora.training.tune_cases import TuningCase
from wmh_lora.volume import Volume, write_nifti

__all__ = ["FEWEST", "MOST", "WHOLE", "SiteScans"]

FEWEST, MOST = 2, 10
"""Scans that an adapter learns from."""

WHOLE = "all"
"""Name of the division that trains on every scan."""

_MANIFEST, _SPLIT = "manifest.json", "split.json"


@dataclass(frozen=True)
class SiteScans:
    """Copies of the scans in a folder, with manifest and folds.

    Attributes
    ----------
    cases : tuple of TuningCase
        What was copied.
    manifest : Manifest
        Of the copies, in the order of ``cases``.
    folds : tuple of tuple of int
        Scans of each fold, as indices of ``cases``; scans of one person are in one fold.
    """

    cases: tuple[TuningCase, ...]
    manifest: Manifest
    folds: tuple[tuple[int, ...], ...]

    @classmethod
    def gather(
        cls, cases: Sequence[TuningCase], folder: Path, *, folds: int, seed: int
    ) -> SiteScans:
        """Copy scans into a folder of their own, check them, and deal them to folds.

        Parameters
        ----------
        cases : sequence of TuningCase
            `FEWEST` to `MOST` scans with references.
        folder : Path
            An empty folder.
        folds : int
            At most so many, and no more than there are persons.
        seed : int
            Of the dealing.

        Raises
        ------
        DataError
            If there are too few or too many scans or persons, or scans cannot be used; the message
            names all of them.
        """
        if not FEWEST <= len(cases) <= MOST:
            raise DataError(
                f"Adaptation takes {FEWEST} to {MOST} labelled scans, found {len(cases)}; with "
                "more, train a model (`wmh-lora train`)."
            )
        subjects = {case.subject: f"sub-{n:02d}" for n, case in enumerate(_by_subject(cases))}
        for number, case in enumerate(cases):
            _copy(case, folder, subjects[case.subject], number)
        scans = sorted(make_manifest(folder, "bids").scans, key=lambda scan: scan.run)
        _refuse_unusable(cases, scans)
        persons = join_persons(scans)
        if len(persons) < FEWEST:
            raise DataError(
                f"The {len(cases)} scans are of one person; cross-validation needs {FEWEST} at "
                "least."
            )
        count = min(folds, len(persons))
        dealt = deal(order_by_stratum(persons, seed), [Fraction(1, count)] * count)
        members = [{s for person in part for s in person.subjects} for part in dealt]
        return cls(
            tuple(cases),
            Manifest(folder, "bids", tuple(scans)),
            tuple(
                tuple(n for n, scan in enumerate(scans) if scan.subject in part) for part in members
            ),
        )

    @property
    def identities(self) -> tuple[dict[str, str], ...]:
        """Checksums of each scan; no names, for an adapter may be passed on."""
        return tuple(
            {"image_sha256": scan.image_sha256, "mask_sha256": scan.mask_sha256}
            for scan in self.manifest.scans
        )

    def write_structures(
        self, masks: Mapping[str, NDArray[np.uint8]], volume: Volume, number: int
    ) -> dict[str, Path]:
        """Write masks of structures that the site does not label, for `data_table`.

        Parameters
        ----------
        masks : mapping of str to uint8 array (I, J, K)
            By the name of the structure.
        volume : Volume
            The scan.
        number : int
            Its place in ``cases``.
        """
        paths = {}
        for name, mask in masks.items():
            paths[name] = self.manifest.root / f"{number:02d}_{name}.nii.gz"
            write_nifti(paths[name], mask, volume)
        return paths

    def data_table(self, structures: Sequence[Mapping[str, Path]]) -> dict[str, Any]:
        """Write manifest and split, and return the ``[data]`` table that names them.

        Its ``fold`` is for the caller to add: ``fold-<n>``, from 1, trains on all scans but those
        of that fold, and `WHOLE` on all.

        Parameters
        ----------
        structures : sequence of mapping
            For each scan, masks of other structures by name.
        """
        folder = self.manifest.root
        scans = [
            dataclasses.replace(
                scan,
                structures={
                    name: path.relative_to(folder).as_posix() for name, path in own.items()
                },
                structures_sha256={name: file_sha256(path) for name, path in own.items()},
            )
            for scan, own in zip(self.manifest.scans, structures, strict=True)
        ]
        manifest = dataclasses.replace(self.manifest, scans=tuple(scans))
        manifest = write_manifest(manifest, folder / _MANIFEST)
        splits = [self._split(f"fold-{n + 1}", held_out) for n, held_out in enumerate(self.folds)]
        write_split(
            SplitFile(
                method="folds",
                seed=0,
                fractions=(),
                load_bands_ml=LOAD_BANDS_ML,
                manifest=_MANIFEST,
                manifest_sha256=manifest.sha256,
                images={scan.image: scan.image_sha256 for scan in scans},
                splits=(*splits, self._split(WHOLE, ())),
            ),
            folder / _SPLIT,
        )
        return {"root": str(folder), "manifest": _MANIFEST, "split": _SPLIT}

    def _split(self, name: str, held_out: Sequence[int]) -> Split:
        test = {self.manifest.scans[n].subject for n in held_out}
        every = {scan.subject for scan in self.manifest.scans}
        return Split(name, tuple(sorted(every - test)), (), tuple(sorted(test)))


def _by_subject(cases: Sequence[TuningCase]) -> list[TuningCase]:
    """First scan of each subject."""
    first: dict[str, TuningCase] = {}
    for case in cases:
        first.setdefault(case.subject, case)
    return list(first.values())


def _copy(case: TuningCase, folder: Path, subject: str, number: int) -> None:
    """Copy a scan and its mask; the run of its name is the number of the case."""
    if case.reference is None:
        raise DataError(f"{case.image} has no reference mask; leave it out.")
    start = f"{subject}_run-{number:02d}"
    places = {
        case.image: folder / subject / "anat" / f"{start}_FLAIR",
        case.reference: folder / "derivatives" / "manual" / subject / f"{start}_label-WMH_mask",
    }
    for source, target in places.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, f"{target}{image_suffix(source)}")
        except OSError as error:
            raise DataError(f"Cannot copy {source} to {folder}: {error.strerror}.") from error


def _refuse_unusable(cases: Sequence[TuningCase], scans: Sequence[Scan]) -> None:
    wrong = []
    for case, scan in zip(cases, scans, strict=True):
        problems = [p.message for p in scan.problems if p.code != "duplicate-image"]
        if problems:
            wrong.append(f"{case.image} with {case.reference}: {'; '.join(problems)}")
    if wrong:
        raise DataError(
            f"{len(wrong)} of the {len(cases)} scans cannot be learned from: {'. '.join(wrong)}. "
            "Correct them, or leave them out."
        )
