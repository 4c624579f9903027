"""How well white matter is found in scans with lesions, by each version of preprocessing.

    python -m benchmarks.landmarks [--labelmaps DIR --cache DIR] [--scans 120] [--seed 1000]

Makes synthetic scans with the patterns of small-vessel disease, every other one of the MNI152
anatomy where there are label maps, and prints, as JSON, for each range of lesion volume in how many
of them the white matter that `wmh_lora.preprocess` finds is off by more than 10 %, measured from
fluid to the median of the white matter that is no lesion; and each scan that is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wmh_lora.config import PREPROCESS_VERSIONS, PreprocessConfig
from wmh_lora.data.anatomy import Anatomy, mni_anatomy
from wmh_lora.data.anatomy_cache import kept_head
from wmh_lora.data.synthesis import synthesize_with_normal
from wmh_lora.errors import DataError
from wmh_lora.preprocess import preprocess

TOLERANCE = 0.1
_PIXEL_MM = 4.0  # landmarks are those of any pixel size, and fewer pixels are made sooner
RANGES_ML = ((0.0, 20.0), (20.0, 50.0), (50.0, np.inf))


def main(arguments: list[str] | None = None) -> None:
    """Make the scans, measure them and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--labelmaps", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--scans", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args(arguments)
    if options.labelmaps and not options.cache:
        parser.error("--labelmaps needs --cache, a folder for registered anatomies")
    seeds = range(options.seed, options.seed + options.scans)
    rows = list(measure(seeds, options.labelmaps, options.cache))
    off = {f"version {v}": f"off_{v}" for v in PREPROCESS_VERSIONS}
    document = {
        "scans": len(rows),
        "off": [
            {
                "lesions_ml": [low, high if np.isfinite(high) else None],
                "scans": len(inside),
                **{name: sum(abs(r[key]) > TOLERANCE for r in inside) for name, key in off.items()},
            }
            for low, high in RANGES_ML
            for inside in [[r for r in rows if low <= r["lesions_ml"] < high]]
        ],
        "which": [r for r in rows if any(abs(r[key]) > TOLERANCE for key in off.values())],
    }
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def measure(seeds: range, labelmaps: Path | None, cache: Path | None) -> Iterator[dict[str, float]]:
    """Yield a scan's seed and lesion volume, and how far off each version is, as a share."""
    for seed in seeds:
        anatomy = _anatomy(seed, labelmaps, cache)
        case, normal = synthesize_with_normal(np.random.default_rng(seed), anatomy, None)
        truth = float(np.median(case.volume.data[normal]))
        lesions_ml = float(case.masks["wmh"].sum()) * case.volume.voxel_volume_ml
        row = {"seed": seed, "lesions_ml": round(lesions_ml, 1)}
        for version in PREPROCESS_VERSIONS:
            found = preprocess(case.volume, PreprocessConfig(version, pixel_size_mm=_PIXEL_MM))
            share = (found.white_matter - found.floor) / (truth - found.floor)
            row[f"off_{version}"] = round(share - 1.0, 3)
        yield row


def _anatomy(seed: int, labelmaps: Path | None, cache: Path | None) -> Anatomy:
    """Return the MNI152 anatomy for odd seeds, and one of the label maps for even ones."""
    if labelmaps is None or cache is None or seed % 2:
        return mni_anatomy()
    heads = sorted(labelmaps.glob("*.nii.gz"))
    if not heads:
        raise DataError(f"{labelmaps} holds no label maps (*.nii.gz).")
    return Anatomy.load(kept_head(cache, heads[seed // 2 % len(heads)]))


if __name__ == "__main__":
    main()
