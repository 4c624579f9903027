"""What is made of the records of a run while it goes on: TensorBoard events, training curves."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wmh_lora.errors import ConfigError
from wmh_lora.files import open_atomic

__all__ = ["RunLogs", "draw_curves"]

_log = logging.getLogger("wmh_lora")
_LOSSES = ("loss", "focal", "dice", "boundary", "heads")


class RunLogs:
    """Called with every record of a run.

    Parameters
    ----------
    run_dir
        Folder of the run: ``metrics.jsonl`` is there, ``curves.png`` and ``tensorboard/`` go there.
    tensorboard
        Write TensorBoard events.

    Raises
    ------
    ConfigError
        If TensorBoard is asked for and not installed.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool = False) -> None:
        self.run_dir = run_dir
        self._writer: Any = None
        if tensorboard:
            if importlib.util.find_spec("tensorboard") is None:
                raise ConfigError(
                    "training.tensorboard needs TensorBoard: pip install tensorboard, or set "
                    "training.tensorboard = false."
                )
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        self._draws = importlib.util.find_spec("matplotlib") is not None
        if not self._draws:
            _log.info("no curves.png: matplotlib is not installed (pip install matplotlib)")

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Pass a record on; a validation also draws the curves again."""
        if self._writer is not None:
            place = record["kind"]
            if place == "validation":
                place = f"{place}/{record['case']}"
            for name, value in record.items():
                if name not in ("step", "kind", "case") and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{place}/{name}", value, record["step"])
        if record["kind"] == "validation_mean":
            self._draw()

    def close(self) -> None:
        """Draw the curves a last time and finish the events."""
        self._draw()
        if self._writer is not None:
            self._writer.close()

    def _draw(self) -> None:
        if self._draws:
            lines = (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            draw_curves([json.loads(line) for line in lines], self.run_dir / "curves.png")


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw losses, validation Dice and learning rates over the steps.

    Parameters
    ----------
    records
        Lines of ``metrics.jsonl``.
    path
        PNG to write; one that exists is replaced.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [record for record in records if record["kind"] == "train"]
    figure = Figure(figsize=(8.0, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores, rates = figure.subplots(3, 1, sharex=True)
    for name in _LOSSES:
        _line(losses, train, name, name, linewidth=2.0 if name == "loss" else 1.0)
    losses.set_ylabel("training loss")
    means = [record for record in records if record["kind"] == "validation_mean"]
    for case in sorted({r["case"] for r in records if r["kind"] == "validation"}):
        of_case = [r for r in records if r.get("case") == case]
        _line(scores, of_case, "score", "", color="0.8", linewidth=0.8)
    _line(scores, means, "score", "mean over scans", marker="o", markersize=3)
    best = max((r for r in means if r["score"] is not None), key=lambda r: r["score"], default=None)
    if best is not None:
        scores.plot(best["step"], best["score"], "k*", label=f"best {best['score']:.3f}")
    scores.set_ylabel("validation Dice at 0.5")
    scores.set_ylim(0, 1)
    for names in _equal_rates(train):
        label = ", ".join(name.removeprefix("lr_") for name in names)
        _line(rates, train, names[0], label)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("optimiser step")
    for axes in (losses, scores, rates):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    with open_atomic(path, overwrite=True) as stream:
        figure.savefig(stream, format="png", dpi=120)


def _equal_rates(train: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Names of learning rates, those that are the same throughout together."""
    names = sorted({name for record in train for name in record if name.startswith("lr_")})
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(record.get(name) for record in train), []).append(name)
    return list(groups.values())


def _line(
    axes: Any, records: Sequence[Mapping[str, Any]], name: str, label: str, **style: Any
) -> None:
    """Plot one value over the steps, where it is defined."""
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label or "_nolegend_", **style)
