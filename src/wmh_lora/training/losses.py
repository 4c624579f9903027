"""Training losses, for several structures, soft targets and partly labelled cases.

As in the WMH-LoRA description: focal [1]_ + soft Dice [2]_ + boundary-weighted cross-entropy on the
fused output, focal + soft Dice on the heads. Everything is computed in float32, whatever autocast
is in force: squares of small probabilities vanish in half precision.

Shapes: logits and targets (B, n, H, W), targets in [0, 1]; ``valid`` (B, n) is True where a case is
labelled for a structure. Unlabelled structures add nothing to the loss and get no gradient.

References
----------
.. [1] Lin et al., Focal Loss for Dense Object Detection, ICCV 2017; for soft targets Li et al.,
   Generalized Focal Loss, NeurIPS 2020, equation 4.
.. [2] Milletari et al., V-Net, 3DV 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wmh_lora.errors import ConfigError
from wmh_lora.models.decoder import LEVEL_STRIDES, DecoderOutput

__all__ = [
    "LossConfig",
    "LossTerms",
    "SegmentationLoss",
    "boundary_band",
    "boundary_bce",
    "focal",
    "soft_dice",
]

# Smoothing of the Dice, as a share of the pooled area: one pixel in ten of 100 x 100. It makes the
# empty case finite and bounds its gradient, and is far below the share of any labelled lesion.
# As a share (not a pixel count) it weighs the same at every level of the decoder.
_DICE_SMOOTHING = 1e-5
_BAND_PX = 5  # side of the square element


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss; the defaults are the published ones.

    Attributes
    ----------
    focal_alpha, focal_gamma : float
        Weight of the foreground, and exponent of the modulating factor.
    boundary_weight : float
        Weight of pixels in the boundary band; others weigh 1.
    head_weights : tuple of float
        Of the decoder's heads, coarse to fine.
    main_structure : str
        The structure that weighs 1.
    other_structure_weight : float
        Weight of every other structure.
    """

    focal_alpha: float = 0.75
    focal_gamma: float = 2.0
    boundary_weight: float = 3.0
    head_weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    main_structure: str = "wmh"
    other_structure_weight: float = 0.2

    def __post_init__(self) -> None:
        if len(self.head_weights) != len(LEVEL_STRIDES) or min(self.head_weights) < 0:
            raise ConfigError(
                f"Setting 'head_weights' must be {len(LEVEL_STRIDES)} weights of zero or more, "
                f"coarse to fine, found {self.head_weights!r}."
            )
        if not 0.0 <= self.focal_alpha <= 1.0:
            raise ConfigError(f"Setting 'focal_alpha' must be in [0, 1], found {self.focal_alpha}.")
        if self.focal_gamma != 0 and not 1.0 <= self.focal_gamma < math.inf:
            # In between, the gradient is infinite where the prediction equals the target.
            raise ConfigError(
                f"Setting 'focal_gamma' must be 0 or at least 1, found {self.focal_gamma!r}."
            )
        for name in ("boundary_weight", "other_structure_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"Setting {name!r} must be zero or more, found {getattr(self, name)!r}."
                )


@dataclass(frozen=True)
class LossTerms:
    """The loss of one batch.

    Attributes
    ----------
    total : Tensor
        Scalar to differentiate.
    parts : dict of str to Tensor
        Detached scalars: ``focal``, ``dice`` and ``boundary`` of the fused output and ``heads``,
        weighted over structures (they sum to the total), then ``dice/<structure>`` unweighted.
    """

    total: Tensor
    parts: dict[str, Tensor]


