"""A BIDS folder of labelled scans with T1, their manifest and folds, and tiny methods for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.phantoms import head
from wmh_lora.data.catalog import make_manifest
from wmh_lora.data.manifest import write_manifest
from wmh_lora.data.split import split_folds, write_split
from wmh_lora.volume import write_nifti

#: Networks and patches that train a step in some hundredths of a second.
CONFIG = """
[comparison]
methods = ["compact", "unet-2d", "dynunet-t1", "threshold"]
folds = ["fold-1", "fold-2"]
seconds = 0.3

[preprocess]
pixel_size_mm = 4.0
margin_mm = 8.0
multiple_px = 8

[training]
batch_size = 2
crop = 32
workers = 0
device = "cpu"

[data]
manifest = "manifest.json"
split = "split.json"

[methods.compact]
kind = "wmh-lora"
model = {encoder = "compact", adaptation = "full", decoder_channels = [8, 8, 8, 8], \
structures = ["wmh"]}

[methods.unet-2d]
channels = [4, 6, 8]
members = 2

[methods.dynunet-t1]
kind = "dynunet"
t1 = true
filters = [4, 6, 8]
patch_px = [4, 32, 32]

[methods.unetr]
patch_px = [16, 32, 32]
feature_size = 4
hidden_size = 24
mlp_dim = 24
num_heads = 2

[methods.threshold]
"""


def write_comparison_scans(folder: Path, count: int = 3) -> Path:
    """Scans of ``count`` people in three folds, all but the last with T1; returns the settings."""
    root = folder / "scans"
    for number in range(count):
        volume, mask = head(seed=number)
        anatomy = root / f"sub-{number}" / "anat"
        labels = root / "derivatives" / "manual" / f"sub-{number}" / "anat"
        for place in (anatomy, labels):
            place.mkdir(parents=True)
        write_nifti(anatomy / f"sub-{number}_FLAIR.nii.gz", volume.data, volume)
        write_nifti(labels / f"sub-{number}_label-WMH_mask.nii.gz", mask, volume)
        if number < count - 1:
            t1 = np.where(volume.data > 400, 300.0, 2 * volume.data).astype(np.float32)
            write_nifti(anatomy / f"sub-{number}_T1w.nii.gz", t1, volume)
    manifest = write_manifest(make_manifest(root, "bids"), folder / "manifest.json")
    write_split(split_folds(manifest, 3), folder / "split.json")
    config = folder / "comparison.toml"
    config.write_text(CONFIG.replace("[data]", f'[data]\nroot = "{folder.as_posix()}"'))
    return config
