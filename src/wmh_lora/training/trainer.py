"""The training loop: the whole optimiser step is `Trainer.step`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wmh_lora.errors import ConfigError, WMHError
from wmh_lora.models.decoder import DecoderOutput
from wmh_lora.models.network import WMHNet
from wmh_lora.models.precision import fast_dtype
from wmh_lora.training.average import averaged_weights, copy_state, update_average
from wmh_lora.training.batches import Batch, StreamLike, batch_loader
from wmh_lora.training.checkpoint import (
    Checkpoint,
    load_newest_checkpoint,
    load_trained_state,
    save_checkpoint,
    trained_state,
)
from wmh_lora.training.losses import LossTerms
from wmh_lora.training.optimizer import freeze_rateless, parameter_groups, with_current_settings
from wmh_lora.training.processes import Processes, RunningStatistics
from wmh_lora.training.records import append_record, finite, forget_records_after
from wmh_lora.training.schedule import learning_rate
from wmh_lora.training.settings import TrainingConfig
from wmh_lora.training.signals import catch_stop_signals

__all__ = ["Loss", "Trainer"]

_log = logging.getLogger("wmh_lora")
_MAX_BAD_STEPS = 20
# Random streams of their own: the samples of the same seed use others.
_T1_DRAWS, _DROPOUT_DRAWS = 2, 3
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Loss = Callable[[DecoderOutput, Tensor, Tensor], LossTerms]
SaveModel = Callable[[WMHNet, Path, Mapping[str, Any]], None]
Validate = Callable[[WMHNet], Iterable[Mapping[str, Any]]]


class Trainer:
    """Trains the parameters of a network that require gradients.

    Parameters
    ----------
    net
        Network built for training; it is moved to the device of ``processes``.
    loss
        Called with the network's output, target (B, n, h, w) and valid (B, n).
    stream
        Source of samples; sample number ``i`` is ``stream.item(i)``.
    config
        Settings of the run, in steps.
    run_dir
        Folder of ``metrics.jsonl``, ``checkpoints/``, ``best.safetensors``, ``last.safetensors``.
    validate
        Called with the network in evaluation mode; returns one record a case. A record may hold
        ``score``; the mean of the scores picks the best model.
    save_model
        Called with the network, a path and metadata; writes a model file.
    on_record
        Called with every record that was written to ``metrics.jsonl``.
    processes
        Who trains together; this process alone by default.

    Raises
    ------
    ConfigError
        If nothing can be trained, or there are more processes than micro-batches in a step.
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
        on_record: Callable[[Mapping[str, Any]], None] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        if self.processes.count > config.accumulation:
            raise ConfigError(
                f"{self.processes.count} processes cannot share the {config.accumulation} "
                "micro-batches of a step: raise training.accumulation (and lower batch_size)."
            )
        self.net, self.loss, self.stream, self.config = net, loss, stream, config
        self.net.to(self.processes.device)
        self.run_dir = run_dir
        self.validate, self.save_model, self.on_record = validate, save_model, on_record
        freeze_rateless(net, config)
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("the network has no parameter that requires a gradient.")
        self.optimizer = torch.optim.AdamW(parameter_groups(net, config), betas=config.betas)
        device = self.processes.device
        self.dtype = _DTYPES.get(config.precision) or fast_dtype(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.average = copy_state(net) if config.ema_decay > 0 else {}
        self.steps_done = 0
        self.samples_seen = 0
        self.best_score, self.best_step = -math.inf, -1
        self.validated_step = 0
        self._saved: tuple[int, int] | None = None
        self._bad_steps = 0
        self._stop_requested = False  # of this process
        self._stopping = False  # of all
        self._metrics = run_dir / "metrics.jsonl"

    def step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimiser step over ``accumulation`` batches; returns losses, norm and data wait.

        Of several processes, each takes its share of the batches, and returns the same losses.
        """
        config, processes, wait = self.config, self.processes, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps_done, group["peak_lr"], config)
        statistics, shared = RunningStatistics(self.net), processes.count > 1
        totals: dict[str, Tensor] = {}
        for part in range(processes.rank, config.accumulation, processes.count):
            started = time.perf_counter()
            batch = next(batches)
            wait += time.perf_counter() - started
            for name, value in self._backward(batch.to(processes.device), part).items():
                totals[name] = totals.get(name, 0.0) + value / config.accumulation
            if shared:
                statistics.collect(config.accumulation - 1 - part)
        values = torch.stack(list(totals.values()))
        stop = torch.tensor([float(self._stop_requested)])
        changes = statistics.changes if shared else []
        processes.sum_gradients(self.parameters, [values, stop, *changes])
        if shared:
            statistics.finish(config.accumulation)
        self._stopping = bool(stop > 0)
        record = dict(zip(totals, values.tolist(), strict=True))
        norm = self._update(record["loss"], statistics)
        self.steps_done += 1
        self.samples_seen += config.samples_per_step
        return {**record, "grad_norm": norm, "data_wait_s": wait}

    def _backward(self, batch: Batch, part: int) -> dict[str, Tensor]:
        """Add the gradients of micro-batch ``part`` of this step; returns its losses."""
        config, device = self.config, self.processes.device.type
        # Dropout as a function of the step and the micro-batch, whoever computes it.
        draws = np.random.SeedSequence([config.seed, _DROPOUT_DRAWS, self.steps_done, part])
        torch.manual_seed(int(draws.generate_state(1)[0]))
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            output = self.net.forward_train(batch.image, *self._visible_t1(batch, part))
        loss = self.loss(output, batch.target, batch.valid)
        total = loss.total
        if not total.requires_grad:  # what T1 enters by is trained alone, and no crop has a T1
            total = total + 0.0 * sum(parameter.sum() for parameter in self.parameters)
        self.scaler.scale(total / config.accumulation).backward()
        return {"loss": total.detach(), **loss.parts}

    def _update(self, loss: float, statistics: RunningStatistics) -> float:
        """Change the weights, if loss and gradient are finite; returns the gradient's norm."""
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip))
        if math.isfinite(norm) and math.isfinite(loss):
            self.scaler.step(self.optimizer)
            update_average(self.average, self.net, self.steps_done, self.config.ema_decay)
            self._bad_steps = 0
        else:
            statistics.undo()
            self._refuse_step(loss, norm)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

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
        DataError
            If a checkpoint cannot be written; the one before it is still there.
        WMHError
            If the loss stays non-finite.
        """
        config = self.config
        self._start(resume)
        batches = iter(batch_loader(self.stream, config, self.samples_seen, self.processes))
        self.net.train()
        window: list[dict[str, float]] = []
        window_started = last_saved = time.monotonic()
        with catch_stop_signals(self._request_stop):
            while not self._stopping:
                if self._validation_due():
                    began = time.monotonic()
                    self._save()  # a whole-scan validation is long; a kill must not cost the steps
                    self._validate_together()
                    self._save()
                    last_saved = time.monotonic()
                    window_started += last_saved - began  # that time is not the steps'
                if self.steps_done >= config.steps or self._stopping:
                    break
                window.append(self.step(batches))
                if on_step is not None:
                    on_step(self.steps_done, window[-1]["loss"])
                if self.steps_done % config.log_steps == 0 or self.steps_done == config.steps:
                    self._log_window(window, time.monotonic() - window_started)
                    window, window_started = [], time.monotonic()
                if self._checkpoint_due(time.monotonic() - last_saved):
                    self._save()
                    last_saved = time.monotonic()
            self._save()
        self._export("last.safetensors", {})
        return self.steps_done >= config.steps and not self._validation_due()

    def _visible_t1(self, batch: Batch, part: int) -> tuple[Tensor | None, Tensor | None]:
        """T1 of a batch and where it is shown: hidden at random, as a function of the step."""
        if batch.t1 is None or batch.t1_present is None or not self.net.adapter.t1_channels:
            return None, None
        rng = np.random.default_rng([self.config.seed, _T1_DRAWS, self.steps_done, part])
        shown = rng.random(len(batch.t1)) >= self.config.t1_dropout
        return batch.t1, batch.t1_present & torch.from_numpy(shown).to(batch.t1.device)

    # -- state -------------------------------------------------------------------------------

    def _start(self, resume: bool) -> None:
        """Restore the newest checkpoint, or begin."""
        folder = self.run_dir / "checkpoints"
        if not resume and any(folder.glob("step_*.pt")):
            raise ConfigError(
                f"{self.run_dir} already holds a run. Continue it with --resume, or choose "
                "another folder with -o."
            )
        checkpoint = load_newest_checkpoint(folder) if resume else None
        if checkpoint is None:
            _log.info("training from step 0 in %s", self.run_dir)
            if self.processes.first:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                self._metrics.write_text("", encoding="utf-8")
            self.processes.any(False)  # the others have looked before anything is written
            return
        load_trained_state(self.net, checkpoint.model, f"the checkpoint in {folder}")
        self.optimizer.load_state_dict(with_current_settings(checkpoint, self.optimizer))
        if self.average:
            saved = {**copy_state(self.net), **checkpoint.average}
            self.average = {
                name: saved[name].to(mean.device) for name, mean in self.average.items()
            }
        self.steps_done, self.samples_seen = checkpoint.step, checkpoint.samples_seen
        self.best_score, self.best_step = checkpoint.best_score, checkpoint.best_step
        self.validated_step = checkpoint.validated_step
        if checkpoint.scaler:
            self.scaler.load_state_dict(checkpoint.scaler)
        if self.processes.first:
            forget_records_after(self._metrics, checkpoint.step, checkpoint.validated_step)
        self.processes.any(False)  # as above
        _log.info("resumed at step %d in %s", checkpoint.step, self.run_dir)

    def _save(self) -> None:
        if not self.processes.first or self._saved == (self.steps_done, self.validated_step):
            return
        self._saved = (self.steps_done, self.validated_step)
        checkpoint = Checkpoint(
            step=self.steps_done,
            samples_seen=self.samples_seen,
            model=trained_state(self.net),
            optimizer=self.optimizer.state_dict(),
            average={name: mean.cpu() for name, mean in self.average.items()},
            best_score=self.best_score,
            best_step=self.best_step,
            validated_step=self.validated_step,
            scaler=self.scaler.state_dict(),
        )
        config = self.config
        path = save_checkpoint(
            checkpoint, self.run_dir / "checkpoints", config.keep_checkpoints, config.keep_steps
        )
        _log.info("checkpoint %s", path)

    def _checkpoint_due(self, seconds: float) -> bool:
        """Whether one of the intervals has passed, ``seconds`` after the last checkpoint."""
        for steps in (self.config.checkpoint_steps, self.config.keep_steps):
            if steps and self.steps_done % steps == 0:
                return True
        return 0 < self.config.checkpoint_minutes <= seconds / 60

    def _request_stop(self) -> None:
        self._stop_requested = True
        # Several processes agree at the end of their step.
        self._stopping = self._stopping or self.processes.count == 1

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

    # -- validation and records ------------------------------------------------------------------

    def _validate_together(self) -> None:
        """The first process validates, the others wait for it."""
        if self.processes.first:
            self._validate()
        elif self._validation_due():
            self.validated_step = self.steps_done
        self._stopping = self.processes.any(self._stop_requested)

    def _validate(self) -> None:
        assert self.validate is not None
        started = time.monotonic()
        scores: list[float] = []
        with averaged_weights(self.net, self.average):
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
        if self.save_model is not None and self.processes.first:
            with averaged_weights(self.net, self.average):
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
            "step %d/%d loss %.4f  %.2f samples/s  data wait %.0f %%  %s left",
            self.steps_done,
            self.config.steps,
            record["loss"],
            record["samples_per_s"],
            100 * wait / seconds,
            timedelta(seconds=round((self.config.steps - self.steps_done) * seconds / len(window))),
        )

    def _record(self, kind: str, values: Mapping[str, Any]) -> None:
        if not self.processes.first:
            return
        record = {"step": self.steps_done, "kind": kind, **values}
        append_record(self._metrics, record)
        if self.on_record is not None:
            self.on_record(record)


def _brief(record: Mapping[str, Any]) -> str:
    parts = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
    return ", ".join(parts)
