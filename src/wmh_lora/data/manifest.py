"""The manifest: which labelled scans there are, what is in them, and proof that they are the same.

It is one JSON file with a line for each scan. JSON, because shapes, spacings and problems are lists
and a missing number is not an empty word; one file, because a table and its description get
separated. Equal folders give equal bytes: no time, user or absolute path is stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wmh_lora.config_reading import from_dict, to_dict
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.files import file_sha256, open_atomic
from wmh_lora.logs import Progress

__all__ = ["UNUSABLE", "Manifest", "Problem", "Scan", "read_manifest", "write_manifest"]

_KIND = "wmh-lora manifest"
_FORMAT = 1

#: Problems that keep a scan out of training and evaluation; others are for the reader to judge.
UNUSABLE = frozenset(
    {
        "missing-mask",
        "several-masks",
        "unreadable-image",
        "unreadable-mask",
        "grid-mismatch",
        "label-values",
    }
)


_UNUSABLE_T1 = frozenset({"unreadable-t1", "t1-apart"})


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a scan.

    Attributes
    ----------
    code : str
        A member of `UNUSABLE`, or ``empty-mask``, ``duplicate-image``, ``unreadable-t1``,
        ``t1-apart``, ``unreadable-structure``, ``structure-grid``.
    message : str
        What was found, and what to do.
    """

    code: str
    message: str


