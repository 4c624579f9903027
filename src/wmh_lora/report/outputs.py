"""The result of segmenting one scan, and the files that it is saved as, all of them or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wmh_lora.files import image_stem, open_atomic
from wmh_lora.postprocess import Lesion
from wmh_lora.quality import QualityReport, assess_quality
from wmh_lora.quality_measures import ScanMeasures
from wmh_lora.regions import Regions, locate_lesions
from wmh_lora.report.extras import require
from wmh_lora.report.saving import output_folder, saved_together
from wmh_lora.report.tables import scan_report
from wmh_lora.volume import Volume, write_nifti

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL.Image import Image

    from wmh_lora.report.scan_figure import ScanFigure

__all__ = [
    "OutputFiles",
    "PageFormat",
    "Segmentation",
    "output_files",
    "output_folder",
    "saved_together",
]

PageFormat = Literal["html", "pdf", "none"]
"""How a scan's report is written for a reader, beside the JSON."""

_LARGE_VOXELS = 32_000_000  # each part of a report needs a few copies: of more, one at a time


class OutputFiles(NamedTuple):
    """Paths of one scan's results, in the order in which they are made."""

    mask: Path
    probability: Path
    report: Path
    picture: Path
    page: Path | None = None  # none was asked for

    @property
    def present(self) -> tuple[Path, ...]:
        """The paths of the files that there are."""
        return tuple(path for path in self if path is not None)


