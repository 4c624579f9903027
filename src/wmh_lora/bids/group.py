"""The group level: one table and one page over all scans, from their derivatives alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmh_lora.bids.names import ENTITIES, OF_DERIVATIVES, BidsName, derived_files, parse_name
from wmh_lora.errors import DataError
from wmh_lora.report.html import CohortFailure, CohortScan, cohort_html
from wmh_lora.report.outputs import saved_together
from wmh_lora.report.tables import COHORT_DICTIONARY, cohort_row, failed_row

__all__ = ["GroupTable", "collect_group", "write_group"]

TABLE, DICTIONARY, PAGE = "wmh.tsv", "wmh.json", "wmh.html"
_ENDING = "_wmh.json"
_NOT_AVAILABLE = "n/a"
# Columns that tell scans of one session apart, where any scan has the entity
_OPTIONAL = ("task", "acq", "ce", "rec", "run", "echo", "part", "chunk", "desc")
_PEOPLE: Mapping[str, Mapping[str, Any]] = {
    "participant_id": {"Description": "Participant, as in participants.tsv of the source"},
    "session_id": {"Description": "Session; n/a where the source has no sessions"},
}


@dataclass(frozen=True)
class GroupTable:
    """All scans of the derivatives.

    Attributes
    ----------
    rows : tuple of mapping
        By scan its columns.
    dictionary : mapping
        What each column means, in their order.
    scans : tuple of CohortScan
        Those with results.
    failures : tuple of CohortFailure
        Those whose results are incomplete or cannot be read.
    """

    rows: tuple[Mapping[str, str], ...]
    dictionary: Mapping[str, Mapping[str, Any]]
    scans: tuple[CohortScan, ...]
    failures: tuple[CohortFailure, ...]


def collect_group(
    out_dir: Path, *, participants: Sequence[str] = (), sessions: Sequence[str] = ()
) -> GroupTable:
    """Read the reports of all scans below a folder of derivatives.

    A scan whose files are incomplete has a row that says so and no numbers.

    Parameters
    ----------
    out_dir : Path
        What the participant level wrote.
    participants, sessions : sequence of str
        Labels, with or without ``sub-`` and ``ses-``; all if there are none.

    Raises
    ------
    DataError
        If there is no report.
    """
    people = {label.removeprefix("sub-") for label in participants}
    visits = {label.removeprefix("ses-") for label in sessions}
    folders = [*out_dir.glob("sub-*/anat"), *out_dir.glob("sub-*/ses-*/anat")]
    names: dict[str, BidsName] = {}
    for folder in sorted(folders):
        for path in sorted(folder.glob("sub-*")):
            name = _scan_of(path.name)
            if name is None or (people and name.entities["sub"] not in people):
                continue
            if not visits or name.entities.get("ses") in visits:
                names[name.stem] = name
    if not names:
        raise DataError(
            f"{out_dir} holds no results of the participant level for the chosen participants "
            "and sessions; run it first."
        )
    used = {key for name in names.values() for key in name.entities}
    optional = [key for key in _OPTIONAL if key in used]
    dictionary = {
        **_PEOPLE,
        **{ENTITIES[key]: {"Description": f"Entity {key} of the scan's name"} for key in optional},
        **COHORT_DICTIONARY,
    }
    rows, scans, failures = [], [], []
    for name in names.values():
        found = _read(out_dir, name)
        if isinstance(found, CohortScan):
            scans.append(found)
            row = cohort_row(found.name, found.report)
        else:
            failures.append(found)
            row = failed_row(found.name, _NOT_AVAILABLE, found.message)
        rows.append({**_identity(name, optional), **row})
    return GroupTable(tuple(rows), dictionary, tuple(scans), tuple(failures))


def write_group(table: GroupTable, out_dir: Path, *, overwrite: bool = False) -> Path:
    """Write ``wmh.tsv``, its data dictionary ``wmh.json`` and the page ``wmh.html``.

    Returns
    -------
    Path
        The table.

    Raises
    ------
    DataError
        If they exist and ``overwrite`` is not set, or cannot be written.
    ConfigError
        If the folder cannot be made or written to.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    writer.writerow(table.dictionary)
    for row in table.rows:
        writer.writerow([" ".join(row[column].split()) for column in table.dictionary])
    contents = {
        TABLE: buffer.getvalue(),
        DICTIONARY: json.dumps(table.dictionary, indent=2, ensure_ascii=False) + "\n",
        PAGE: cohort_html(table.scans, table.failures, title="White matter hyperintensities"),
    }
    targets = [out_dir / name for name in contents]
    with saved_together(targets, overwrite=overwrite) as temporary:
        for target in targets:
            temporary[target].write_bytes(contents[target.name].encode("utf-8"))
    return targets[0]


def _scan_of(name: str) -> BidsName | None:
    """Read whose result a file is; any of a scan's files shows that it was begun."""
    if name.endswith(_ENDING):
        return parse_name(name.removesuffix(_ENDING) + "_FLAIR.nii.gz")
    if name.endswith("_label-WMH_mask.nii.gz"):
        mask = parse_name(name)
        kept = {key: value for key, value in mask.entities.items() if key not in OF_DERIVATIVES}
        return BidsName(kept, "FLAIR")
    return None


def _identity(name: BidsName, optional: Sequence[str]) -> dict[str, str]:
    entities = name.entities
    session = f"ses-{entities['ses']}" if "ses" in entities else _NOT_AVAILABLE
    return {
        "participant_id": f"sub-{entities['sub']}",
        "session_id": session,
        **{ENTITIES[key]: entities.get(key, _NOT_AVAILABLE) for key in optional},
    }


def _read(out_dir: Path, name: BidsName) -> CohortScan | CohortFailure:
    """Read the report of a scan whose files are all there."""
    files = derived_files(out_dir, name)
    missing = [file for file in files if not file.is_file()]
    if missing:
        message = f"Incomplete: {missing[0].name} is missing; run the participant level again."
        return CohortFailure(name.stem, message)
    try:
        report = json.loads(files.report.read_text(encoding="utf-8"))
        cohort_row(name.stem, report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = (
            f"{files.report.name} is no readable report ({type(error).__name__}); delete it and "
            "run the participant level again."
        )
        return CohortFailure(name.stem, message)
    return CohortScan(name.stem, report, files.page.relative_to(out_dir).as_posix())
