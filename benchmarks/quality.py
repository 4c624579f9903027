"""What the quality checks measure on scans, and on copies that were made worse.

    python -m benchmarks.quality FOLDER [--changes] [--pattern '*_FLAIR.nii.gz']

Prints one tab-separated row a scan: the measures of `wmh_lora.quality_measures` and the verdicts
that rest on them. With ``--changes`` each scan is followed by its copies after each change of
`CHANGES`. No network runs, so the checks of brain, field of view and lesions are left out here;
``tests/integration/test_quality_real.py`` makes them. The limits in `wmh_lora.quality` were chosen
from this table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.quality import check_measures
from wmh_lora.quality_measures import measure_scan
from wmh_lora.view import choose_view
from wmh_lora.volume import Volume

FloatArray = npt.NDArray[np.float32]
Change = Callable[[Volume, np.random.Generator], FloatArray]
SEED = 0


def blur(sigma_mm: float) -> Change:
    """Return a change that smooths within slices, as a coarse matrix or filter would."""

    def change(volume: Volume, rng: np.random.Generator) -> FloatArray:
        view = choose_view(volume, 1.0)
        sigma = [0.0, 0.0, 0.0]
        for axis, step in zip(view.axes[1:], view.spacing_mm[1:]):
            sigma[axis] = sigma_mm / step
        return np.asarray(ndimage.gaussian_filter(np.nan_to_num(volume.data), sigma))

    return change


def noise(share: float) -> Change:
    """Return a change that adds Rician noise of this share of the upper quartile of the signal."""

    def change(volume: Volume, rng: np.random.Generator) -> FloatArray:
        data = np.nan_to_num(volume.data)
        tissue = data[data > data.min()]
        real, imaginary = rng.normal(0.0, share * np.percentile(tissue, 75), (2, *volume.shape))
        noisy = np.hypot(data + real, imaginary)
        return np.where(data == 0, 0.0, noisy).astype(np.float32)

    return change


def ghosts(share: float, copies: int) -> Change:
    """Return a change that adds displaced copies along the rows, as periodic motion does."""

    def change(volume: Volume, rng: np.random.Generator) -> FloatArray:
        view = choose_view(volume, 1.0)
        result = np.array(np.nan_to_num(volume.data), dtype=np.float32)
        shown = view.to_view(result)
        rows = shown.shape[1]
        shifted = [np.roll(shown, rows * n // copies, axis=1) for n in range(1, copies)]
        shown += np.float32(share) * sum(shifted, start=np.zeros_like(shown))
        return result

    return change


def motion(shift_mm: float, bursts: int) -> Change:
    """Return a change that moves the head along the rows at random times of the acquisition.

    Each slice's lines of k-space fall into ``bursts`` runs, each with a displacement of its own.
    """

    def change(volume: Volume, rng: np.random.Generator) -> FloatArray:
        view = choose_view(volume, 1.0)
        result = np.array(np.nan_to_num(volume.data), dtype=np.float32)
        shown = view.to_view(result)
        frequency = np.fft.fftshift(np.fft.fftfreq(shown.shape[1]))
        for plane in shown:
            edges = np.sort(rng.choice(len(frequency), bursts - 1, replace=False))
            lengths = np.diff(np.concatenate([[0], edges, [len(frequency)]]))
            shift_px = np.repeat(rng.normal(0.0, shift_mm, bursts), lengths) / view.spacing_mm[1]
            shift_px[np.abs(frequency) < 0.01] = 0.0
            phase = np.fft.ifftshift(np.exp(-2j * np.pi * frequency * shift_px))
            plane[:] = np.abs(np.fft.ifft2(np.fft.fft2(plane) * phase[:, None]))
        return result

    return change


def drift(share: float) -> Change:
    """Return a change that gives each slice a brightness of its own."""

    def change(volume: Volume, rng: np.random.Generator) -> FloatArray:
        axis = choose_view(volume, 1.0).axes[0]
        gain = 1.0 + share * rng.standard_normal(volume.shape[axis])
        others = tuple(a for a in range(3) if a != axis)
        return np.asarray(volume.data * np.expand_dims(gain, others), dtype=np.float32)

    return change


CHANGES: Mapping[str, tuple[Change, str]] = {
    "blur 2 mm": (blur(2.0), "sharpness"),
    "blur 3 mm": (blur(3.0), "sharpness"),
    "noise 10 %": (noise(0.10), "noise"),
    "noise 15 %": (noise(0.15), "noise"),
    "ghosts 10 %": (ghosts(0.10, 4), "ghosting"),
    "motion 8 mm": (motion(8.0, 20), "ghosting"),
    "slice drift 10 %": (drift(0.10), "slice_steps"),
}
"""Each change, and the check that is meant to notice it."""


def row(name: str, volume: Volume) -> dict[str, str]:
    """Measure one scan."""
    measures = measure_scan(volume)
    checks = check_measures(measures)
    values = {
        key: "n/a" if value is None else f"{value:.3f}" for key, value in asdict(measures).items()
    }
    concerns = ", ".join(f"{c.name}: {c.verdict}" for c in checks if c.verdict != "pass")
    contrast = next(c.value for c in checks if c.name == "contrast")
    return {"scan": name, **values, "contrast": f"{contrast:.3f}", "concerns": concerns or "-"}


def main(arguments: list[str] | None = None) -> None:
    """Measure every scan of a folder and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pattern", default="*.nii.gz")
    parser.add_argument("--changes", action="store_true")
    options = parser.parse_args(arguments)
    header = False
    for path in sorted(options.folder.rglob(options.pattern)):
        if path.name.split("_")[-1].split(".")[0] not in ("FLAIR", "T1w", "T2w"):
            continue
        volume = Volume.read(path)
        rows = [row(path.relative_to(options.folder).as_posix(), volume)]
        for name, (change, _) in CHANGES.items() if options.changes else ():
            changed = replace(volume, data=change(volume, np.random.default_rng(SEED)))
            rows.append(row(f"  {name}", changed))
        if not header:
            sys.stdout.write("\t".join(rows[0]) + "\n")
            header = True
        for values in rows:
            sys.stdout.write("\t".join(values.values()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
