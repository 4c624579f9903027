"""Who is trained on, who tunes, who tests: subjects in parts, balanced by site and lesion load.

A person is the unit: all scans of a subject stay together, and so do subjects that share an image
file. `wmh_lora.data.strata` says how persons are dealt, and how far a part can be from its share.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from wmh_lora.config_reading import from_dict, to_dict
from wmh_lora.data.manifest import Manifest
from wmh_lora.data.strata import LOAD_BANDS_ML, Person, deal, join_persons, order_by_stratum
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.files import open_atomic

__all__ = [
    "DEFAULT_FRACTIONS",
    "DEFAULT_SEED",
    "PARTS",
    "Part",
    "Split",
    "SplitFile",
    "leave_one_site_out",
    "read_split",
    "split_folds",
    "split_fractions",
    "write_split",
]

_KIND = "wmh-lora split"
_FORMAT = 1

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
DEFAULT_FRACTIONS = (0.70, 0.15, 0.15)
DEFAULT_SEED = 42


@dataclass(frozen=True)
class Split:
    """One division of the subjects.

    Attributes
    ----------
    name : str
        ``split``, ``fold-1`` and so on, or ``without-<site>``.
    train, validation, test : tuple of str
        Subjects, sorted.
    """

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def part(self, name: Part) -> tuple[str, ...]:
        """Return the subjects of a part."""
        subjects: tuple[str, ...] = getattr(self, name)
        return subjects


@dataclass(frozen=True)
class SplitFile:
    """Divisions of one manifest's subjects, and what they were made from.

    Attributes
    ----------
    method : str
        ``fractions``, ``folds`` or ``leave-one-site-out``.
    seed : int
        Of the shuffling.
    fractions : tuple of float
        Shares of train, validation and test that were asked for; of train and validation among
        the sites that are left, for ``leave-one-site-out``; empty for ``folds``.
    load_bands_ml : tuple of float
        Limits between lesion loads.
    manifest : str
        File name of the manifest.
    manifest_sha256 : str
        Of the manifest's file.
    images : mapping
        SHA-256 by path of every image that is divided.
    splits : tuple of Split
        One, or one a fold or site.
    """

    method: str
    seed: int
    fractions: tuple[float, ...]
    load_bands_ml: tuple[float, ...]
    manifest: str
    manifest_sha256: str
    images: Mapping[str, str]
    splits: tuple[Split, ...]

    def split(self, name: str | None = None) -> Split:
        """Return the division of that name, or the only one.

        Raises
        ------
        ConfigError
            There is none of that name, or several and no name is given.
        """
        found = [s for s in self.splits if name in (None, s.name)]
        if len(found) != 1:
            known = ", ".join(s.name for s in self.splits)
            raise ConfigError(f"There is no one split {name or ''!r}; choose one of {known}.")
        return found[0]


def split_fractions(
    manifest: Manifest,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    *,
    seed: int = DEFAULT_SEED,
) -> SplitFile:
    """Divide the subjects into train, validation and test.

    Parameters
    ----------
    manifest : Manifest
        Only its usable scans are divided. Their order has no influence.
    fractions : sequence of float
        Three shares that add up to 1; a part with share 0 stays empty.
    seed : int
        Of the shuffling.

    Raises
    ------
    ConfigError
        The shares are not three that add up to 1.
    DataError
        There is no usable scan, or so few that a part with a share would be empty.
    """
    shares = _shares(fractions, len(PARTS))
    persons = _persons(manifest)
    train, validation, test = deal(order_by_stratum(persons, seed), shares)
    split = _split("split", train, validation, test)
    _refuse_empty(split, shares, len(persons))
    return _file(manifest, "fractions", seed, tuple(fractions), [split])


def split_folds(manifest: Manifest, folds: int, *, seed: int = DEFAULT_SEED) -> SplitFile:
    """Divide the subjects into folds, each of which is the test part once.

    The fold that follows the test fold is the validation part, so that neither the choice of a
    checkpoint nor that of a threshold sees the test subjects.

    Parameters
    ----------
    manifest : Manifest
        Only its usable scans are divided.
    folds : int
        At least 3: one to test, one to validate, one to train.
    seed : int
        Of the shuffling.

    Raises
    ------
    ConfigError
        Fewer than 3 folds.
    DataError
        Fewer subjects than folds.
    """
    if folds < 3:
        raise ConfigError(
            f"{folds} folds leave nothing to train on beside a test and a validation fold; ask "
            "for 3 or more."
        )
    persons = _persons(manifest)
    if len(persons) < folds:
        raise DataError(
            f"Too few subjects ({len(persons)}) to fill {folds} folds; ask for fewer, or add scans."
        )
    dealt = deal(order_by_stratum(persons, seed), [Fraction(1, folds)] * folds)
    splits = []
    for test in range(folds):
        validation = (test + 1) % folds
        rest = [p for k in range(folds) if k not in (test, validation) for p in dealt[k]]
        splits.append(_split(f"fold-{test + 1}", rest, dealt[validation], dealt[test]))
    return _file(manifest, "folds", seed, (), splits)


def leave_one_site_out(
    manifest: Manifest,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    *,
    seed: int = DEFAULT_SEED,
) -> SplitFile:
    """Make each site the test part once; the others are divided into train and validation.

    Parameters
    ----------
    manifest : Manifest
        Only its usable scans are divided.
    fractions : sequence of float
        Shares of train, validation and test, of which the first two count, by their ratio.
    seed : int
        Of the shuffling.

    Raises
    ------
    ConfigError
        The shares are not three that add up to 1.
    DataError
        There is one site only, a subject has scans of several sites, or the sites that are left
        hold too few subjects for train and validation.
    """
    train, validation, _ = _shares(fractions, len(PARTS))
    if train + validation == 0:
        raise ConfigError("leave-one-site-out needs a share for train; give one in --fractions.")
    shares = [train / (train + validation), validation / (train + validation)]
    persons = _persons(manifest)
    for person in persons:
        if len(person.sites) > 1:
            raise DataError(
                f"{' and '.join(person.subjects)} belong to one person with scans of several sites "
                f"({', '.join(person.sites)}), so no site can be left out alone; remove the scans "
                "of all but one site, then prepare again."
            )
    sites = sorted({person.site for person in persons})
    if len(sites) < 2:
        raise DataError(
            f"Leaving a site out needs two sites at least, the usable scans are of {len(sites)} "
            f"({', '.join(sites) or 'none'}); use --fractions or --folds."
        )
    splits = []
    for site in sites:
        rest = [person for person in persons if person.site != site]
        kept, tuning = deal(order_by_stratum(rest, seed), shares)
        split = _split(f"without-{site}", kept, tuning, [p for p in persons if p.site == site])
        _refuse_empty(split, shares, len(rest))
        splits.append(split)
    rounded = tuple(float(share) for share in shares)
    return _file(manifest, "leave-one-site-out", seed, rounded, splits)


# --- parts ------------------------------------------------------------------------------------


def _shares(fractions: Sequence[float], count: int) -> list[Fraction]:
    """Return exact shares that add up to 1, from decimal ones that nearly do."""
    values = [float(fraction) for fraction in fractions]
    good = len(values) == count and all(math.isfinite(v) and v >= 0 for v in values)
    if not good or abs(sum(values) - 1) > 1e-6:
        raise ConfigError(
            f"The shares {' '.join(f'{value:g}' for value in values)} must be {count} numbers, "
            "none negative, that add up to 1, such as 0.7 0.15 0.15."
        )
    exact = [Fraction(str(value)) for value in values]
    return [value / sum(exact) for value in exact]


def _persons(manifest: Manifest) -> list[Person]:
    if not manifest.usable:
        raise DataError(
            f"None of the {len(manifest.scans)} scans of {manifest.path or 'the manifest'} can be "
            "used, so there is nothing to divide; `wmh-lora data prepare` tells what is wrong."
        )
    return join_persons(manifest.usable)


def _split(
    name: str, train: Iterable[Person], validation: Iterable[Person], test: Iterable[Person]
) -> Split:
    return Split(name, _subjects(train), _subjects(validation), _subjects(test))


def _subjects(persons: Iterable[Person]) -> tuple[str, ...]:
    return tuple(sorted(subject for person in persons for subject in person.subjects))


def _refuse_empty(split: Split, shares: Sequence[Fraction], count: int) -> None:
    for name, share in zip(PARTS, shares):
        if share > 0 and not split.part(name):
            raise DataError(
                f"Too few subjects ({count}) for these shares: the part {name} of {split.name} "
                "would be empty. Add scans, give it a larger share, or a share of 0."
            )


# --- the file ---------------------------------------------------------------------------------


def _file(
    manifest: Manifest,
    method: str,
    seed: int,
    fractions: tuple[float, ...],
    splits: Sequence[Split],
) -> SplitFile:
    return SplitFile(
        method=method,
        seed=seed,
        fractions=fractions,
        load_bands_ml=LOAD_BANDS_ML,
        manifest="" if manifest.path is None else manifest.path.name,
        manifest_sha256=manifest.sha256,
        images=dict(sorted((scan.image, scan.image_sha256) for scan in manifest.usable)),
        splits=tuple(splits),
    )


def write_split(split: SplitFile, path: Path, *, overwrite: bool = False) -> None:
    """Store a split as JSON.

    Raises
    ------
    DataError
        The file exists, or cannot be written.
    """
    document = {"kind": _KIND, "format": _FORMAT, **to_dict(split)}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    with open_atomic(path, overwrite=overwrite) as stream:
        stream.write(text.encode("utf-8"))


def read_split(path: str | os.PathLike[str], manifest: Manifest) -> SplitFile:
    """Read a split, and check that it was made for this manifest.

    Raises
    ------
    DataError
        The file is no split, or of another manifest.
    """
    source = Path(path)
    try:
        document: Any = json.loads(source.read_bytes())
    except OSError as error:
        raise DataError(f"Cannot read the split {source}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{source} is not a split (no JSON: {error}).") from error
    if not isinstance(document, dict) or document.pop("kind", None) != _KIND:
        raise DataError(f"{source} is not a split; make one with `wmh-lora data split`.")
    if (found := document.pop("format", None)) != _FORMAT:
        raise DataError(
            f"{source} is a split of format {found}, this version reads {_FORMAT}; make it again "
            "with `wmh-lora data split`."
        )
    try:
        split = from_dict(SplitFile, document)
    except ConfigError as error:
        raise DataError(f"{source} is a damaged split ({error}); make it again.") from error
    if split.manifest_sha256 != manifest.sha256:
        raise DataError(
            f"{source} was made for another manifest ({split.manifest}, sha256 "
            f"{split.manifest_sha256}) than {manifest.path} (sha256 {manifest.sha256}); make the "
            "split again, or use its own manifest."
        )
    return split
