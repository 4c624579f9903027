"""How far a mask moves when only the scanner changes.

    python -m benchmarks.robustness FLAIR.nii.gz [--reference MASK.nii.gz] [--model NAME|FILE]

Segments the scan as it is and after each change of `CHANGES` and `SCALPS`: monotone intensity
curves, coil sensitivity, blur, noise, slice drift, clipping; a brighter scalp, and none. Prints, as
JSON on stdout, the Dice of each mask
with the mask of the unchanged scan, the volumes, and with a reference the Dice with that. A model
that is invariant to its scanner keeps the first near 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.evaluation.metrics import dice
from wmh_lora.volume import Volume

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
SEED = 42


def _unit(image: FloatArray) -> tuple[FloatArray, float]:
    """Scale so that the brightest thousandth lies at 1; return the scale, too."""
    top = float(np.percentile(image, 99.9))
    return image / top, top


def _curve(exponent: float) -> Callable[[Volume], FloatArray]:
    def change(volume: Volume) -> FloatArray:
        unit, top = _unit(volume.data)
        return np.asarray(np.clip(unit, 0.0, None) ** exponent * top, dtype=np.float32)

    return change


def _s_curve(volume: Volume) -> FloatArray:
    """Compress both ends, as a display window saved into the data does."""
    unit, top = _unit(volume.data)
    return np.asarray(np.tanh(1.5 * unit) / np.tanh(1.5) * top, dtype=np.float32)


def _coil(volume: Volume) -> FloatArray:
    """Multiply by a slope of 30 % along the second axis and 20 % along the first."""
    across = np.linspace(0.9, 1.1, volume.shape[0])[:, None, None]
    along = np.linspace(0.85, 1.15, volume.shape[1])[None, :, None]
    gain = across * along
    return np.asarray(volume.data * gain, dtype=np.float32)


def _blur(volume: Volume) -> FloatArray:
    sigma = [0.8 / s if s < 2.0 else 0.0 for s in volume.spacing_mm]
    return np.asarray(ndimage.gaussian_filter(volume.data, sigma), dtype=np.float32)


def add_noise(volume: Volume) -> FloatArray:
    """Add Rician noise of 4 % of the brightest tissue."""
    unit, top = _unit(volume.data)
    rng = np.random.default_rng(SEED)
    noise = 0.04 * rng.standard_normal((2, *volume.shape), dtype=np.float32)
    noisy = np.hypot(unit + noise[0], noise[1])
    return np.asarray(np.where(volume.data == 0, 0.0, noisy * top), dtype=np.float32)


def _drift(volume: Volume) -> FloatArray:
    """Change the brightness of each slice by 4 % (standard deviation) along the coarsest axis."""
    axis = int(np.argmax(volume.spacing_mm))
    gain = 1.0 + 0.04 * np.random.default_rng(SEED).standard_normal(volume.shape[axis])
    others = tuple(a for a in range(3) if a != axis)
    return np.asarray(volume.data * np.expand_dims(gain, others), dtype=np.float32)


def _clip(volume: Volume) -> FloatArray:
    """Saturate the brightest hundredth of the tissue."""
    tissue = volume.data[volume.data > 0]
    return np.minimum(volume.data, np.float32(np.percentile(tissue, 99.0)))


CHANGES: Mapping[str, Callable[[Volume], FloatArray]] = {
    "gamma 0.7": _curve(0.7),
    "gamma 1.4": _curve(1.4),
    "s-curve": _s_curve,
    "coil": _coil,
    "blur 0.8 mm": _blur,
    "noise 4 %": add_noise,
    "slice drift 4 %": _drift,
    "clipped at 99 %": _clip,
}

SCALPS: Mapping[str, float] = {"scalp 3 times as bright": 3.0, "without scalp": 0.0}
"""By what to multiply all that lies more than `_MARGIN_MM` outside the brain of the unchanged scan:
fat that is not suppressed, and a generous brain extraction."""

_MARGIN_MM = 3.0


def _scalp(volume: Volume, brain: BoolArray, gain: float) -> FloatArray:
    outside_mm = ndimage.distance_transform_edt(~brain, sampling=volume.spacing_mm)
    return np.where(outside_mm > _MARGIN_MM, volume.data * np.float32(gain), volume.data)


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("image")
    parser.add_argument("--reference")
    parser.add_argument("--model", default="default")
    options = parser.parse_args(arguments)
    engine = WMHInferenceEngine(load_model(options.model), "cpu")
    scan = Volume.read(options.image)
    reference = None
    if options.reference:
        reference = Volume.read(options.reference, allow_constant=True).data == 1
    unchanged = engine.segment(scan)
    base = np.asarray(unchanged.mask > 0)
    changes = {name: partial(change, scan) for name, change in CHANGES.items()}
    if "brain" in unchanged.structure_masks:
        brain = unchanged.structure_masks["brain"] > 0
        changes |= {name: partial(_scalp, scan, brain, gain) for name, gain in SCALPS.items()}
    rows = []
    for name, change in {"unchanged": None, **changes}.items():
        result = engine.segment(replace(scan, data=change())) if change else unchanged
        mask = np.asarray(result.mask > 0)
        row: dict[str, str | float] = {"change": name}
        row["dice_with_unchanged"] = round(dice(mask, base), 4)
        row["volume_ml"] = round(result.volume_ml, 3)
        if reference is not None:
            row["dice"] = round(dice(mask, reference), 4)
        rows.append(row)
        sys.stderr.write(f"{row}\n")
    worst = min(float(row["dice_with_unchanged"]) for row in rows)
    document = {"model": engine.model_description, "worst": worst, "rows": rows}
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
