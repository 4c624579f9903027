"""What the approximate steps of inference change in the masks of real scans.

    python -m benchmarks.shortcuts FLAIR.nii.gz [FLAIR.nii.gz ...] [--model NAME|FILE]

Segments every scan with eight views of all slices, with the further views and looks near evidence
alone (``adaptive``), and with the encoder's products in bfloat16. Prints a table in Markdown: what
share of the slices was shown to the network when that is left to the evidence, and the Dice of the
masks with and without each shortcut.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import markdown_table
from wmh_lora.engine import Segmentation, WMHInferenceEngine, load_model
from wmh_lora.evaluation.metrics import dice
from wmh_lora.volume import Volume

__all__ = ["main", "shortcut_row"]

HEAD = ("scan", "lesion, voxels", "slices shown", "Dice, adaptive", "Dice, bfloat16")


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--model", default="default")
    given = parser.parse_args(arguments)
    engine = WMHInferenceEngine(load_model(given.model), "cpu")
    rows = [shortcut_row(engine, Volume.read(image)) for image in given.images]
    sys.stdout.write(markdown_table(HEAD, rows) + "\n")


def shortcut_row(engine: WMHInferenceEngine, volume: Volume) -> list[str]:
    """Segment a scan in each way, and compare.

    Parameters
    ----------
    engine : WMHInferenceEngine
        On the CPU.
    volume : Volume
        The scan.

    Returns
    -------
    list of str
        One row of the table, under `HEAD`.
    """
    whole, all_slices = _segmented(engine, volume, tta="d4", adaptive=False)
    near, some_slices = _segmented(engine, volume, tta="d4", adaptive=True)
    plain, _ = _segmented(engine, volume)
    rounded, _ = _segmented(engine, volume, precision="bfloat16")
    return [
        volume.path.name if volume.path else "scan",
        str(int(whole.mask.sum())),
        f"{some_slices / all_slices:.2f}",
        f"{dice(whole.mask > 0, near.mask > 0):.4f}",
        f"{dice(plain.mask > 0, rounded.mask > 0):.4f}",
    ]


def _segmented(
    engine: WMHInferenceEngine, volume: Volume, **settings: Any
) -> tuple[Segmentation, int]:
    """Segment in float32 unless told otherwise; return also how many slices were shown."""
    shown = 0

    def count(done: int, total: int) -> None:
        nonlocal shown
        shown = done

    chosen = {"precision": "float32", **settings}
    return engine.segment(volume, progress=count, **chosen), shown


if __name__ == "__main__":
    main()
