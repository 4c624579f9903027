"""Few-shot adaptation: a model learns from a few labelled scans of a site, and proves it there.

The scans are dealt to folds. For each, a network learns from the other folds and is scored on the
scans of this one, beside the base model on the very same scans. Only if the mean is better, a last
network learns from all scans and is written. Time is planned: the base model's pass over the scans
and a few steps of training say how many steps fit, and every network takes equally many.

Structures that the site does not label (ventricles, brain) are taught as the base model sees them
in these scans, so that they do not drift.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from wmh_lora.engine import ScanMaps, WMHInferenceEngine
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.logs import Progress
from wmh_lora.models.model_file import ModelCard
from wmh_lora.models.registry import Model
from wmh_lora.training.adapt_learn import Fit, learn
from wmh_lora.training.adapt_network import Base, Record
from wmh_lora.training.adapt_result import CrossValidation, FoldResult
from wmh_lora.training.adapt_scans import WHOLE, SiteScans
from wmh_lora.training.adapt_score import DiceTable, SettingGrid
from wmh_lora.training.adapt_settings import AdaptConfig
from wmh_lora.training.run import program_versions
from wmh_lora.training.tune import read_reference
from wmh_lora.training.tune_cases import TuningCase
from wmh_lora.volume import Volume

__all__ = ["AdaptConfig", "CrossValidation", "FoldResult", "adapt"]

_log = logging.getLogger("wmh_lora")

_PROBE_STEPS = 4
_FEWEST_STEPS = 10
_PLANNED_SHARE = 0.85  # of the time for training; the rest is for a machine that gets slower
_RESERVED_S = 5.0  # to write the file and to clean up


def adapt(
    cases: Sequence[TuningCase],
    model: Path,
    target: Path,
    config: AdaptConfig | None = None,
    *,
    base_weights: Path | None = None,
    force: bool = False,
    overwrite: bool = False,
    started: float | None = None,
    progress: Progress | None = None,
) -> CrossValidation:
    """Learn from labelled scans of a site, and write what was learned if it is of use.

    Parameters
    ----------
    cases : sequence of TuningCase
        2 to 10 scans with references, of two persons at least.
    model : Path
        Model file.
    target : Path
        File to write: an adapter, or a whole model if ``config.method`` is ``"full"``.
    config : AdaptConfig, optional
        Settings.
    base_weights : Path, optional
        Checkpoint of the model's base encoder; by default the installed or cached one.
    force : bool
        Write also what is not better than the base model.
    overwrite : bool
        Replace a target that exists.
    started : float, optional
        When the time began, by `time.monotonic`; now by default.
    progress : Progress, optional
        Called with (steps done, steps in all, what is being done).

    Returns
    -------
    CrossValidation

    Raises
    ------
    DataError
        If the scans cannot be used, the adapted model is not better than the base (nothing is
        written then), or the target exists or cannot be written.
    ConfigError
        If the time is too short.
    WeightsError
        If the model cannot be loaded.
    KeyboardInterrupt
        If a signal asked to stop during training.
    """
    config = config or AdaptConfig()
    _refuse_target(target, overwrite)
    clock = _Clock(config.minutes, time.monotonic() if started is None else started)
    base = Base(model, base_weights, config.method)
    with tempfile.TemporaryDirectory(prefix="wmh-lora-adapt-") as name:
        folder = Path(name)
        copies = folder / "scans"
        copies.mkdir()
        scans = SiteScans.gather(cases, copies, folds=config.folds, seed=config.seed)
        run = _Adaptation(scans, base, folder, config, clock, progress or _ignore)
        result = run.cross_validate()
        if not (result.better or force):
            raise DataError(_refusal(result, target))
        run.finish(result, target, overwrite=overwrite)
    return replace(result, seconds=clock.passed)


def _refuse_target(target: Path, overwrite: bool) -> None:
    """Find out before minutes of work that the result may not be written."""
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists already; add --overwrite, or choose another name.")
    if not target.parent.is_dir():
        raise DataError(f"{target.parent} is not an existing folder; create it first.")


def _refusal(result: CrossValidation, target: Path) -> str:
    best = max(float(result.base.mean()), float(result.default.mean()))
    return (
        f"Adaptation did not help: on held-out scans the mean Dice is {result.adapted.mean():.3f} "
        f"with it and {best:.3f} without, so {target} is not written. Check the labels, give more "
        "scans, or add --force to write it all the same."
    )


def _ignore(done: int, total: int, text: str) -> None:
    """Show no progress."""


class _Clock:
    """What is left of the time."""

    def __init__(self, minutes: float, started: float) -> None:
        self._started, self._seconds = started, 60.0 * minutes
        self.minutes = minutes

    @property
    def passed(self) -> float:
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        return self._seconds - _RESERVED_S - self.passed


class _Adaptation:
    """The scans, the base model and the time, through all trainings."""

    def __init__(
        self,
        scans: SiteScans,
        base: Base,
        folder: Path,
        config: AdaptConfig,
        clock: _Clock,
        progress: Progress,
    ) -> None:
        self.scans, self.base, self.folder, self.config = scans, base, folder, config
        self.clock, self.progress = clock, progress
        model = base.model()
        self.card: ModelCard = model.card
        self._base_scores, structures, self._pass_s = self._first_pass(model)
        self.grid = self._base_scores.grid
        self._data = scans.data_table(structures)
        self._trainings_left = len(scans.folds) + 1
        self._scans_left = len(scans.cases)
        self.steps = self._plan()

    # -- networks on scans -----------------------------------------------------------------------

    def _first_pass(self, model: Model) -> tuple[DiceTable, list[dict[str, Path]], float]:
        """Score the base model, keep the other structures that it sees, and take the time."""
        engine, inference = WMHInferenceEngine(model), self.card.inference
        count = len(self.scans.cases)
        rows, structures = [], []
        grid = None
        started = time.monotonic()
        for number, case in enumerate(self.scans.cases):
            self.progress(number, count, f"base model on {case.name}")
            volume, maps = self._predict(engine, case)
            threshold = inference.threshold_of(maps.looks.planes)
            grid = grid or SettingGrid(inference.changed(threshold=threshold))
            if threshold != grid.settings[grid.present].threshold:
                raise ConfigError(
                    f"{case.image} is seen in another number of planes than the scans before, for "
                    "which the model has another threshold; adapt to thick and to isotropic scans "
                    "apart."
                )
            self.planes = maps.looks.planes
            rows.append(grid.dice(maps.probability, read_reference(case, volume)))
            structures.append(self.scans.write_structures(maps.structure_masks, volume, number))
            pass_s = (time.monotonic() - started) / (number + 1)
            if pass_s * (2 * count - number - 1) > self.clock.left / 2:
                self._refuse_time(pass_s * 2 * count * 2)
        assert grid is not None
        return DiceTable(grid, np.stack(rows)), structures, pass_s

    def _predict(self, engine: WMHInferenceEngine, case: TuningCase) -> tuple[Volume, ScanMaps]:
        volume = Volume.read(case.image)
        return volume, engine.predict_maps(engine.prepare(volume), engine.settings())

    # -- training --------------------------------------------------------------------------------

    def _plan(self) -> int:
        """Steps of each network, from the time that a few take."""
        probe = self._train(WHOLE, _PROBE_STEPS, self.clock.left / 2, "first steps")
        if probe.steps < _PROBE_STEPS:
            self._refuse_time(2 * 60 * self.clock.minutes)
        share = self._training_share()
        steps = int(_PLANNED_SHARE * (share - probe.start_s) / probe.step_s)
        if steps < _FEWEST_STEPS:
            longer = probe.start_s + _FEWEST_STEPS * probe.step_s / _PLANNED_SHARE - share
            self._refuse_time(60 * self.clock.minutes + longer * self._trainings_left)
        _log.info(
            "%d steps fit into the time, at most %d are taken (%.2f s a step, %.1f s before)",
            steps,
            self.config.steps,
            probe.step_s,
            probe.start_s,
        )
        return min(steps, self.config.steps)

    def _training_share(self) -> float:
        """Seconds that each training may still take."""
        return (self.clock.left - self._scans_left * self._pass_s) / self._trainings_left

    def _refuse_time(self, seconds: float) -> None:
        raise ConfigError(
            f"{self.clock.minutes:g} minutes are too few for {len(self.scans.cases)} scans of this "
            f"size on this machine; give about {-(-seconds // 60):.0f} with --minutes, or fewer "
            "scans."
        )

    def _train(self, fold: str, steps: int, seconds: float, text: str) -> Fit:
        """Train on the scans of one division, to the end of the steps or of the time."""

        def on_step(step: int, loss: float) -> None:
            self.progress(step, steps, f"{text}, loss {loss:.3f}")

        fit = learn(
            self.base.learning_net(self.config.seed),
            self.card,
            {**self._data, **self.config.data(fold)},
            self.config,
            steps=steps,
            seconds=seconds,
            folder=self.folder,
            on_step=on_step,
        )
        if fit.steps < steps:
            _log.warning("%s: stopped after %d of %d steps, for time", text, fit.steps, steps)
        return fit

    def cross_validate(self) -> CrossValidation:
        """Train a network for each fold, and score it on the scans that it has not seen."""
        folds = self.scans.folds
        scores = np.empty_like(self._base_scores.scores)
        steps = []
        for number, held_out in enumerate(folds, start=1):
            text = f"fold {number} of {len(folds)}"
            fit = self._train(f"fold-{number}", self.steps, self._training_share(), text)
            steps.append(fit.steps)
            self._trainings_left -= 1
            file = self.folder / f"fold-{number}.safetensors"
            record = Record(self.card.inference, self.planes, {})
            self.base.save(fit.net, self.card, file, record, overwrite=True)
            engine = WMHInferenceEngine(self.base.load(file))
            for done, scan in enumerate(held_out):
                self.progress(done, len(held_out), f"{text}, held-out scans")
                case = self.scans.cases[scan]
                volume, maps = self._predict(engine, case)
                scores[scan] = self.grid.dice(maps.probability, read_reference(case, volume))
                self._scans_left -= 1
        adapted = DiceTable(self.grid, scores)
        base_dice, base_settings = self._base_scores.held_out(folds)
        adapted_dice, settings = adapted.held_out(folds)
        return CrossValidation(
            names=tuple(case.name for case in self.scans.cases),
            default=self._base_scores.present,
            base=base_dice,
            adapted=adapted_dice,
            folds=tuple(map(FoldResult, folds, base_settings, settings, steps)),
            setting=self.grid.settings[adapted.chosen(range(len(scores)))],
            seconds=self.clock.passed,
        )

    def finish(self, result: CrossValidation, target: Path, *, overwrite: bool) -> None:
        """Train on all scans, and write the file."""
        fit = self._train(WHOLE, self.steps, self._training_share(), "all scans")
        chosen = result.setting
        config = self.config
        record = Record(
            setting=self.card.inference.with_threshold(chosen.threshold, self.planes).changed(
                min_voxels=chosen.min_voxels
            ),
            planes=self.planes,
            training={
                "method": config.method,
                "seed": config.seed,
                "steps": fit.steps,
                "batch_size": config.batch_size,
                "lora_lr": config.lora_lr,
                "decoder_lr": config.decoder_lr,
                "adapter_lr": config.adapter_lr,
                "encoder_lr": config.encoder_lr,
                "minutes_given": config.minutes,
                "seconds": round(self.clock.passed, 1),
            },
            scans=self.scans.identities,
            cross_validation=result.report(),
            versions=program_versions(),
        )
        self.base.save(fit.net, self.card, target, record, overwrite=overwrite)
