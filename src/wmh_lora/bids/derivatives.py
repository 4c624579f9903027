"""Write the results of a scan as BIDS derivatives, and know them again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from wmh_lora._version import __version__
from wmh_lora.bids.discovery import RawScan
from wmh_lora.bids.names import DerivedFiles, derived_files, parse_name
from wmh_lora.config import InferenceConfig
from wmh_lora.config_reading import from_dict
from wmh_lora.errors import ConfigError
from wmh_lora.files import file_sha256, is_folder, open_atomic
from wmh_lora.report.html import scan_html
from wmh_lora.report.montage import png_bytes
from wmh_lora.report.saving import output_folder, saved_together
from wmh_lora.report.segmented import Reported
from wmh_lora.volume import write_nifti

__all__ = [
    "BIDS_VERSION",
    "State",
    "dataset_description",
    "results_state",
    "save_scan",
    "save_segmentation",
    "settings_record",
    "write_dataset_files",
]

BIDS_VERSION = "1.10.0"
_SOFTWARE = "WMH-LoRA"
_RECORDED = (
    "threshold",
    "min_voxels",
    "min_peak",
    "min_contrast",
    "tta",
    "planes",
    "zoom",
    "adaptive",
    "precision",
)
_MODEL = {
    "Name": "name",
    "SHA256": "sha256",
    "BaseEncoder": "base_encoder",
    "BaseEncoderSHA256": "base_sha256",
    "AdapterSHA256": "adapter_sha256",
}
_OWN_FILES = ("wmh.tsv", "wmh.json", "wmh.html")
_IGNORED = ("*_wmh.json", "*_wmh.png", "*_wmh.html", *(f"/{name}" for name in _OWN_FILES))

State = Literal["absent", "partial", "finished", "different"]

_README = """\
# White matter hyperintensities

Derivatives of the FLAIR scans of a BIDS data set (`bids:raw:` in the sidecars), made by
WMH-LoRA {version}, research software and not a medical device.

For each scan, in `sub-<label>/[ses-<label>/]anat`:

| file | what |
|---|---|
| `*_space-orig_label-WMH_mask.nii.gz` | lesions (1), on the scan's own grid |
| `*_space-orig_label-WMH_probseg.nii.gz` | probability of lesion before the threshold, in [0, 1] |
| `*_mask.json`, `*_probseg.json` | source and settings |
| `*_wmh.json` | volumes, every lesion, regions, quality checks |
| `*_wmh.png`, `*_wmh.html` | slices with outlines; a page with a viewer |

The group level writes `wmh.tsv`, described by `wmh.json`, and the page `wmh.html`. BIDS has no
names for reports and this table, so `.bidsignore` lists them.

## Licence

Masks and probability maps are derived from the scans: the terms of the source data set apply to
them. The model's own licence is named in its model card.
"""


def settings_record(
    model: Mapping[str, str], inference: InferenceConfig, *, t1_registered: bool = False
) -> dict[str, Any]:
    """Collect what decides a mask beside the scan, as sidecars record it.

    Parameters
    ----------
    model : mapping
        From `wmh_lora.models.registry.Model.describe`.
    inference : InferenceConfig
        As used. What changes memory and speed alone is left out.
    t1_registered : bool
        Whether T1s were moved to where their FLAIRs are.
    """
    return {
        "Threshold": inference.threshold,
        "ThresholdInThreePlanes": inference.threshold_of(3),
        "MinimumLesionVoxels": inference.min_voxels,
        "MinimumLesionPeakProbability": inference.min_peak,
        "MinimumLesionContrast": inference.min_contrast,
        "TestTimeAugmentation": inference.tta,
        "Planes": inference.planes,
        "Zoom": inference.zoom,
        "Adaptive": inference.adaptive,
        "Precision": inference.precision,
        "Model": {entry: model[key] for entry, key in _MODEL.items() if key in model},
        "SoftwareVersion": __version__,
        **({"T1Registered": True} if t1_registered else {}),
    }


def results_state(out_dir: Path, scan: RawScan, record: Mapping[str, Any]) -> State:
    """Say whether a scan is done.

    Parameters
    ----------
    out_dir : Path
        The derivatives.
    scan : RawScan
    record : mapping
        From `settings_record`, of the run to come.

    Returns
    -------
    str
        ``"absent"``: there is nothing. ``"finished"``: every file is there, from this scan with
        these settings. ``"different"``: made with other settings, or from another version of the
        scan. ``"partial"``: files are missing or damaged.
    """
    files = derived_files(out_dir, scan.name)
    present = [path for path in files if os.path.lexists(path)]
    if not present:
        return "absent"
    t1_sha256 = None if scan.t1 is None else _sha256(scan.t1)
    expected = _sidecars(scan, record, _sha256(scan.source), t1_sha256)
    written = (_read_sidecar(files.mask_sidecar), _read_sidecar(files.probability_sidecar))
    if any(
        found is not None and not _agree(found, wanted) for found, wanted in zip(written, expected)
    ):
        return "different"
    return "finished" if len(present) == len(files) and None not in written else "partial"


def save_scan(
    segmentation: Reported,
    scan: RawScan,
    out_dir: Path,
    record: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write all files of a scan, or none.

    Parameters
    ----------
    segmentation : wmh_lora.report.outputs.Segmentation
        Of the scan.
    scan : RawScan
    out_dir : Path
        The derivatives.
    record : mapping
        From `settings_record`.
    overwrite : bool
        Replace files that are there.

    Returns
    -------
    dict
        The report, as saved.

    Raises
    ------
    DataError
        If files exist and ``overwrite`` is not set, or if they cannot be written.
    ConfigError
        If the folder cannot be made or written to.
    """
    report = segmentation.report()
    files = derived_files(out_dir, scan.name)
    mask_sidecar, probability_sidecar = _sidecars(
        scan, record, report["file_sha256"], report["t1_sha256"]
    )
    picture_png = png_bytes(segmentation.picture())
    page = scan_html(segmentation, report, picture_png=picture_png)
    with saved_together(files, overwrite=overwrite) as temporary:
        # sidecars come last: a set that has them is complete
        partial = DerivedFiles(*(temporary[path] for path in files))
        write_nifti(partial.mask, segmentation.mask, segmentation.volume)
        write_nifti(partial.probability, segmentation.probability, segmentation.volume)
        partial.picture.write_bytes(picture_png)
        for path, text in (
            (partial.report, _json(report)),
            (partial.page, page),
            (partial.probability_sidecar, _json(probability_sidecar)),
            (partial.mask_sidecar, _json(mask_sidecar)),
        ):
            path.write_text(text, encoding="utf-8")
    return report


