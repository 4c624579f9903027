"""Make ``interfaces/boutiques/wmh-lora.json`` from the options of ``wmh-lora bids``.

Run it when these options or the version change: ``python tools/build_boutiques.py``.

The output folder is one input, of type String since it need not exist. ``bosh validate --bids``
asks for a second of type File with the same key; but bosh then leaves the folder out of the command
when the first of the two is not given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from wmh_lora._version import __version__
from wmh_lora.cli.bids import bids

TARGET = Path(__file__).parents[1] / "interfaces" / "boutiques" / "wmh-lora.json"

# Options that Boutiques gives names of its own, and their place on the command line.
_NAMED = {"participants": "participant_label", "sessions": "session_label"}
_FILES = frozenset({"adapter", "base_weights", "bids_filter_file"})


def descriptor() -> dict[str, Any]:
    """Return the descriptor."""
    inputs = _arguments()
    for parameter in bids.params:
        if isinstance(parameter, click.Option):
            inputs += _option(parameter)
    positional = ["bids_dir", "output_dir", "analysis_level", "participant_label", "session_label"]
    keys = list(dict.fromkeys(entry["value-key"] for entry in inputs))
    keys.sort(key=lambda key: _place(key, positional))
    return {
        "name": "WMH-LoRA",
        "tool-version": __version__,
        "schema-version": "0.5",
        "description": "Segments white matter hyperintensities on the FLAIR scans of a BIDS data "
        "set, and writes BIDS derivatives.",
        "author": "WMH-LoRA contributors",
        "command-line": f"wmh-lora bids {' '.join(keys)}",
        "inputs": inputs,
        "groups": [
            {
                "id": "adaptivity",
                "name": "Adaptivity",
                "members": ["adaptive", "no_adaptive"],
                "mutually-exclusive": True,
            },
        ],
        "output-files": [
            {
                "id": "derivatives",
                "name": "BIDS derivatives",
                "description": "Masks, probability maps, reports; wmh.tsv of the group level.",
                "path-template": "[OUTPUT_DIR]",
            }
        ],
        "error-codes": [
            {"code": 1, "description": "Some scans failed; the rest are done."},
            {"code": 2, "description": "Wrong usage or settings."},
        ],
        "suggested-resources": {"cpu-cores": 2, "ram": 2},
        "tags": {"domain": ["neuroinformatics", "mri", "white matter hyperintensities"]},
    }


def _place(key: str, positional: list[str]) -> int:
    name = key.strip("[]").lower()
    return positional.index(name) if name in positional else len(positional)


def _arguments() -> list[dict[str, Any]]:
    """Describe the three arguments."""
    level = next(p for p in bids.params if p.name == "level").type
    assert isinstance(level, click.Choice)
    return [
        {
            "id": "bids_dir",
            "name": "BIDS folder",
            "description": "Top folder of a BIDS data set.",
            "type": "File",
            "value-key": "[BIDS_DIR]",
            "optional": False,
        },
        {
            "id": "output_dir",
            "name": "Output folder",
            "description": "Folder of the derivatives; it is made if needed.",
            "type": "String",
            "value-key": "[OUTPUT_DIR]",
            "optional": False,
        },
        {
            "id": "analysis_level",
            "name": "Analysis level",
            "description": "participant segments scans, group makes the table of their results.",
            "type": "String",
            "value-key": "[ANALYSIS_LEVEL]",
            "value-choices": list(level.choices),
            "optional": False,
        },
    ]


def _option(option: click.Option) -> list[dict[str, Any]]:
    """Describe an option; one with a negative form becomes two flags."""
    assert option.name is not None
    names = [opts[0] for opts in (_long(option.opts), _long(option.secondary_opts)) if opts]
    entries = []
    for place, flag in enumerate(names):
        identifier = _NAMED.get(option.name, flag.removeprefix("--").replace("-", "_"))
        entry = {
            "id": identifier,
            "name": identifier.replace("_", " ").capitalize(),
            "description": f"Turns {names[0]} off." if place else option.help,
            "command-line-flag": flag,
            "value-key": f"[{identifier.upper()}]",
            "optional": True,
            **({"type": "Flag"} if option.is_flag else _value_type(option)),
        }
        if option.multiple:
            entry["list"] = True
        entries.append(entry)
    return entries


def _long(names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("--")]


def _value_type(option: click.Option) -> dict[str, Any]:
    kind = option.type
    if isinstance(kind, click.Choice):
        return {"type": "String", "value-choices": list(kind.choices)}
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        limits: dict[str, Any] = {"type": "Number", "integer": isinstance(kind, click.IntRange)}
        for key, limit, is_open in (
            ("minimum", kind.min, kind.min_open),
            ("maximum", kind.max, kind.max_open),
        ):
            if limit is not None:
                limits[key] = limit
                if is_open:
                    limits[f"exclusive-{key}"] = True
        return limits
    return {"type": "File" if option.name in _FILES else "String"}


def main() -> None:
    """Write the descriptor."""
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(descriptor(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
