"""The training loop: the whole optimiser step is `Trainer.step`."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wmh_lora.errors import ConfigError, WMHError
from wmh_lora.models.decoder import DecoderOutput
from wmh_lora.models.network import WMHNet
from wmh_lora.training.batches import Batch, StreamLike, batch_loader
from wmh_lora.training.checkpoint import (
    Checkpoint,
    load_newest_checkpoint,
    load_trained_state,
    save_checkpoint,
    trained_state,
)
from wmh_lora.training.losses import LossTerms
from wmh_lora.training.records import append_record, finite, forget_records_after
from wmh_lora.training.schedule import learning_rate
from wmh_lora.training.settings import TrainingConfig

__all__ = ["Loss", "Trainer", "parameter_groups"]

_log = logging.getLogger("wmh_lora")
_MAX_BAD_STEPS = 20

Loss = Callable[[DecoderOutput, Tensor, Tensor], LossTerms]
SaveModel = Callable[[WMHNet, Path, Mapping[str, Any]], None]
Validate = Callable[[WMHNet], Iterable[Mapping[str, Any]]]


class Trainer:
    """Trains the parameters of a network that require gradients.

    Parameters
    ----------
    net
        Network with LoRA attached.
    loss
        Called with the network's output, target (B, n, h, w) and valid (B, n).
    stream
        Source of samples; sample number ``i`` is ``stream.item(i)``.
    config
        Settings of the run.
    run_dir
        Folder of ``metrics.jsonl``, ``checkpoints/``, ``best.safetensors``, ``last.safetensors``.
    validate
        Called with the network in evaluation mode; returns one record a case. A record may hold
        ``score``; the mean of the scores picks the best model.
    save_model
        Called with the network, a path and metadata; writes a model file.
    """

    def __init__(
        self,
        net: WMHNet,
        loss: Loss,
        stream: StreamLike,
        config: TrainingConfig,
        run_dir: Path,
        *,
        validate: Validate | None = None,
        save_model: SaveModel | None = None,
    ) -> None:
        self.net, self.loss, self.stream, self.config = net, loss, stream, config
        self.run_dir = run_dir
        self.validate, self.save_model = validate, save_model
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("the network has no parameter that requires a gradient.")
        self.optimizer = torch.optim.AdamW(parameter_groups(net, config), betas=config.betas)
        self.average = self._copy_parameters() if config.ema_decay > 0 else {}
        self.steps_done = 0
        self.samples_seen = 0
        self.best_score, self.best_step = -math.inf, -1
        self.validated_step = 0
        self._saved: tuple[int, int] | None = None
        self._bad_steps = 0
        self._stop_requested = False
        self._metrics = run_dir / "metrics.jsonl"

    def step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimiser step over ``accumulation`` batches; returns losses, norm and data wait."""
        config, record, wait = self.config, {"loss": 0.0}, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps_done, group["peak_lr"], config)
        for _ in range(config.accumulation):
            started = time.perf_counter()
            batch = next(batches)
            wait += time.perf_counter() - started
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                output = self.net.forward_train(batch.image)
            loss = self.loss(output, batch.target, batch.valid)
            (loss.total / config.accumulation).backward()
            for name, value in {"loss": loss.total.detach(), **loss.parts}.items():
                record[name] = record.get(name, 0.0) + float(value) / config.accumulation
        norm = float(nn.utils.clip_grad_norm_(self.parameters, config.grad_clip))
        if math.isfinite(norm) and math.isfinite(record["loss"]):
            self.optimizer.step()
            self._bad_steps = 0
        else:
            self._refuse_step(record["loss"], norm)
        self.optimizer.zero_grad(set_to_none=True)
        self._update_average()
        self.steps_done += 1
        self.samples_seen += config.samples_per_step
        return {**record, "grad_norm": norm, "data_wait_s": wait}

    def run(
        self, *, resume: bool = False, on_step: Callable[[int, float], None] | None = None
    ) -> bool:
        """Train to ``config.steps``; on SIGTERM or SIGINT finish the step and checkpoint.

        Parameters
        ----------
        resume
            Continue from the newest checkpoint of ``run_dir`` that can be read.
        on_step
            Called after every step with the steps done and the loss.

        Returns
        -------
        bool
            True when all steps are done, False when a signal stopped the run early.

        Raises
        ------
        ConfigError
            If the run folder holds checkpoints and ``resume`` is False.
        WMHError
            If the loss stays non-finite.
        """
        config = self.config
        self._start(resume)
        batches = iter(batch_loader(self.stream, config, self.samples_seen))
        self.net.train()
        window: list[dict[str, float]] = []
        window_started = last_saved = time.monotonic()
        with self._catch_signals():
            while not self._stop_requested:
                if self._validation_due():
                    self._save()  # a whole-scan validation is long; a kill must not cost the steps
                    self._validate()
                    self._save()
                    window_started = time.monotonic()
                if self.steps_done >= config.steps or self._stop_requested:
                    break
                window.append(self.step(batches))
                if on_step is not None:
                    on_step(self.steps_done, window[-1]["loss"])
                if self.steps_done % config.log_steps == 0 or self.steps_done == config.steps:
                    self._log_window(window, time.monotonic() - window_started)
                    window, window_started = [], time.monotonic()
                minutes = (time.monotonic() - last_saved) / 60
                by_steps = (
                    config.checkpoint_steps and self.steps_done % config.checkpoint_steps == 0
                )
                if by_steps or 0 < config.checkpoint_minutes <= minutes:
                    self._save()
                    last_saved = time.monotonic()
            self._save()
        self._export("last.safetensors", {})
        return self.steps_done >= config.steps

    # -- state -------------------------------------------------------------------------------

    def _start(self, resume: bool) -> None:
        """Restore the newest checkpoint, or begin."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        folder = self.run_dir / "checkpoints"
        if not resume and any(folder.glob("step_*.pt")):
            raise ConfigError(
                f"{self.run_dir} already holds a run. Continue it with --resume, or choose "
                "another folder with -o."
            )
        checkpoint = load_newest_checkpoint(folder) if resume else None
        if checkpoint is None:
            _log.info("training from step 0 in %s", self.run_dir)
            # Initial weights were drawn by the caller; dropout starts from the seed.
            torch.manual_seed(self.config.seed)
            self._metrics.write_text("", encoding="utf-8")
            return
        load_trained_state(self.net, checkpoint.model, f"the checkpoint in {folder}")
        self.optimizer.load_state_dict(_with_current_settings(checkpoint, self.optimizer))
        if self.average:
            self.average = checkpoint.average or self._copy_parameters()
        self.steps_done, self.samples_seen = checkpoint.step, checkpoint.samples_seen
        self.best_score, self.best_step = checkpoint.best_score, checkpoint.best_step
        self.validated_step = checkpoint.validated_step
        torch.set_rng_state(checkpoint.rng_state)
        forget_records_after(self._metrics, checkpoint.step, checkpoint.validated_step)
        _log.info("resumed at step %d in %s", checkpoint.step, self.run_dir)

    def _save(self) -> None:
        if self._saved == (self.steps_done, self.validated_step):
            return
        self._saved = (self.steps_done, self.validated_step)
        checkpoint = Checkpoint(
            step=self.steps_done,
            samples_seen=self.samples_seen,
            model=trained_state(self.net),
            optimizer=self.optimizer.state_dict(),
            rng_state=torch.get_rng_state(),
            average=self.average,
            best_score=self.best_score,
            best_step=self.best_step,
            validated_step=self.validated_step,
        )
        path = save_checkpoint(
            checkpoint, self.run_dir / "checkpoints", self.config.keep_checkpoints
        )
        _log.info("checkpoint %s", path)

    def _validation_due(self) -> bool:
        """Whether this step asks for a validation that has not been done (before a resume, say)."""
        every = self.config.validate_steps
        last = self.steps_done == self.config.steps
        asked = last or (every > 0 and self.steps_done % every == 0)
        return asked and self.validated_step < self.steps_done and self.validate is not None

    def _refuse_step(self, loss: float, norm: float) -> None:
        self._bad_steps += 1
        _log.warning("step %d left out: loss %g, gradient norm %g", self.steps_done + 1, loss, norm)
        if self._bad_steps >= _MAX_BAD_STEPS:
            raise WMHError(
                f"the loss or its gradient was not finite in {_MAX_BAD_STEPS} steps in a row, up "
                f"to step {self.steps_done + 1}. Lower the learning rates, or set precision fp32."
            )

    # -- averaged weights ----------------------------------------------------------------------

    def _copy_parameters(self) -> dict[str, Tensor]:
        named = self.net.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    def _update_average(self) -> None:
        # The decay grows from 0 so that the initial weights are forgotten early in the run.
        decay = min(self.config.ema_decay, (1 + self.steps_done) / (10 + self.steps_done))
        parameters = dict(self.net.named_parameters())
        for name, mean in self.average.items():
            mean.lerp_(parameters[name].detach(), 1 - decay)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Network in evaluation mode, with averaged weights if there are any.

        Random numbers drawn meanwhile do not move the generator that dropout uses.
        """
        own = self._copy_parameters() if self.average else {}
        parameters = dict(self.net.named_parameters())
        self.net.eval()
        try:
            with torch.no_grad():
                for name, mean in self.average.items():
                    parameters[name].copy_(mean)
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    parameters[name].copy_(value)
            self.net.train()

    # -- validation and records ------------------------------------------------------------------

    def _validate(self) -> None:
        assert self.validate is not None
        started = time.monotonic()
        scores: list[float] = []
        with self._averaged_weights():
            for record in self.validate(self.net):
                if self._stop_requested:
                    return
                self._record("validation", record)
                _log.info("validation at step %d: %s", self.steps_done, _brief(record))
                if math.isfinite(record.get("score", math.nan)):
                    scores.append(record["score"])
        score = float(np.mean(scores)) if scores else math.nan
        if score > self.best_score:
            self.best_score, self.best_step = score, self.steps_done
            self._export("best.safetensors", {"validation_score": score})
        self._export("last.safetensors", {"validation_score": score})
        self.validated_step = self.steps_done
        seconds = time.monotonic() - started
        summary = {"score": score, "best_score": self.best_score, "best_step": self.best_step}
        self._record("validation_mean", {**summary, "seconds": seconds})

    def _export(self, name: str, metadata: Mapping[str, Any]) -> None:
        if self.save_model is not None:
            with self._averaged_weights():
                self.save_model(
                    self.net, self.run_dir / name, {"step": self.steps_done, **finite(metadata)}
                )

    def _log_window(self, window: Sequence[Mapping[str, float]], seconds: float) -> None:
        record = {name: float(np.mean([r[name] for r in window])) for name in window[0]}
        wait = record.pop("data_wait_s") * len(window)
        samples = len(window) * self.config.samples_per_step
        record |= {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups[::2]}
        record |= {"seconds": seconds, "samples_per_s": samples / seconds}
        self._record("train", {**record, "data_wait": wait / seconds})
        _log.info(
            "step %d/%d loss %.4f  %.2f samples/s  data wait %.0f %%",
            self.steps_done,
            self.config.steps,
            record["loss"],
            record["samples_per_s"],
            100 * wait / seconds,
        )

    def _record(self, kind: str, values: Mapping[str, Any]) -> None:
        append_record(self._metrics, {"step": self.steps_done, "kind": kind, **values})

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask for a stop after this step; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.getsignal(number) for number in numbers}

        def request_stop(number: int, frame: FrameType | None) -> None:
            _log.warning("%s: stopping after this step", signal.Signals(number).name)
            self._stop_requested = True
            signal.signal(number, previous[signal.Signals(number)])

        try:
            for number in numbers:
                signal.signal(number, request_stop)
            yield
        finally:
            for number in numbers:
                signal.signal(number, previous[number])


