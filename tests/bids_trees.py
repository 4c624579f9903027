"""BIDS data sets of small phantoms, and the official validator's word on a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.phantoms import write_head


def write_dataset(root: Path, *names: str, name: str = "Phantoms") -> Path:
    """Write a raw data set with the named scans, ``sub-01_ses-1_FLAIR`` and the like."""
    root.mkdir(parents=True, exist_ok=True)
    description = {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": "raw", "License": "CC0"}
    (root / "dataset_description.json").write_text(json.dumps(description), encoding="utf-8")
    (root / "README.md").write_text("Phantoms that a test writes.\n" * 8, encoding="utf-8")
    for seed, scan in enumerate(names):
        folder = root.joinpath(*(w for w in scan.split("_") if w.startswith(("sub-", "ses-"))))
        path = write_head(folder / "anat" / f"{scan}.nii.gz", seed)
        path.with_name(f"{scan}.json").write_text("{}", encoding="utf-8")
    return root


def validate(folder: Path) -> list[dict[str, Any]]:
    """Issues that the official validator finds; it brings its schema and fetches nothing."""
    program = Path(sys.executable).with_name("bids-validator-deno")
    finished = subprocess.run(
        [program, str(folder), "--format", "json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    issues: list[dict[str, Any]] = json.loads(finished.stdout)["issues"]["issues"]
    return issues


def errors_of(issues: list[dict[str, Any]]) -> list[str]:
    """Issues that make a data set invalid, one line each."""
    return [f"{i['code']} {i.get('location')}" for i in issues if i["severity"] == "error"]


def warnings_of(issues: list[dict[str, Any]]) -> set[str]:
    """Codes of the other issues."""
    return {issue["code"] for issue in issues if issue["severity"] == "warning"}
