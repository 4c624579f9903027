"""Persons in balanced parts: who must stay together, in which order, and dealt by which rule.

Persons are ordered by stratum (site, then lesion load), shuffled within it, and dealt to the parts
by R. Tijdeman's rule (The chairman assignment problem, Discrete Mathematics 32, 1980). It keeps
every part within 1 - 1/(2k - 2) persons of its share after every step, for k parts. So over all,
each of three parts is within 3/4 of a person of its share; in any one site or stratum, which are
stretches of the order, within 3/2; and equal folds differ by one person at most, in all three.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np

from wmh_lora.data.manifest import Scan

__all__ = ["LOAD_BANDS_ML", "Person", "deal", "join_persons", "order_by_stratum"]

#: Limits between small, medium and large lesion loads, in mL.
LOAD_BANDS_ML = (2.0, 10.0)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Person:
    """Subjects that must stay together.

    Attributes
    ----------
    subjects : tuple of str
        One, or all that share an image file; sorted.
    sites : tuple of str
        Of their scans, sorted.
    band : int
        Index of the lesion load, the mean of the scans, among the bands of `LOAD_BANDS_ML`.
    """

    subjects: tuple[str, ...]
    sites: tuple[str, ...]
    band: int

    @property
    def site(self) -> str:
        """The site that they count for."""
        return self.sites[0]


def join_persons(scans: Iterable[Scan]) -> list[Person]:
    """Join scans of a subject, and subjects with the same image, sorted by name."""
    by_subject: defaultdict[str, list[Scan]] = defaultdict(list)
    subjects_of: defaultdict[str, list[str]] = defaultdict(list)
    for scan in scans:
        by_subject[scan.subject].append(scan)
        subjects_of[scan.image_sha256].append(scan.subject)
    leader = {subject: subject for subject in by_subject}
    for sharing in subjects_of.values():
        joined = {leader[subject] for subject in sharing}
        if len(joined) > 1:
            first = min(joined)
            leader = {s: first if leads in joined else leads for s, leads in leader.items()}
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for subject, leads in leader.items():
        groups[leads].append(subject)
    return [
        _join(sorted(groups[leads]), [s for name in groups[leads] for s in by_subject[name]])
        for leads in sorted(groups)
    ]


def _join(subjects: list[str], scans: list[Scan]) -> Person:
    # fsum rounds once, so that the order of the scans cannot move a mean over a limit
    load_ml = math.fsum(scan.reference_ml or 0.0 for scan in scans) / len(scans)
    sites = sorted({scan.site for scan in scans})
    return Person(tuple(subjects), tuple(sites), bisect_right(LOAD_BANDS_ML, load_ml))


def order_by_stratum(persons: Sequence[Person], seed: int) -> list[Person]:
    """Shuffle sites, bands within a site, and persons within a band; each stays one stretch."""
    generator = np.random.default_rng(seed)
    order: list[Person] = []
    for site in _shuffled(sorted({person.site for person in persons}), generator):
        of_site = [person for person in persons if person.site == site]
        for band in _shuffled(sorted({person.band for person in of_site}), generator):
            order += _shuffled([p for p in of_site if p.band == band], generator)
    return order


def _shuffled(items: Sequence[_T], generator: np.random.Generator) -> list[_T]:
    return [items[index] for index in generator.permutation(len(items))]


def deal(persons: Sequence[Person], shares: Sequence[Fraction]) -> list[list[Person]]:
    """Give each person in turn to one part, by Tijdeman's rule, in exact arithmetic."""
    parts: list[list[Person]] = [[] for _ in shares]
    active = sum(share > 0 for share in shares)
    slack = Fraction(1, 2 * active - 2) if active > 1 else Fraction(0)
    for count, person in enumerate(persons, start=1):
        owed = [share * count - len(part) for share, part in zip(shares, parts)]
        # Of the parts that may take a person now, the one that must do so the soonest.
        due = [k for k, share in enumerate(shares) if share > 0 and owed[k] >= slack]
        chosen = min(due, key=lambda k: (1 - slack - owed[k]) / shares[k])
        parts[chosen].append(person)
    return parts