def parameter_groups(net: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Trained parameters by kind, each kind as two groups: with and without weight decay.

    Vectors and scalars (biases, norms, fusion weights) are not decayed.
    """
    peaks = {
        "lora": config.lora_lr,
        "adapter": config.adapter_lr,
        "decoder": config.decoder_lr,
    }
    kinds: dict[str, tuple[list[Tensor], list[Tensor]]] = {kind: ([], []) for kind in peaks}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            kind = "lora" if "lora_" in name else "adapter" if "adapter" in name else "decoder"
            kinds[kind][parameter.ndim < 2].append(parameter)
    groups: list[dict[str, Any]] = []
    for kind, (decayed, plain) in kinds.items():
        common = {"name": kind, "peak_lr": peaks[kind], "lr": peaks[kind]}
        groups.append({"params": decayed, "weight_decay": config.weight_decay, **common})
        groups.append({"params": plain, "weight_decay": 0.0, **common})
    return groups


def _with_current_settings(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Saved moments with the learning rates and decay of the present configuration."""
    state = dict(checkpoint.optimizer)
    changeable = ("peak_lr", "weight_decay", "betas")
    state["param_groups"] = [
        {**saved, **{key: present[key] for key in changeable}}
        for saved, present in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return state


def _brief(record: Mapping[str, Any]) -> str:
    parts = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
    return ", ".join(parts)
