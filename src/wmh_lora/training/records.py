"""The record of a run: ``metrics.jsonl``, one JSON object a line."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmh_lora.files import open_atomic

__all__ = ["append_record", "finite", "forget_records_after"]

_log = logging.getLogger("wmh_lora")


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line; NaN and infinity, which JSON does not have, become null."""
    line = json.dumps(finite(record), allow_nan=False)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def forget_records_after(path: Path, step: int, validated_step: int) -> None:
    """Drop the records (and a half-written line) that a resumed run will write again.

    Parameters
    ----------
    path
        ``metrics.jsonl``; nothing happens if it is absent.
    step
        Step of the checkpoint.
    validated_step
        Step of the last validation that was finished before the checkpoint.
    """
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            limit = validated_step if record["kind"].startswith("validation") else step
            if record["step"] <= limit:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, AttributeError):
            _log.warning("%s: an unreadable line was dropped", path)
    with open_atomic(path, overwrite=True) as stream:
        stream.write("".join(kept).encode())


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Copy in which None stands for NaN and infinities, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
