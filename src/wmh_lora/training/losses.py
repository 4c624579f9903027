"""Training losses, for several structures, soft targets and partly labelled cases.

As in the WMH-LoRA description: focal [1]_ + soft Dice [2]_ + boundary-weighted cross-entropy on the
fused output, focal + soft Dice on the heads. Everything is computed in float32, whatever autocast
is in force: squares of small probabilities vanish in half precision.

Shapes: logits and targets (B, n, H, W), targets in [0, 1]; ``known`` says what is labelled. It is
(B, n), True where a case is labelled for a structure, or (B, n, H, W), the share of each pixel that
is labelled. What is not labelled adds nothing to the loss and gets no gradient.

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
    logits: Tensor, target: Tensor, known: Tensor, *, alpha: float = 0.75, gamma: float = 2.0
) -> Tensor:
    """Focal loss of each structure, (n,): the mean over what is known.

    ``alpha_t |target - p|^gamma`` times the cross-entropy: for binary targets the original
    definition, and for soft ones a loss that is least at ``p = target``.
    """
    p = torch.sigmoid(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    alpha_t = alpha * target + (1 - alpha) * (1 - target)
    return _mean_over_known(alpha_t * (target - p).abs().pow(gamma) * entropy, known)


def soft_dice(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Soft Dice loss of each structure, (n,), pooled over what is known in the batch.

    ``1 - 2 sum(p t) / (sum(p) + sum(t))``. Pooling keeps crops without lesions, on which a Dice of
    their own would be all or nothing, from dominating. A structure with no valid case has loss 0.
    """
    weight = _pixel_weight(known, logits)
    p = torch.sigmoid(logits) * weight
    overlap = (p * target).mean(dim=(0, 2, 3))
    area = p.mean(dim=(0, 2, 3)) + (target * weight).mean(dim=(0, 2, 3))
    return 1 - (2 * overlap + _DICE_SMOOTHING) / (area + _DICE_SMOOTHING)


def boundary_band(target: Tensor, known: Tensor | None = None) -> Tensor:
    """Dilation minus erosion with a 5 x 5 square, in [0, 1] like ``target`` (B, n, H, W).

    Outside the image, and where pixels are not ``known`` (B, n, H, W), nothing is assumed: the
    border of either is no boundary.
    """
    pad = _BAND_PX // 2
    inside, outside = target, 1 - target
    if known is not None:
        inside, outside = inside * (known > 0), outside * (known > 0)
    grown, shrunk = (F.max_pool2d(t, _BAND_PX, stride=1, padding=pad) for t in (inside, outside))
    # 1 - shrunk is the erosion; a square that holds nothing known would come out below 0
    return (grown + shrunk - 1).clamp(min=0)


def boundary_bce(logits: Tensor, target: Tensor, known: Tensor, *, weight: float = 3.0) -> Tensor:
    """Cross-entropy of each structure, (n,), with pixels of the boundary band ``weight`` times."""
    band = boundary_band(target, known if known.ndim == 4 else None)
    entropy = F.binary_cross_entropy_with_logits(
        logits, target, weight=1 + (weight - 1) * band, reduction="none"
    )
    return _mean_over_known(entropy, known)


def _pixel_weight(known: Tensor, like: Tensor) -> Tensor:
    """``known`` as weights (B, n, H, W) or (B, n, 1, 1)."""
    weight = known.to(like.dtype)
    return weight if weight.ndim == 4 else weight[:, :, None, None]


def _mean_over_known(pixel_loss: Tensor, known: Tensor) -> Tensor:
    """Mean of (B, n, H, W) over what is known, (n,); 0 where nothing is."""
    weight = _pixel_weight(known, pixel_loss).expand_as(pixel_loss)
    # The bound is far below one pixel at any level: it only keeps 0 / 0 away.
    return (pixel_loss * weight).sum(dim=(0, 2, 3)) / weight.sum(dim=(0, 2, 3)).clamp(min=1e-6)


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
            (B, n, H, W) in [0, 1], NaN in pixels that are neither the structure nor background;
            ignored (may be anything) where not valid.
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
            known = valid[:, :, None, None] & ~target.isnan()
            target = torch.where(known, target.float(), 0.0)
            return self._compute(output, target, known.float())

    def _compute(self, output: DecoderOutput, target: Tensor, known: Tensor) -> LossTerms:
        """Compute in float32, with a clean target and the weight of each pixel."""
        config = self.config
        logits = output.fused_logits.float()
        weights = self.structure_weights.to(logits.device)
        dice = soft_dice(logits, target, known)
        terms = {
            "focal": (weights * self._focal(logits, target, known)).sum(),
            "dice": (weights * dice).sum(),
            "boundary": (
                weights * boundary_bce(logits, target, known, weight=config.boundary_weight)
            ).sum(),
            "heads": logits.new_zeros(()),
        }
        for weight, head in zip(config.head_weights, output.head_logits, strict=True):
            # An exact average where sizes divide: a coarse pixel's target is the lesion share of
            # what is known in it, and it weighs as much as is known.
            size = (head.shape[-2], head.shape[-1])
            share = F.adaptive_avg_pool2d(known, size)
            coarse = F.adaptive_avg_pool2d(target, size) / torch.where(share > 0, share, 1.0)
            head_logits = head.float()
            losses = self._focal(head_logits, coarse, share) + soft_dice(head_logits, coarse, share)
            terms["heads"] = terms["heads"] + weight * (weights * losses).sum()
        total = torch.stack(list(terms.values())).sum()
        parts = {name: term.detach() for name, term in terms.items()}
        for name, value in zip(self.structures, dice.detach(), strict=True):
            parts[f"dice/{name}"] = value
        return LossTerms(total, parts)

    def _focal(self, logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
        """Focal loss with this loss's settings."""
        config = self.config
        return focal(logits, target, known, alpha=config.focal_alpha, gamma=config.focal_gamma)