def focal(
    logits: Tensor, target: Tensor, valid: Tensor, *, alpha: float = 0.75, gamma: float = 2.0
) -> Tensor:
    """Focal loss of each structure, (n,): the mean over pixels and valid cases.

    ``alpha_t |target - p|^gamma`` times the cross-entropy: for binary targets the original
    definition, and for soft ones a loss that is least at ``p = target``.
    """
    p = torch.sigmoid(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    alpha_t = alpha * target + (1 - alpha) * (1 - target)
    return _mean_over_valid(alpha_t * (target - p).abs().pow(gamma) * entropy, valid)


def soft_dice(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Soft Dice loss of each structure, (n,), pooled over the valid cases of the batch.

    ``1 - 2 sum(p t) / (sum(p) + sum(t))``. Pooling keeps crops without lesions, on which a Dice of
    their own would be all or nothing, from dominating. A structure with no valid case has loss 0.
    """
    mask = valid[:, :, None, None].to(logits.dtype)
    p = torch.sigmoid(logits) * mask
    target = target * mask
    overlap = (p * target).mean(dim=(0, 2, 3))
    area = p.mean(dim=(0, 2, 3)) + target.mean(dim=(0, 2, 3))
    return 1 - (2 * overlap + _DICE_SMOOTHING) / (area + _DICE_SMOOTHING)


def boundary_band(target: Tensor) -> Tensor:
    """Dilation minus erosion with a 5 x 5 square, in [0, 1] like ``target`` (B, n, H, W).

    Outside the image nothing is assumed: the border itself is no boundary.
    """
    pad = _BAND_PX // 2
    dilated = F.max_pool2d(target, _BAND_PX, stride=1, padding=pad)
    eroded = -F.max_pool2d(-target, _BAND_PX, stride=1, padding=pad)
    return dilated - eroded


def boundary_bce(logits: Tensor, target: Tensor, valid: Tensor, *, weight: float = 3.0) -> Tensor:
    """Cross-entropy of each structure, (n,), with pixels of the boundary band ``weight`` times."""
    pixel_weight = 1 + (weight - 1) * boundary_band(target)
    entropy = F.binary_cross_entropy_with_logits(
        logits, target, weight=pixel_weight, reduction="none"
    )
    return _mean_over_valid(entropy, valid)


def _mean_over_valid(pixel_loss: Tensor, valid: Tensor) -> Tensor:
    """Mean of (B, n, H, W) over pixels and valid cases, (n,); 0 where no case is valid."""
    mask = valid.to(pixel_loss.dtype)
    return (pixel_loss.mean(dim=(2, 3)) * mask).sum(dim=0) / mask.sum(dim=0).clamp(min=1)


class SegmentationLoss:
    """The loss of a whole decoder output.

    Parameters
    ----------
    structures : sequence of str
        Meaning of the output channels, in order.
    config : LossConfig
        Weights.

    Examples
    --------
    >>> loss = SegmentationLoss(["wmh"])
    >>> logits = torch.zeros(2, 1, 8, 8)
    >>> heads = tuple(torch.zeros(2, 1, s, s) for s in (1, 2, 4, 8))
    >>> terms = loss(DecoderOutput(logits, heads), torch.ones(2, 1, 8, 8), torch.ones(2, 1) > 0)
    >>> sorted(terms.parts)
    ['boundary', 'dice', 'dice/wmh', 'focal', 'heads']
    """

    def __init__(self, structures: Sequence[str], config: LossConfig | None = None) -> None:
        self.structures = tuple(structures)
        self.config = config or LossConfig()
        self.structure_weights = torch.tensor(
            [
                1.0 if name == self.config.main_structure else self.config.other_structure_weight
                for name in self.structures
            ]
        )

    def __call__(self, output: DecoderOutput, target: Tensor, valid: Tensor) -> LossTerms:
        """Compute the loss.

        Parameters
        ----------
        output : DecoderOutput
            Logits, of any floating type.
        target : Tensor
            (B, n, H, W) in [0, 1]; ignored (may be anything, NaN too) where not valid.
        valid : Tensor
            (B, n), bool.

        Raises
        ------
        ValueError
            If shapes do not match.
        """
        logits = output.fused_logits
        expected = (*logits.shape[:2],)
        if target.shape != logits.shape or tuple(valid.shape) != expected:
            raise ValueError(
                f"Logits {tuple(logits.shape)} need a target of that shape and valid {expected}, "
                f"found {tuple(target.shape)} and {tuple(valid.shape)}."
            )
        with torch.autocast(logits.device.type, enabled=False):
            target = torch.where(valid[:, :, None, None], target.float(), 0.0)
            return self._compute(output, target, valid)

    def _compute(self, output: DecoderOutput, target: Tensor, valid: Tensor) -> LossTerms:
        """Compute in float32, with a clean target."""
        config = self.config
        logits = output.fused_logits.float()
        weights = self.structure_weights.to(logits.device)
        dice = soft_dice(logits, target, valid)
        terms = {
            "focal": (weights * self._focal(logits, target, valid)).sum(),
            "dice": (weights * dice).sum(),
            "boundary": (
                weights * boundary_bce(logits, target, valid, weight=config.boundary_weight)
            ).sum(),
            "heads": logits.new_zeros(()),
        }
        for weight, head in zip(config.head_weights, output.head_logits, strict=True):
            # An exact average where sizes divide: a coarse pixel's target is its lesion share.
            coarse = F.adaptive_avg_pool2d(target, (head.shape[-2], head.shape[-1]))
            head_logits = head.float()
            losses = self._focal(head_logits, coarse, valid) + soft_dice(head_logits, coarse, valid)
            terms["heads"] = terms["heads"] + weight * (weights * losses).sum()
        total = torch.stack(list(terms.values())).sum()
        parts = {name: term.detach() for name, term in terms.items()}
        for name, value in zip(self.structures, dice.detach(), strict=True):
            parts[f"dice/{name}"] = value
        return LossTerms(total, parts)

    def _focal(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Focal loss with this loss's settings."""
        config = self.config
        return focal(logits, target, valid, alpha=config.focal_alpha, gamma=config.focal_gamma)
