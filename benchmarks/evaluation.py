"""Time ``wmh-lora evaluate`` on synthetic masks, and print the result as JSON.

    python benchmarks/evaluation.py --pairs 100

Each pair has 256 x 256 x 48 voxels of 1 x 1 x 3 mm, some 20 mL of lesion in tens of components, and
is read from .nii.gz. The time is that of the command from start to end, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from wmh_lora.volume import Volume, write_nifti

SHAPE = (256, 256, 48)
SPACING_MM = (1.0, 1.0, 3.0)


def write_pairs(folder: Path, pairs: int, seed: int = 42) -> None:
    """Write that many references and predictions into two folders below `folder`."""
    for name in ("reference", "prediction"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij", sparse=True)
    inside = (axes[0] ** 2 + axes[1] ** 2) / 0.36 + axes[2] ** 2 / 0.64 < 1.0
    grid = Volume(np.zeros(SHAPE, np.float32), np.diag([*SPACING_MM, 1.0]))
    for number in range(pairs):
        field = ndimage.gaussian_filter(rng.standard_normal(SHAPE).astype(np.float32), (4, 4, 1.5))
        threshold = np.quantile(field[inside], 1.0 - rng.uniform(0.005, 0.03))
        reference = (field > threshold) & inside
        prediction = np.roll(reference, 1, axis=0)
        stem = f"sub-{number:03d}"
        write_nifti(folder / "reference" / f"{stem}_label-WMH_mask.nii.gz", reference, grid)
        name = f"{stem}_space-orig_label-WMH_mask.nii.gz"
        write_nifti(folder / "prediction" / name, prediction, grid)


def benchmark_evaluation(
    pairs: int = 100, *, jobs: int = 2, figures: bool = True
) -> dict[str, Any]:
    """Time the command on that many pairs.

    Returns
    -------
    dict
        JSON-ready: seconds of the command, seconds a pair, and what they were measured on.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder, pairs)
        command = [sys.executable, "-m", "wmh_lora", "evaluate", "--jobs", str(jobs)]
        command += ["--prediction", str(folder / "prediction")]
        command += ["--reference", str(folder / "reference"), "-o", str(folder / "out")]
        command += [] if figures else ["--no-figures"]
        load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - start
    return {
        "benchmark": "evaluation",
        "pairs": pairs,
        "shape": SHAPE,
        "jobs": jobs,
        "figures": figures,
        "seconds": round(seconds, 2),
        "seconds_per_pair": round(seconds / pairs, 3),
        "cores": os.cpu_count(),
        "load_before": load_before,
        "python": platform.python_version(),
    }


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--no-figures", dest="figures", action="store_false")
    options = parser.parse_args()
    result = benchmark_evaluation(options.pairs, jobs=options.jobs, figures=options.figures)
    print(json.dumps(result, indent=2))  # noqa: T201 -- its result


if __name__ == "__main__":
    main()
