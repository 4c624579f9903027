"""Time ``wmh-lora evaluate`` on synthetic masks.

    python -m benchmarks.evaluation [--pairs 100] [--json FILE] [--markdown FILE]

Each pair has 256 x 256 x 48 voxels of 1 x 1 x 3 mm, some 20 mL of lesion in tens of components, and
is read from .nii.gz. The time is that of the command from start to end, in a process of its own,
with two jobs, figures and report; 100 pairs should take less than 60 s on two cores. On a busy
machine that time says little: the processor time, shared by the jobs, is what it could be at best.
Prints JSON.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from benchmarks.harness import machine, publish
from wmh_lora.volume import Volume, write_nifti

SHAPE = (256, 256, 48)
SPACING_MM = (1.0, 1.0, 3.0)
DISTINCT = 10  # more would take longer to make than to score
LIMIT_S, LIMIT_PAIRS = 60.0, 100


def write_pairs(folder: Path, pairs: int, seed: int = 42) -> None:
    """Write that many references and predictions into two folders below `folder`.

    The first `DISTINCT` pairs differ; the others are copies of them.
    """
    for name in ("reference", "prediction"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij", sparse=True)
    inside = (axes[0] ** 2 + axes[1] ** 2) / 0.36 + axes[2] ** 2 / 0.64 < 1.0
    grid = Volume(np.zeros(SHAPE, np.float32), np.diag([*SPACING_MM, 1.0]))
    for number in range(pairs):
        targets = _paths(folder, number)
        if number >= DISTINCT:
            for source, target in zip(_paths(folder, number % DISTINCT), targets, strict=True):
                shutil.copyfile(source, target)
            continue
        field = ndimage.gaussian_filter(rng.standard_normal(SHAPE).astype(np.float32), (4, 4, 1.5))
        threshold = np.quantile(field[inside], 1.0 - rng.uniform(0.005, 0.03))
        reference = (field > threshold) & inside
        prediction = np.roll(reference, 1, axis=0)
        for target, mask in zip(targets, (reference, prediction), strict=True):
            write_nifti(target, mask, grid)


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Name reference and prediction of a pair."""
    stem = f"sub-{number:03d}"
    return (
        folder / "reference" / f"{stem}_label-WMH_mask.nii.gz",
        folder / "prediction" / f"{stem}_space-orig_label-WMH_mask.nii.gz",
    )


def benchmark_evaluation(
    pairs: int = 100, *, jobs: int = 2, figures: bool = True
) -> dict[str, Any]:
    """Time the command on that many pairs.

    Returns
    -------
    dict
        JSON-ready: seconds of the command, processor time of its processes, and what they were
        measured on.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder, pairs)
        command = [sys.executable, "-m", "wmh_lora", "evaluate", "--jobs", str(jobs)]
        command += ["--prediction", str(folder / "prediction")]
        command += ["--reference", str(folder / "reference"), "-o", str(folder / "out")]
        command += [] if figures else ["--no-figures"]
        load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        before, start = os.times(), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        # as it is stated: a figure and the verdict on it must not disagree by a rounding
        seconds, after = round(time.perf_counter() - start, 2), os.times()
    used = after.children_user + after.children_system
    cpu_seconds = used - before.children_user - before.children_system
    return {
        "benchmark": "evaluation",
        "machine": machine(),
        "pairs": pairs,
        "shape": SHAPE,
        "jobs": jobs,
        "figures": figures,
        "seconds": seconds,
        "cpu_seconds": round(cpu_seconds, 2),  # 0 where the system does not tell
        "cpu_seconds_per_job": round(cpu_seconds / jobs, 2),
        "load_before": load_before,
        "limit_seconds": LIMIT_S * pairs / LIMIT_PAIRS,
        "within_limit": seconds <= LIMIT_S * pairs / LIMIT_PAIRS,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=LIMIT_PAIRS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--no-figures", dest="figures", action="store_false")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table there")
    options = parser.parse_args(arguments)
    result = benchmark_evaluation(options.pairs, jobs=options.jobs, figures=options.figures)
    columns = ("pairs", "jobs", "seconds", "cpu_seconds", "limit_seconds")
    publish(
        result,
        [[name.replace("_", " ") for name in columns], [str(result[name]) for name in columns]],
        options.json,
        options.markdown,
    )


if __name__ == "__main__":
    main()
