"""The result of segmenting one scan, and the four files that it is saved as.

A scan's files appear together or not at all: they are written to a hidden folder beside their
targets and then renamed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wmh_lora.errors import ConfigError, DataError
from wmh_lora.files import image_stem, write_failure
from wmh_lora.postprocess import Lesion
from wmh_lora.report.tables import scan_report
from wmh_lora.volume import Volume, write_nifti

__all__ = ["OutputFiles", "Segmentation", "output_files", "output_folder", "saved_together"]


class OutputFiles(NamedTuple):
    """Paths of one scan's results, in the order in which they are made."""

    mask: Path
    probability: Path
    report: Path
    picture: Path


def output_files(out_dir: str | Path, stem: str) -> OutputFiles:
    """Name the files of one scan, in the manner of BIDS derivatives.

    Examples
    --------
    >>> output_files("out", "sub-01").mask.name
    'sub-01_space-orig_label-WMH_mask.nii.gz'
    """
    folder = Path(out_dir)
    return OutputFiles(
        mask=folder / f"{stem}_space-orig_label-WMH_mask.nii.gz",
        probability=folder / f"{stem}_space-orig_label-WMH_probseg.nii.gz",
        report=folder / f"{stem}_wmh.json",
        picture=folder / f"{stem}_wmh.png",
    )


@dataclass(frozen=True)
class Segmentation:
    """White matter hyperintensities found in one scan, on the scan's own grid.

    Attributes
    ----------
    volume : Volume
        The scan.
    probability : float32 array (I, J, K)
        In [0, 1], before the threshold.
    mask : uint8 array (I, J, K)
        1 lesion, 0 background.
    lesions : tuple of Lesion
        26-connected components, the largest first.
    volume_ml : float
        Total lesion volume in millilitres.
    settings : mapping
        Threshold, smallest lesion size, test-time augmentation and device, as used.
    model : mapping
        Name, sha256 and base encoder of the model.
    warnings : tuple of str
        What a reader should know before trusting the numbers.
    """

    volume: Volume
    probability: NDArray[np.float32]
    mask: NDArray[np.uint8]
    lesions: tuple[Lesion, ...]
    volume_ml: float
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def report(self) -> dict[str, Any]:
        """Return the content of ``<stem>_wmh.json``, see `wmh_lora.report.tables.scan_report`."""
        return scan_report(
            volume=self.volume,
            lesions=self.lesions,
            volume_ml=self.volume_ml,
            settings=self.settings,
            model=self.model,
            warnings=self.warnings,
        )

    def save(
        self,
        out_dir: str | Path,
        *,
        overwrite: bool = False,
        stem: str | None = None,
        reference: NDArray[Any] | None = None,
    ) -> OutputFiles:
        """Write mask, probability map, report and picture.

        Parameters
        ----------
        out_dir : path
            Made if it is absent.
        overwrite : bool
            Replace results that are there already.
        stem : str, optional
            Start of the file names; by default the scan's name without ``_FLAIR`` and extension.
        reference : array (I, J, K), optional
            A reference mask to outline in the picture as well.

        Returns
        -------
        OutputFiles

        Raises
        ------
        DataError
            If results exist and ``overwrite`` is not set, or if they cannot be written; nothing
            of the scan is then left behind.
        """
        if stem is None:
            stem = image_stem(self.volume.path) if self.volume.path else "scan"
        files = output_files(out_dir, stem)
        with saved_together(files, overwrite=overwrite) as temporary:
            partial = OutputFiles(*(temporary[path] for path in files))
            write_nifti(partial.mask, self.mask, self.volume)
            write_nifti(partial.probability, self.probability, self.volume)
            text = json.dumps(self.report(), indent=2, ensure_ascii=False)
            partial.report.write_text(text + "\n", encoding="utf-8")
            self.picture(reference).save(partial.picture)
        return files

    def picture(self, reference: NDArray[Any] | None = None) -> Any:
        """Draw the montage, a `PIL.Image.Image`, see `wmh_lora.report.montage.montage`."""
        from wmh_lora.report.montage import montage

        name = self.volume.path.name if self.volume.path else "scan"
        count = len(self.lesions)
        title = f"{name}: {self.volume_ml:.2f} mL in {count} lesion{'' if count == 1 else 's'}"
        return montage(self.volume, self.mask, title=title, reference=reference)


@contextmanager
def saved_together(
    targets: Sequence[Path], *, overwrite: bool = False
) -> Iterator[dict[Path, Path]]:
    """Let several files of one folder appear at once, or none of them.

    Parameters
    ----------
    targets : sequence of Path
        Files in one folder, which is made if it is absent.
    overwrite : bool
        Replace files that are there already.

    Yields
    ------
    dict
        For each target the temporary path to write instead. All must exist when the block ends.

    Raises
    ------
    DataError
        If a target exists and ``overwrite`` is not set, or on any error of the file system.
    """
    existing = [path for path in targets if os.path.lexists(path)]
    if existing and not overwrite:
        raise DataError(
            f"{existing[0]} exists already and is left as it is; allow overwriting, or choose "
            "another output folder."
        )
    folder = targets[0].parent
    with output_folder(folder):
        temporary = folder / f".wmh-lora-{secrets.token_hex(6)}"
        try:
            temporary.mkdir()
            yield {path: temporary / path.name for path in targets}
            _place(temporary, targets, fresh=set(targets) - set(existing))
        except OSError as error:
            reason = write_failure(targets[0], error)
            raise DataError(f"Cannot write results to {folder}: {reason}.") from error
        except DataError as error:
            # the reader knows the target, not the temporary name
            raise DataError(str(error).replace(str(temporary), str(folder))) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make a folder that can be written to, and remove it again if nothing was put there.

    Raises
    ------
    ConfigError
        If the folder cannot be made or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".wmh-lora-{secrets.token_hex(6)}"
            probe.mkdir()
            probe.rmdir()
        except FileExistsError as error:
            raise ConfigError(
                f"The output folder {folder} is a file; choose another output folder."
            ) from error
        except OSError as error:
            reason = write_failure(folder / "results", error)
            raise ConfigError(f"Cannot use the output folder {folder}: {reason}.") from error
        yield
    finally:
        for path in missing:  # the deepest first
            try:
                path.rmdir()
            except OSError:  # it holds results, or was never made
                break


def _place(temporary: Path, targets: Sequence[Path], fresh: set[Path]) -> None:
    """Rename the finished files; if one cannot be, remove those that were not there before."""
    placed: list[Path] = []
    try:
        for target in targets:
            (temporary / target.name).replace(target)
            placed.append(target)
    except BaseException:
        for target in placed:
            if target in fresh:
                target.unlink(missing_ok=True)
        raise
