"""What to train at a new site, and how to look at a scan, measured on scans never trained on.

    python -m benchmarks.model_choice MODEL [--data FOLDER] [--minutes 2]

Two comparisons, both from one base model that must not have seen the cohort:

* *learning*: LoRA of several ranks and places, the decoder alone, all weights; each for the same
  time on every other scan of a labelled cohort, tested on the rest, then the other way round, and
  on one scan of another scanner, which shows what is forgotten;
* *looking*: views, planes and pixel size, with no training at all.

What is finished is kept in ``--work``: after an interruption, the same command goes on. At the end
the study is written to ``docs/studies/model-choice.md``; what stands there under "Reading" is kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import kept_result, machine, markdown_table, scan_identity, write_study
from wmh_lora import __version__
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.evaluation.metrics import dice
from wmh_lora.evaluation.selection import mean_interval
from wmh_lora.files import file_sha256
from wmh_lora.models.lora import extract_lora, merge_lora
from wmh_lora.models.lora_settings import LoraSettings
from wmh_lora.models.model_file import assemble_network
from wmh_lora.models.network import WMHNet, fuse_for_inference
from wmh_lora.models.registry import Model, load_model
from wmh_lora.training.adapt_learn import Fit, learn
from wmh_lora.training.adapt_network import free_adapter, free_all
from wmh_lora.training.adapt_scans import WHOLE, SiteScans
from wmh_lora.training.adapt_settings import AdaptConfig
from wmh_lora.training.start import SettledNet
from wmh_lora.training.tune import read_reference
from wmh_lora.training.tune_cases import TuningCase, cases_of_folders
from wmh_lora.volume import Volume

__all__ = ["LEARNING", "LOOKING", "Learning", "finished_model", "learning_net", "study_text"]

_ATTENTION, _MLP = ("qkv", "proj"), ("fc1", "fc2")
_PROBE_STEPS = 6
_LATEST = 1.5  # times the planned seconds, after which a training is cut off


@dataclass(frozen=True)
class Learning:
    """What is trained: LoRA ranks by layer name, decoder and channel adapter, or everything."""

    ranks: Mapping[str, int]
    decoder: bool = True
    everything: bool = False


LEARNING = {
    "decoder alone": Learning({}),
    "LoRA 8 alone": Learning(dict.fromkeys(_ATTENTION + _MLP, 8), decoder=False),
    "LoRA 8, decoder": Learning(dict.fromkeys(_ATTENTION + _MLP, 8)),
    "LoRA 32, decoder": Learning(dict.fromkeys(_ATTENTION + _MLP, 32)),
    "LoRA 8 in attention, decoder": Learning(dict.fromkeys(_ATTENTION, 8)),
    "all weights": Learning({}, everything=True),
}
"""What is compared, by name; decoder means decoder and channel adapter."""

LOOKING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one view": ({}, {}),
    "flip": ({"tta": "flip"}, {}),
    "d4": ({"tta": "d4"}, {}),
    "one plane": ({"planes": "one"}, {}),
    "pixels of 0.8 mm": ({}, {"pixel_size_mm": 0.8}),
    "pixels of 1.25 mm": ({}, {"pixel_size_mm": 1.25}),
}
"""Inference and preprocessing settings that are changed, by name."""


def learning_net(model: Path, base_weights: Path | None, what: Learning, seed: int) -> SettledNet:
    """Make a network that computes what the model does, with the chosen part free to learn."""
    net, _ = assemble_network(model, base_weights)
    if what.everything:
        return free_all(net)
    return free_adapter(net, what.ranks, seed, decoder=what.decoder)


def finished_model(
    model: Path, base_weights: Path | None, what: Learning, learned: WMHNet
) -> Model:
    """Make of what a network has learned a model for inference, LoRA merged."""
    net, card = assemble_network(model, base_weights)
    net.adapter.load_state_dict(learned.adapter.state_dict())
    net.decoder.load_state_dict(learned.decoder.state_dict())
    if what.ranks:
        merge_lora(net.encoder, extract_lora(learned.encoder), LoraSettings(what.ranks))
    else:
        net.encoder.load_state_dict(learned.encoder.state_dict())
    return Model(fuse_for_inference(net), card, model, file_sha256(model))


@dataclass(frozen=True)
class _Study:
    cases: Sequence[TuningCase]
    other: TuningCase
    healthy: Path
    model: Path
    base_weights: Path | None
    minutes: float
    seed: int
    work: Path

    def learning(self, name: str) -> dict[str, Any]:
        """Train one way on either half, and score it on the other half and the other scanner."""
        halves = (self.cases[::2], self.cases[1::2])
        parts = [self._learned(LEARNING[name], halves[n], halves[1 - n]) for n in (0, 1)]
        return {
            "trained": parts[0]["trained"],
            "steps": [part["steps"] for part in parts],
            "dice": {scan: value for part in parts for scan, value in part["dice"].items()},
            "other": [part["other"] for part in parts],
        }

    def _learned(
        self, what: Learning, train: Sequence[TuningCase], test: Sequence[TuningCase]
    ) -> dict[str, Any]:
        config = AdaptConfig(seed=self.seed)
        base = load_model(self.model, base_weights=self.base_weights)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            scans = SiteScans.gather(train, folder, folds=2, seed=self.seed)
            engine = WMHInferenceEngine(base)
            structures = []
            for number, case in enumerate(train):
                volume = Volume.read(case.image)
                found = engine.segment(volume).structure_masks
                structures.append(scans.write_structures(found, volume, number))
            data = {**scans.data_table(structures), **config.data(WHOLE)}

            def fit(steps: int, seconds: float) -> Fit:
                return learn(
                    learning_net(self.model, self.base_weights, what, self.seed),
                    base.card,
                    data,
                    config,
                    steps=steps,
                    seconds=seconds,
                    folder=folder,
                    on_step=lambda step, loss: None,
                )

            probe = fit(_PROBE_STEPS, np.inf)
            seconds = 60.0 * self.minutes
            done = fit(int((seconds - probe.start_s) / probe.step_s), _LATEST * seconds)
        trained = sum(p.numel() for p in done.net.parameters() if p.requires_grad)
        engine = WMHInferenceEngine(finished_model(self.model, self.base_weights, what, done.net))
        return {
            "trained": trained,
            "steps": done.steps,
            "dice": {case.name: _dice(engine, case) for case in test},
            "other": _dice(engine, self.other, planes="one"),
        }

    def looking(self, name: str) -> dict[str, Any]:
        """Score the base model with changed settings, and time it."""
        inference, preprocess = LOOKING[name]
        base = load_model(self.model, base_weights=self.base_weights)
        card = replace(base.card, preprocess=replace(base.card.preprocess, **preprocess))
        engine = WMHInferenceEngine(replace(base, card=card))
        began = time.monotonic()
        scores = {case.name: _dice(engine, case, **inference) for case in self.cases}
        seconds = (time.monotonic() - began) / len(self.cases)
        return {
            "dice": scores,
            "other": [_dice(engine, self.other, **inference)],
            "healthy_ml": engine.segment(self.healthy, **inference).volume_ml,
            "seconds": seconds,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What a kept result must agree with."""
        return {
            "model_sha256": file_sha256(self.model),
            "base_sha256": "" if self.base_weights is None else file_sha256(self.base_weights),
            "scans": scan_identity((*self.cases, self.other)),
            "healthy_sha256": file_sha256(self.healthy),
            "minutes": self.minutes,
            "seed": self.seed,
            "package_version": __version__,
        }

    def results(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Compute what is missing of both comparisons."""
        self.work.mkdir(parents=True, exist_ok=True)
        identity = self.identity
        kept: dict[str, dict[str, dict[str, Any]]] = {"looking": {}, "learning": {}}
        parts = [("looking", name, self.looking) for name in LOOKING]
        parts += [("learning", name, self.learning) for name in LEARNING]
        for kind, name, compute in parts:
            path = self.work / f"{kind}-{name.replace(' ', '-')}.json"
            kept[kind][name] = kept_result(path, identity, partial(compute, name))
            sys.stderr.write(f"{name}: {_mean(kept[kind][name]):.3f}\n")
        return kept


def _dice(engine: WMHInferenceEngine, case: TuningCase, **settings: Any) -> float:
    result = engine.segment(case.image, **settings)
    return dice(read_reference(case, result.volume), result.mask)


# --- the text ---------------------------------------------------------------------------------


def study_text(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    command: str,
    minutes: float,
    computer: Mapping[str, object],
) -> str:
    """Write both tables.

    Parameters
    ----------
    results : mapping
        ``looking`` and ``learning``: by name, what `_Study` found.
    command : str
        What was run.
    minutes : float
        Time of each training.
    computer : mapping
        From `benchmarks.harness.machine`.
    """
    looking, learning = results["looking"], results["learning"]
    base = looking["one view"]
    untrained = {**base, "other": looking["one plane"]["other"]}
    rows = [["base, not trained", "0", "", *_scores(untrained, untrained)]]
    for name, found in learning.items():
        steps = ", ".join(map(str, found["steps"]))
        rows.append([name, f"{found['trained']:,}", steps, *_scores(found, base)])
    parts = [
        "# Study: what to train at a new site, and how to look at a scan",
        f"    {command}",
        "The base model has seen none of these scans. The cohort is ten scans of one scanner; the "
        "other scanner is one scan. Everything runs with the base's own threshold.",
        "## What to train",
        f"Each for {minutes:g} minutes on five scans of the cohort, tested on the other five, and "
        "the other way round. The interval is that of the difference from the base, scan by scan. "
        "The other scanner's scan is seen in one plane.",
        markdown_table(
            ["trained", "parameters", "steps", "cohort, Dice", "gain (95 %)", "other scanner"], rows
        ),
        "## How to look",
        "No training. Seconds are a scan of the cohort, reading included.",
        markdown_table(
            ["settings", "cohort, Dice", "gain (95 %)", "other scanner", "no lesion, mL", "s"],
            [
                [
                    name,
                    *_scores(found, base),
                    f"{found['healthy_ml']:.2f}",
                    f"{found['seconds']:.1f}",
                ]
                for name, found in looking.items()
            ],
        ),
        f"{computer['cores']} cores ({computer['cpu']}), {computer['threads']} threads, torch "
        f"{computer['torch']}.",
    ]
    return "\n\n".join(parts) + "\n"


def _mean(found: Mapping[str, Any]) -> float:
    return float(np.mean(list(found["dice"].values())))


def _scores(found: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Mean on the cohort, gain over the base with interval, mean on the other scanner."""
    gains = np.array([value - base["dice"][scan] for scan, value in found["dice"].items()])
    mean, (low, high) = mean_interval(gains)
    gain = "" if found is base else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return [f"{_mean(found):.3f}", gain, f"{np.mean(found['other']):.3f}"]


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing of the study, and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--work", type=Path, default=Path("runs/model-choice"))
    parser.add_argument("--markdown", type=Path, default=Path("docs/studies/model-choice.md"))
    options = parser.parse_args(arguments)
    cases = cases_of_folders(options.data / "tabriz", options.data / "tabriz")
    (other,) = cases_of_folders(options.data / "ljubljana", options.data / "ljubljana")
    healthy = options.data / "healthy" / "sub-01_FLAIR.nii.gz"
    study = _Study(
        cases, other, healthy, options.model, options.weights, options.minutes, options.seed,
        options.work,
    )  # fmt: skip
    text = study_text(
        study.results(),
        command=f"python -m benchmarks.model_choice MODEL --minutes {options.minutes:g}",
        minutes=options.minutes,
        computer=machine(),
    )
    write_study(options.markdown, text)


if __name__ == "__main__":
    main()
