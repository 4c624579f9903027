"""Cross-validation of all methods, in a folder from which it goes on after any interruption."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wmh_lora._version import __version__
from wmh_lora.comparators.budget import clock
from wmh_lora.comparators.methods import Fitted, Task, fit
from wmh_lora.comparators.results import (
    FoldResult,
    ScoredScan,
    pair_of,
    read_result,
    write_result,
)
from wmh_lora.comparators.scans import Fold, read_fold
from wmh_lora.comparators.settings import ComparisonConfig
from wmh_lora.config import InferenceConfig, TtaMode
from wmh_lora.config_reading import from_dict, to_dict
from wmh_lora.data.manifest import Manifest, Scan, read_manifest
from wmh_lora.data.sources import DataConfig
from wmh_lora.data.split import read_split
from wmh_lora.engine_maps import MapProgress
from wmh_lora.errors import ConfigError
from wmh_lora.evaluation.cohort import evaluate_pair
from wmh_lora.files import file_sha256, open_atomic
from wmh_lora.logs import LOGGER
from wmh_lora.postprocess import lesion_mask
from wmh_lora.training.records import finite
from wmh_lora.training.tune import tune
from wmh_lora.training.tune_cases import TuningCase
from wmh_lora.volume import Volume, write_nifti

__all__ = ["Comparison", "Progress"]

#: Called with the pairs done, those in all, and the share of the present one's training.
Progress = Callable[[int, int, str, float], None]


class Comparison:
    """Methods, folds, and the folder of their results.

    Parameters
    ----------
    config
        From `wmh_lora.comparators.settings.read_comparison`.
    out_dir
        Receives ``config.json``, ``environment.json``, ``folds/<fold>/<method>/`` (checkpoints,
        model, ``result.json``), ``masks/<method>/`` and ``cache/``.
    resume
        Keep what ``out_dir`` holds, and do the rest.

    Raises
    ------
    ConfigError
        If ``out_dir`` holds a comparison and ``resume`` is False, or one with other settings; or a
        fold is not in the split.
    DataError
        If scans have changed since the manifest was made, or a fold lacks a part.
    """

    def __init__(self, config: ComparisonConfig, out_dir: Path, *, resume: bool = False) -> None:
        self.config, self.out_dir = config, out_dir
        data = from_dict(DataConfig, config.data)
        self.manifest: Manifest = read_manifest(data.path(data.manifest))
        split_file = data.path(data.split)
        names = [split.name for split in read_split(split_file, self.manifest).splits]
        self._identity = {
            "data.manifest": self.manifest.sha256,
            "data.split": file_sha256(split_file),
        }
        self.folds: Sequence[Fold] = [
            read_fold(data, name) for name in (config.comparison.folds or names)
        ]
        self._prepare(resume)

    @property
    def mask_folders(self) -> dict[str, Path]:
        """Folder of the predicted masks by method."""
        return {name: self.out_dir / "masks" / name for name in self.config.names}

    def run(self, progress: Progress | None = None) -> Iterator[FoldResult]:
        """Train, predict and score whatever has no result yet; yield all results, fold by fold."""
        if self.config.comparison.threads:
            torch.set_num_threads(self.config.comparison.threads)
        pairs = [(fold, name) for fold in self.folds for name in self.config.names]
        for done, (fold, name) in enumerate(pairs):
            path = self._folder(fold, name) / "result.json"
            if path.is_file():
                yield read_result(path)
                continue

            def show(share: float, done: int = done, label: str = f"{fold.name} {name}") -> None:
                if progress is not None:
                    progress(done, len(pairs), label, share)

            LOGGER.info("%s: %s", fold.name, name)
            result = self._compute(fold, name, show)
            write_result(result, path)
            yield result

    def _folder(self, fold: Fold, name: str) -> Path:
        return self.out_dir / "folds" / fold.name / name

    def _compute(self, fold: Fold, name: str, show: Callable[[float], None]) -> FoldResult:
        """One method in one fold."""
        folder = self._folder(fold, name)
        folder.mkdir(parents=True, exist_ok=True)
        fitted = fit(Task(self.config, name, fold, folder, self.out_dir / "cache", show))
        cases = [
            TuningCase(scan.name, scan.subject, fold.file(scan.image), fold.file(scan.mask))
            for scan in fold.validation.scans
        ]
        # `tune` asks for nothing but maps, whoever makes them
        tuning = tune(cases, _Maps(fitted, fold), InferenceConfig(), views=("none",))
        setting = tuning.setting
        scans = [
            self._score(fold, name, scan, fitted, setting.threshold, setting.min_voxels)
            for scan in fold.test.scans
        ]
        return FoldResult(
            fold=fold.name,
            method=name,
            parameters=fitted.parameters,
            members=fitted.members,
            steps=tuple(spent.steps for spent in fitted.spent),
            training_seconds=sum(spent.seconds for spent in fitted.spent),
            threshold=setting.threshold,
            min_voxels=setting.min_voxels,
            validation_dice=float(tuning.mean[tuning.chosen]),
            note=fitted.note,
            scans=tuple(scans),
        )

    def _score(
        self,
        fold: Fold,
        name: str,
        scan: Scan,
        fitted: Fitted,
        threshold: float,
        min_voxels: int,
    ) -> ScoredScan:
        """Predict a test scan, write its mask, and score the file as any other."""
        volume = Volume.read(fold.file(scan.image))
        t1 = fold.t1(scan) if fitted.uses_t1 else None
        now = clock(self.config.comparison)
        started = now()
        probability = fitted.predict(volume, t1)
        seconds = now() - started
        mask = lesion_mask(probability, threshold, min_voxels)
        place = Path("masks", name, f"{scan.name}_mask.nii.gz")
        (self.out_dir / place).parent.mkdir(parents=True, exist_ok=True)
        write_nifti(self.out_dir / place, mask, volume, overwrite=True)
        case = evaluate_pair(pair_of(name, scan, self.out_dir / place, self.manifest))
        metrics = finite(case.metrics.to_dict())
        return ScoredScan(scan.name, place.as_posix(), seconds, metrics, case.grid_note)

    def _prepare(self, resume: bool) -> None:
        """Write the settings; on resuming, compare with those that results were made with."""
        path = self.out_dir / "config.json"
        settings = {**to_dict(self.config), "identity": self._identity}
        if path.is_file():
            if not resume:
                raise ConfigError(
                    f"{self.out_dir} already holds a comparison. Continue it with --resume, or "
                    "choose another folder with -o."
                )
            before = json.loads(path.read_text(encoding="utf-8"))
            if changed := _changed(before, settings):
                raise ConfigError(
                    f"The settings {', '.join(changed)} differ from those that the results in "
                    f"{self.out_dir} were made with; use the same, or another folder with -o."
                )
            settings["methods"] = {**before["methods"], **settings["methods"]}
        self.out_dir.mkdir(parents=True, exist_ok=True)
        environment = {
            "wmh_lora": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "processor": platform.machine(),
        }
        for target, content in (
            (path, settings),
            (self.out_dir / "environment.json", environment),
        ):
            with open_atomic(target, overwrite=True) as stream:
                stream.write((json.dumps(content, indent=2) + "\n").encode())


class _Maps:
    """Maps of a fitted method, a `wmh_lora.training.tune.MapSource`."""

    def __init__(self, fitted: Fitted, fold: Fold) -> None:
        self._fitted, self._fold = fitted, fold
        self._kept: dict[str, npt.NDArray[np.float32]] = {}

    @cached_property
    def _scans(self) -> dict[Path, Scan]:
        return {self._fold.file(scan.image): scan for scan in self._fold.validation.scans}

    def planes_of(self, volume: Volume) -> int:
        """One: methods have one threshold for all scans."""
        return 1

    def of(
        self,
        volume: Volume,
        image_sha256: str,
        views: Sequence[TtaMode],
        progress: MapProgress | None = None,
    ) -> Iterator[tuple[TtaMode, npt.NDArray[np.float32]]]:
        """Yield the one map; `tune` asks for it twice."""
        assert volume.path is not None
        if image_sha256 not in self._kept:
            uses_t1 = self._fitted.uses_t1
            t1 = self._fold.t1(self._scans[volume.path]) if uses_t1 else None
            self._kept[image_sha256] = self._fitted.predict(volume, t1)
        for view in views:
            yield view, self._kept[image_sha256]


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Name the settings that results depend on and that are not what they were."""
    # methods and folds may be added, and the report may be made anew
    free = {f"comparison.{key}" for key in ("methods", "against", "folds", "checkpoint_minutes")}
    changed = []
    for table in ("comparison", "preprocess", "training", "data"):
        old, new = before.get(table, {}), now[table]
        # settings that a later version added were not known to the one before
        whole = table in ("comparison", "preprocess")
        keys = sorted(old.keys() & new.keys() if whole else old.keys() | new.keys())
        changed += [f"{table}.{key}" for key in keys if old.get(key) != new.get(key)]
    # what the files held; results of an earlier version do not say
    known = before.get("identity", now["identity"])
    changed += [
        f"{name} (its content)" for name, was in known.items() if was != now["identity"][name]
    ]
    both = sorted(before["methods"].keys() & now["methods"].keys())
    changed += [f"methods.{n}" for n in both if before["methods"][n] != now["methods"][n]]
    return [name for name in changed if name not in free]