def output_files(out_dir: str | Path, stem: str, page: PageFormat = "html") -> OutputFiles:
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
        page=None if page == "none" else folder / f"{stem}_wmh.{page}",
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
        As asked for, but for the threshold, which is the one used; ``thresholds`` are those of
        scans seen in one plane and in three. ``used`` has planes, zoom and precision as they
        were, which memory and processor decide as well.
    model : mapping
        Name, sha256 and base encoder of the model.
    warnings : tuple of str
        What a reader should know before trusting the numbers.
    structure_masks : mapping of str to uint8 array (I, J, K)
        1 where the network finds ``"ventricles"`` or ``"brain"`` at least as likely as not; empty
        if it has no such outputs.
    uncertainty : float32 array (I, J, K) or None
        Standard deviation of the lesion probability over views and looks, in [0, 0.5]; zero where
        a place was seen once, None where the whole scan was.
    measures : ScanMeasures or None
        What `wmh_lora.quality_measures.measure_scan` found in the scan, where that was done ahead.
    t1_path : Path or None
        File of the T1 that was shown beside the FLAIR, if there was one and it came from a file.
    """

    volume: Volume
    probability: NDArray[np.float32]
    mask: NDArray[np.uint8]
    lesions: tuple[Lesion, ...]
    volume_ml: float
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    structure_masks: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    uncertainty: NDArray[np.float32] | None = None
    measures: ScanMeasures | None = None
    t1_path: Path | None = None

    @cached_property
    def regions(self) -> Regions:
        """Where the lesions are, see `wmh_lora.regions.locate_lesions`."""
        return locate_lesions(
            self.mask,
            self.volume.affine,
            self.structure_masks,
            probability=self.probability,
            uncertainty=self.uncertainty,
        )

    @cached_property
    def quality(self) -> QualityReport:
        """Checks of the scan and of this result, see `wmh_lora.quality.assess_quality`."""
        return assess_quality(
            self.volume,
            probability=self.probability,
            mask=self.mask,
            threshold=float(self.settings["threshold"]),
            structure_masks=self.structure_masks,
            uncertainty=self.uncertainty,
            measures=self.measures,
        )

    def report(self) -> dict[str, Any]:
        """Return the content of ``<stem>_wmh.json``, see `wmh_lora.report.tables.scan_report`."""
        return scan_report(
            volume=self.volume,
            t1_path=self.t1_path,
            lesions=self.lesions,
            volume_ml=self.volume_ml,
            settings=self.settings,
            model=self.model,
            warnings=self.warnings,
            regions=self.regions,
            quality=self.quality,
        )

    def save(
        self,
        out_dir: str | Path,
        *,
        overwrite: bool = False,
        stem: str | None = None,
        reference: NDArray[Any] | None = None,
        page: PageFormat = "html",
    ) -> OutputFiles:
        """Write mask, probability map, report, picture and page.

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
        page : {"html", "pdf", "none"}
            The report for a reader; PDF needs matplotlib.

        Returns
        -------
        OutputFiles

        Raises
        ------
        DataError
            If results exist and ``overwrite`` is not set, or if they cannot be written; nothing
            of the scan is then left behind.
        ConfigError
            If the folder cannot be made or written to, or a PDF is asked for and matplotlib is not
            installed.
        """
        files = output_files(out_dir, stem or self._stem, page)
        with (
            saved_together(files.present, overwrite=overwrite) as temporary,
            ThreadPoolExecutor(1 if self.mask.size > _LARGE_VOXELS else 3) as aside,
        ):
            partial = OutputFiles(*(temporary[path] for path in files.present))
            parts = (
                lambda: self.quality,
                lambda: partial.picture.write_bytes(self._picture_png(reference)),
                lambda: self.regions,
                lambda: write_nifti(partial.mask, self.mask, self.volume),
                lambda: write_nifti(partial.probability, self.probability, self.volume),
            )
            for part in [aside.submit(part) for part in parts]:
                part.result()
            report = self.report()
            text = json.dumps(report, indent=2, ensure_ascii=False)
            # names that are no valid text are written with escapes
            partial.report.write_bytes(f"{text}\n".encode("utf-8", "backslashreplace"))
            if partial.page is not None:
                picture_png = partial.picture.read_bytes()
                partial.page.write_bytes(self._page(page, report, picture_png))
        return files

    def to_bids(
        self, out_dir: str | Path, *, raw_dir: str | Path | None = None, overwrite: bool = False
    ) -> Path:
        """Write the derivatives that ``wmh-lora bids`` writes, with sidecars and description.

        Parameters
        ----------
        out_dir : path
            Folder of the derivatives; made if it is absent.
        raw_dir : path, optional
            The data set that the scan belongs to; by default the folder that holds its ``sub-``
            folder.
        overwrite : bool
            Replace results that are there already.

        Returns
        -------
        Path
            The mask.

        Raises
        ------
        ConfigError
            If the scan was not read from a file with a BIDS name within ``raw_dir``, its T1 from
            no file within it, or ``out_dir`` holds another data set.
        DataError
            If results exist and ``overwrite`` is not set, or if they cannot be written.
        """
        from wmh_lora.bids.derivatives import save_segmentation

        return save_segmentation(self, Path(out_dir), raw_dir=raw_dir, overwrite=overwrite)

    def _page(self, page: PageFormat, report: Mapping[str, Any], picture_png: bytes) -> bytes:
        if page == "pdf":
            from wmh_lora.report.pdf import scan_pdf

            return scan_pdf(self, report)
        from wmh_lora.report.html import scan_html

        html = scan_html(self, report, picture_png=picture_png)
        return html.encode("utf-8", "backslashreplace")

    def picture(self, reference: NDArray[Any] | None = None) -> Image:
        """Draw the montage that `save` writes, see `wmh_lora.report.montage.montage`."""
        from wmh_lora.report.montage import montage

        return montage(self.volume, self.mask, title=self._title, reference=reference)

    def _picture_png(self, reference: NDArray[Any] | None) -> bytes:
        from wmh_lora.report.montage import png_bytes

        return png_bytes(self.picture(reference))

    def plot(self, reference: NDArray[Any] | None = None, **layout: int) -> ScanFigure:
        """Draw slices with outlines as a matplotlib figure, which a notebook shows by itself.

        Parameters
        ----------
        reference : array (I, J, K), optional
            A reference mask to outline as well.
        **layout
            ``max_slices`` and ``columns``, see `wmh_lora.report.scan_figure.scan_figure`.

        Raises
        ------
        ConfigError
            If matplotlib is not installed.
        """
        require("matplotlib", extra="evaluate", purpose="A figure")
        from wmh_lora.report.scan_figure import scan_figure

        return scan_figure(self.volume, self.mask, title=self._title, reference=reference, **layout)

    def lesions_frame(self) -> DataFrame:
        """Return a pandas table with one row a lesion, see `wmh_lora.report.frames`."""
        from wmh_lora.report.frames import lesions_frame

        return lesions_frame(self.lesions, self.regions)

    def summary_frame(self) -> DataFrame:
        """Return a pandas table of one row, with the columns of ``wmh.tsv``."""
        from wmh_lora.report.frames import summary_frame

        return summary_frame(self._stem, self.report())

    def report_html(self) -> str:
        """Return the page with figures and viewer, see `wmh_lora.report.html.scan_html`."""
        from wmh_lora.report.html import scan_html

        return scan_html(self, self.report())

    def save_html(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the page of `report_html`.

        Raises
        ------
        DataError
            If the file exists and ``overwrite`` is not set, or cannot be written.
        """
        page = self.report_html().encode("utf-8", "backslashreplace")  # as names of files may need
        with open_atomic(Path(path), overwrite=overwrite) as stream:
            stream.write(page)
        return Path(path)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.volume.shape))
        return f"<Segmentation of {self._title}; {shape} voxels>"

    def _repr_html_(self) -> str:
        from wmh_lora.report.notebook import card

        return card(
            self._title,
            self.picture(),
            regions=self.regions,
            quality=self.quality,
            threshold=float(self.settings["threshold"]),
            warnings=self.warnings,
        )

    @property
    def _stem(self) -> str:
        return image_stem(self.volume.path) if self.volume.path else "scan"

    @property
    def _title(self) -> str:
        name = self.volume.path.name if self.volume.path else "scan"
        count = len(self.lesions)
        return f"{name}: {self.volume_ml:.2f} mL in {count} lesion{'' if count == 1 else 's'}"
