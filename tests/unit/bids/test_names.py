"""Names: read and written back, entities in the order of BIDS."""

from __future__ import annotations

import pytest

from wmh_lora.bids.names import derived_files, parse_name
from wmh_lora.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "folder", "stem"),
    [
        ("sub-01_FLAIR.nii.gz", "sub-01/anat", "sub-01"),
        ("sub-A1_ses-2_FLAIR.nii", "sub-A1/ses-2/anat", "sub-A1_ses-2"),
        (
            "sub-1_ses-b_acq-3d_ce-gd_rec-x_run-02_echo-1_part-mag_chunk-3_FLAIR.nii.gz",
            "sub-1/ses-b/anat",
            "sub-1_ses-b_acq-3d_ce-gd_rec-x_run-02_echo-1_part-mag_chunk-3",
        ),
    ],
)
def test_reads_and_writes_back(name: str, folder: str, stem: str) -> None:
    read = parse_name(name)
    assert read.folder.as_posix() == folder
    assert read.stem == stem
    assert read.suffix == "FLAIR"
    assert read.with_entities() == name.split(".")[0]


def test_derivatives_stand_in_the_order_of_bids() -> None:
    # BIDS 1.10, appendix on entities: ... part, ..., space, ..., chunk, ..., label
    files = derived_files("out", parse_name("sub-1_part-mag_chunk-3_FLAIR.nii.gz"))
    assert files.mask.name == "sub-1_part-mag_space-orig_chunk-3_label-WMH_mask.nii.gz"
    assert len({path.name for path in files}) == len(files)
    assert {path.parent.as_posix() for path in files} == {"out/sub-1/anat"}


@pytest.mark.parametrize(
    "name",
    [
        "FLAIR.nii.gz",
        "patient1_FLAIR.nii.gz",
        "ses-1_FLAIR.nii.gz",
        "sub-01_sub-02_FLAIR.nii.gz",
        "sub-0.1_FLAIR.nii.gz",
        "sub-01_foo-1_FLAIR.nii.gz",
    ],
)
def test_what_is_no_bids_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no BIDS name.*sub-<label>"):
        parse_name(name)