@dataclass(frozen=True)
class Scan:
    """One row of the manifest.

    Attributes
    ----------
    subject, session, run, site : str
        Whose scan it is. Scans of one subject never go to different parts of a split.
    usable : bool
        Whether it can be trained on and evaluated.
    image, mask, t1 : str
        Paths below the manifest's root, with forward slashes; empty where there is none.
    image_sha256, mask_sha256, t1_sha256 : str
        Of the files; empty where there is none or it cannot be opened.
    structures, structures_sha256 : mapping of str to str
        Paths and hashes of the masks of other structures (``ventricles``, ``brain``) by name; those
        that can be used.
    shape : tuple of int, or None
        Voxels of the image along its axes; None if it is unreadable.
    spacing_mm : tuple of float, or None
        Voxel edges of the image.
    reference_ml : float or None
        Volume of label 1 in the mask; None unless mask and image are readable and on one grid.
    ignored_ml : float or None
        Volume of label 2, other pathology, which is neither lesion nor background.
    labels : tuple of int
        Values in the mask, where they are whole numbers.
    problems : tuple of Problem
        What is wrong with it.
    """

    subject: str
    session: str
    run: str
    site: str
    usable: bool
    image: str
    image_sha256: str
    mask: str
    mask_sha256: str
    # of manifests made before these were listed
    t1: str = field(default="", kw_only=True)
    t1_sha256: str = field(default="", kw_only=True)
    structures: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    structures_sha256: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    shape: tuple[int, int, int] | None
    spacing_mm: tuple[float, float, float] | None
    reference_ml: float | None
    ignored_ml: float | None
    labels: tuple[int, ...]
    problems: tuple[Problem, ...]

    @property
    def name(self) -> str:
        """Subject, session and run in one word, distinct within a manifest."""
        session = f"ses-{self.session}" if self.session else ""
        return "_".join(part for part in (self.subject, session, self.run) if part)

    @property
    def usable_t1(self) -> str:
        """Path of the T1, or empty where there is none that shows the image's region."""
        spoilt = any(problem.code in _UNUSABLE_T1 for problem in self.problems)
        return "" if spoilt else self.t1

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 by path of every file of the scan that could be opened."""
        files = {
            self.image: self.image_sha256,
            self.mask: self.mask_sha256,
            self.t1: self.t1_sha256,
            **{path: self.structures_sha256[name] for name, path in self.structures.items()},
        }
        return {path: digest for path, digest in files.items() if path and digest}


@dataclass(frozen=True)
class Manifest:
    """The labelled scans of a folder.

    Attributes
    ----------
    root : Path
        Folder that the scans' paths start from.
    layout : str
        How the folder is arranged: ``challenge``, ``bids`` or ``flat``.
    scans : tuple of Scan
        Sorted by site, subject, session and run.
    unmatched_masks : tuple of str
        Masks that belong to no image.
    path : Path or None
        File that it was read from.
    sha256 : str
        Of that file; empty for a manifest that is not stored yet.
    """

    root: Path
    layout: str
    scans: tuple[Scan, ...]
    unmatched_masks: tuple[str, ...] = ()
    path: Path | None = None
    sha256: str = ""

    @property
    def usable(self) -> tuple[Scan, ...]:
        """Scans that can be trained on and evaluated."""
        return tuple(scan for scan in self.scans if scan.usable)

    def file(self, path: str) -> Path:
        """Return where a file of a scan lies."""
        return self.root / path

    def verify(self, progress: Progress | None = None) -> None:
        """Hash every file again, and compare.

        Raises
        ------
        DataError
            Files have changed, vanished or cannot be read; the message names every one.
        """
        expected = {p: digest for scan in self.scans for p, digest in scan.hashes.items()}
        wrong = []
        for done, (path, digest) in enumerate(sorted(expected.items())):
            if progress is not None:
                progress(done, len(expected), path)
            if (state := _state(self.file(path), digest)) is not None:
                wrong.append(f"{path} ({state})")
        if wrong:
            raise DataError(
                f"{len(wrong)} of the {len(expected)} files that {self.path or 'the manifest'} "
                f"lists below {self.root} are not what they were: {', '.join(wrong)}. Restore "
                "them, or make the manifest again with `wmh-lora data prepare`."
            )


def _state(path: Path, digest: str) -> str | None:
    """Say what has become of a file, or None if it is the same."""
    try:
        return None if file_sha256(path) == digest else "changed"
    except FileNotFoundError:
        return "vanished"
    except OSError as error:
        return f"unreadable: {error.strerror}"


def write_manifest(manifest: Manifest, path: Path, *, overwrite: bool = False) -> Manifest:
    """Store a manifest, and return it as `read_manifest` would.

    The root is stored relative to the manifest's folder, so both can be moved together.

    Raises
    ------
    DataError
        The file exists, or cannot be written.
    """
    head = {
        "kind": _KIND,
        "format": _FORMAT,
        "layout": manifest.layout,
        "root": _relative(manifest.root, path.parent),
        "unmatched_masks": list(manifest.unmatched_masks),
    }
    text = "".join(_json_lines(head, manifest.scans))
    data = text.encode("utf-8")
    with open_atomic(path, overwrite=overwrite) as stream:
        stream.write(data)
    return dataclasses.replace(manifest, path=path, sha256=hashlib.sha256(data).hexdigest())


def _relative(root: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(root.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive, on Windows
        return root.resolve().as_posix()


def _json_lines(head: dict[str, Any], scans: Sequence[Scan]) -> Iterator[str]:
    """Yield a JSON document with one scan a line, for people who search it or compare two."""
    yield "{\n"
    for key, value in head.items():
        yield f'  "{key}": {json.dumps(value, ensure_ascii=False)},\n'
    rows = [json.dumps(to_dict(scan), ensure_ascii=False, allow_nan=False) for scan in scans]
    yield '  "scans": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"


def read_manifest(
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    root: Path | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Read a manifest and, unless told otherwise, check that its files are unchanged.

    Parameters
    ----------
    path : path-like
        The file that `write_manifest` made.
    verify : bool
        Hash every file again. Nothing else tells a changed file: sizes and times are not looked at.
    root : Path, optional
        Folder of the scans, where it is no longer where it was beside the manifest.
    progress : Progress, optional
        Called while files are hashed.

    Raises
    ------
    DataError
        The file is no manifest; or, with `verify`, files have changed or vanished.
    """
    source = Path(path)
    try:
        data = source.read_bytes()
        document = json.loads(data)
    except OSError as error:
        raise DataError(f"Cannot read the manifest {source}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{source} is not a manifest (no JSON: {error}).") from error
    if not isinstance(document, dict) or document.get("kind") != _KIND:
        raise DataError(f"{source} is not a manifest; make one with `wmh-lora data prepare`.")
    if document.get("format") != _FORMAT:
        raise DataError(
            f"{source} is a manifest of format {document.get('format')}, this version reads "
            f"{_FORMAT}; make it again with `wmh-lora data prepare`."
        )
    try:
        manifest = Manifest(
            root=root or Path(os.path.normpath(source.parent.resolve() / document["root"])),
            layout=document["layout"],
            scans=tuple(from_dict(Scan, row) for row in document["scans"]),
            unmatched_masks=tuple(document["unmatched_masks"]),
            path=source,
            sha256=hashlib.sha256(data).hexdigest(),
        )
    except (ConfigError, KeyError, TypeError) as error:
        raise DataError(f"{source} is a damaged manifest ({error}); make it again.") from error
    if verify:
        manifest.verify(progress)
    return manifest
