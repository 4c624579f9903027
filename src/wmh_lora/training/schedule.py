"""Learning rate as a pure function of the step: nothing to save, nothing to step twice."""

from __future__ import annotations

import math

from wmh_lora.training.settings import TrainingConfig


def learning_rate(step: int, peak: float, config: TrainingConfig) -> float:
    """Learning rate of one optimiser step.

    Linear warm-up from ``peak / warmup_steps`` to ``peak``, then a cosine from ``peak`` to
    ``eta_min`` over the remaining steps, or over every period of ``restart_steps`` steps with
    ``schedule = "warm-restarts"``.

    Parameters
    ----------
    step
        Number of optimiser steps already taken, from 0.
    peak
        Learning rate at the end of the warm-up (that of the parameter group).
    config
        Supplies ``steps``, ``warmup_steps``, ``schedule``, ``restart_steps`` and ``eta_min``.

    Returns
    -------
    float
        Learning rate of that step, in [eta_min, peak] after the warm-up.

    References
    ----------
    Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017.

    Examples
    --------
    >>> config = TrainingConfig(steps=100, warmup_steps=10, eta_min=0.0)
    >>> [round(learning_rate(step, 1.0, config), 6) for step in (0, 9, 10, 55, 100)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    elapsed = step - config.warmup_steps
    period = max(1, config.steps - config.warmup_steps)
    if config.schedule == "warm-restarts":
        period = config.restart_steps
        elapsed %= period
    progress = min(1.0, elapsed / period)
    return config.eta_min + (peak - config.eta_min) * 0.5 * (1.0 + math.cos(math.pi * progress))
