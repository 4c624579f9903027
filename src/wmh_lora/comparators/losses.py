"""The comparators' losses: Dice alone, or Dice and cross-entropy, at one level or several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wmh_lora.models.decoder import DecoderOutput
from wmh_lora.training.losses import LossTerms, soft_dice

__all__ = ["RegionLoss"]


class RegionLoss:
    """Soft Dice, with cross-entropy where asked for, of slices or of volumes.

    Outputs of coarser levels, which come upsampled, weigh half as much as the one before them, and
    all weights sum to 1, as in nnU-Net (Isensee et al., Nature Methods 18:203, 2021).

    Parameters
    ----------
    cross_entropy : bool
        Add the mean cross-entropy over known pixels.

    Examples
    --------
    >>> loss = RegionLoss(cross_entropy=True)
    >>> output = DecoderOutput(torch.zeros(2, 1, 4, 8, 8), ())
    >>> terms = loss(output, torch.ones(2, 4, 8, 8), torch.ones(2, 4) > 0)
    >>> {name: round(float(value), 3) for name, value in terms.parts.items()}
    {'dice': 0.333, 'cross_entropy': 0.693}
    """

    def __init__(self, *, cross_entropy: bool) -> None:
        self.cross_entropy = cross_entropy

    def __call__(self, output: DecoderOutput, target: Tensor, valid: Tensor) -> LossTerms:
        """Compute the loss.

        Parameters
        ----------
        output : DecoderOutput
            Logits (B, 1, h, w) or (B, 1, D, h, w), all of one size.
        target : Tensor
            (B, D, h, w) in [0, 1], D = 1 for slices; NaN in pixels that are neither lesion nor
            background.
        valid : Tensor
            (B, D), whether a slice is labelled at all.
        """
        # volumes as tall slices: nothing here looks at neighbours
        levels = [
            logits.flatten(2, -2).float() for logits in (output.fused_logits, *output.head_logits)
        ]
        shape = levels[0].shape
        known = (valid[:, :, None, None] & ~target.isnan()).reshape(shape).float()
        target = target.float().nan_to_num().reshape(shape)
        weights = [0.5**level for level in range(len(levels))]
        terms = {"dice": target.new_zeros(())}
        if self.cross_entropy:
            terms["cross_entropy"] = target.new_zeros(())
        for logits, weight in zip(levels, weights):
            share = weight / sum(weights)
            terms["dice"] = terms["dice"] + share * soft_dice(logits, target, known).mean()
            if self.cross_entropy:
                terms["cross_entropy"] = terms["cross_entropy"] + share * _cross_entropy(
                    logits, target, known
                )
        total = torch.stack(list(terms.values())).sum()
        return LossTerms(total, {name: term.detach() for name, term in terms.items()})


def _cross_entropy(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    entropy = F.binary_cross_entropy_with_logits(logits, target, known, reduction="sum")
    return entropy / known.sum().clamp(min=1.0)
