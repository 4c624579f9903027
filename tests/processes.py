"""Python code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_SOURCE = Path(__file__).resolve().parents[1] / "src"


def fresh_python(
    code: str, *arguments: str | Path, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run code with the package of this source tree; whether it succeeded is for the caller."""
    search_path = os.pathsep.join(filter(None, [str(_SOURCE), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