def save_segmentation(
    segmentation: Reported,
    out_dir: Path,
    *,
    raw_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a scan of a BIDS data set; see `wmh_lora.report.outputs.Segmentation.to_bids`."""
    source = segmentation.volume.path
    if source is None:
        raise ConfigError(
            "The scan is an image in memory, so its place in a data set is not known; segment the "
            "file of a BIDS data set, or write it with save()."
        )
    source = source.resolve()
    name = parse_name(source.name)
    if taken := name.of_derivatives:
        raise ConfigError(
            f"{source} is no scan of a raw data set, by {taken[0]}- in its name, which the results "
            "need for themselves; write them with save()."
        )
    depth = min(len(name.folder.parts), len(source.parents) - 1)
    root = Path(raw_dir).resolve() if raw_dir is not None else source.parents[depth]
    if root not in source.parents or source.parent != root / name.folder:
        raise ConfigError(
            f"{source} does not lie in {name.folder} of the data set {root}, where BIDS keeps it; "
            "name the data set with raw_dir, or write the results with save()."
        )
    settings = segmentation.settings
    inference = from_dict(
        InferenceConfig, {key: settings[key] for key in _RECORDED if key in settings}
    )
    if thresholds := settings.get("thresholds"):  # those of the run, not this scan's alone
        inference = inference.changed(
            threshold=thresholds["one_plane"], threshold_three_planes=thresholds["three_planes"]
        )
    scan = RawScan(root, source.relative_to(root), name, _t1_below(root, segmentation))
    raw = _read_sidecar(root / "dataset_description.json") or {}
    record = settings_record(
        segmentation.model, inference, t1_registered=settings.get("register_t1", False)
    )
    with output_folder(out_dir):
        write_dataset_files(out_dir, root, raw)
        save_scan(segmentation, scan, out_dir, record, overwrite=overwrite)
    return derived_files(out_dir, name).mask


def _t1_below(root: Path, segmentation: Reported) -> Path | None:
    """Path of the T1 within the data set, if one was used."""
    if not segmentation.settings.get("t1"):
        return None
    path = segmentation.t1_path and segmentation.t1_path.resolve()
    if path is None or root not in path.parents:
        raise ConfigError(
            f"The T1 ({path or 'an image in memory'}) is no file of the data set {root}, so the "
            "sidecars cannot name it; write the results with save()."
        )
    return path.relative_to(root)


def _sidecars(
    scan: RawScan, record: Mapping[str, Any], source_sha256: str, t1_sha256: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sidecars of mask and probability map; they hold no results, so a rerun can compare them."""
    common = {
        "Type": "Lesion",
        "Sources": scan.uris,
        "SourceSHA256": source_sha256,
        **({} if t1_sha256 is None else {"T1SHA256": t1_sha256}),
        "SpatialReference": "orig",
        "Manual": False,
        **record,
    }
    if t1_sha256 is None:  # settings are of a run, in which others may have a T1
        common.pop("T1Registered", None)
    mask = "White matter hyperintensities: 1 lesion, 0 background, on the grid of the source"
    probability = "Probability of white matter hyperintensity before the threshold, in [0, 1]"
    return {"Description": mask, **common}, {"Description": probability, **common}


def _sha256(path: Path) -> str:
    """Checksum of a scan, or nothing where its content is not at hand (a link of git-annex)."""
    return file_sha256(path) if path.is_file() else ""


def _agree(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Compare sidecars, but for checksums that cannot be told now."""
    unknown = {key for key, value in wanted.items() if value == ""}
    return {**found, **dict.fromkeys(unknown)} == {**wanted, **dict.fromkeys(unknown)}


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or cut off: to be made again
        return None
    return content if isinstance(content, dict) else None


def dataset_description(out_dir: Path, raw_dir: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``dataset_description.json`` of the derivatives.

    Parameters
    ----------
    out_dir, raw_dir : Path
        The derivatives and the data set, which is linked by its path relative to them.
    raw : mapping
        Description of the data set, of which name, DOI and licence are taken where they are given.
    """
    source = {"URL": "bids:raw:"}
    if isinstance(raw.get("DatasetDOI"), str):
        source["DOI"] = raw["DatasetDOI"]
    name = raw.get("Name")
    description: dict[str, Any] = {
        "Name": f"White matter hyperintensities{f' of {name}' if name else ''}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [
            {
                "Name": _SOFTWARE,
                "Version": __version__,
                "Description": "Segments white matter hyperintensities on FLAIR MRI",
            }
        ],
        "SourceDatasets": [source],
        "DatasetLinks": {"raw": _link(out_dir.resolve(), raw_dir.resolve())},
    }
    if isinstance(raw.get("License"), str):
        description["License"] = raw["License"]
    return description


def _link(out_dir: Path, raw_dir: Path) -> str:
    try:
        return Path(os.path.relpath(raw_dir, out_dir)).as_posix()
    except ValueError:  # another drive of Windows
        return raw_dir.as_uri()


def write_dataset_files(out_dir: Path, raw_dir: Path, raw: Mapping[str, Any]) -> None:
    """Write description, README and ``.bidsignore`` of the derivatives, or renew our part of them.

    What a user has added stays: further entries of the description, further lines of
    ``.bidsignore``, another README.

    Raises
    ------
    ConfigError
        If the folder is the data set itself, holds another data set, or derivatives of another.
    DataError
        If a file cannot be written.
    """
    if out_dir.resolve() == raw_dir.resolve():
        raise ConfigError(
            f"{out_dir} is the data set itself; choose another output folder, such as "
            f"{raw_dir / 'derivatives' / 'wmh-lora'}."
        )
    path = out_dir / "dataset_description.json"
    before = _own_description(path, raw_dir)
    readme, ignored = out_dir / "README.md", out_dir / ".bidsignore"
    lines = dict.fromkeys((*_text(ignored).splitlines(), *_IGNORED))
    contents = {
        path: _json({**before, **dataset_description(out_dir, raw_dir, raw)}),
        ignored: "".join(f"{line}\n" for line in lines),
    }
    our_readme = _README.partition("{version}")[0]
    if _text(readme).startswith(our_readme) or not readme.exists():
        contents[readme] = _README.format(version=__version__)
    for target, text in contents.items():
        content = text.encode("utf-8", "surrogateescape")
        if not target.is_file() or target.read_bytes() != content:
            with open_atomic(target, overwrite=True) as stream:
                stream.write(content)


def _own_description(path: Path, raw_dir: Path) -> dict[str, Any]:
    """Read the description that this wrote before, if any; ConfigError if it is another's."""
    if not os.path.lexists(path):
        return {}
    description = _read_sidecar(path) or {}
    if not _is_ours(description):
        raise ConfigError(
            f"{path.parent} holds another data set, by its dataset_description.json; choose "
            "another output folder."
        )
    before = _linked_raw(path.parent, description)
    if before is not None and before != raw_dir.resolve():
        raise ConfigError(
            f"{path.parent} holds derivatives of {before}, by its dataset_description.json; choose "
            "another output folder."
        )
    return description


def _is_ours(description: Mapping[str, Any]) -> bool:
    makers = description.get("GeneratedBy")
    return isinstance(makers, list) and any(
        isinstance(maker, dict) and maker.get("Name") == _SOFTWARE for maker in makers
    )


def _linked_raw(out_dir: Path, description: Mapping[str, Any]) -> Path | None:
    """Return the data set that derivatives link to, if it is still there."""
    links = description.get("DatasetLinks")
    link = links.get("raw") if isinstance(links, dict) else None
    if not isinstance(link, str) or "://" in link:
        return None
    folder = (out_dir / link).resolve()
    return folder if is_folder(folder) else None


def _text(path: Path) -> str:
    """Read a file that a user may have written, in any encoding; nothing where it cannot be."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
