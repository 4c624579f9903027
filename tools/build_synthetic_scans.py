"""Write labelled synthetic scans that no training has seen: for calibration and for tests.

    python tools/build_synthetic_scans.py PRESET -o FOLDER [--count 24] [--seed 1000]
        [--set data.root=PATH]

The sources are those of a training configuration, the scans are not: training draws from the
configuration's seed, these from ``--seed`` and their number. FOLDER receives ``images`` and
``labels``, as ``wmh-lora tune MODEL --images FOLDER/images --references FOLDER/labels`` takes them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from wmh_lora.config_reading import from_dict
from wmh_lora.data.dataset import TrainingStream
from wmh_lora.data.sources import DataConfig
from wmh_lora.training.settings import read_run_config
from wmh_lora.volume import write_nifti


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    given = parser.parse_args()
    config = read_run_config(given.preset, given.changes)
    if given.seed == config.training.seed:
        parser.error(f"--seed {given.seed} is the seed of the training; choose another.")
    stream = TrainingStream(
        from_dict(DataConfig, config.data),
        given.seed,
        config.training.crop,
        config.preprocess,
        config.model.structures,
    )
    for kind in ("images", "labels"):
        (given.output / kind).mkdir(parents=True, exist_ok=True)
    for number in range(given.count):
        case, _ = stream.visible_case(np.random.default_rng([given.seed, number]))
        name = f"synthetic-{number:03d}"
        image = given.output / "images" / f"{name}_FLAIR.nii.gz"
        write_nifti(image, case.volume.data, case.volume, overwrite=True)
        label = given.output / "labels" / f"{name}_mask.nii.gz"
        write_nifti(label, case.lesion_labels, case.volume, overwrite=True)


if __name__ == "__main__":
    main()
