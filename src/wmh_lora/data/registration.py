"""Bring an anatomy's landmarks onto a template's: affine, then a smooth field of displacements.

Only used to lay lesion masks into other heads, where a few millimetres do not matter; scans are
never registered by it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import ndimage

FloatArray = npt.NDArray[np.float32]


def register_to_template(
    maps: FloatArray, template: FloatArray, step_voxels: int, *, iterations: int = 120
) -> FloatArray:
    """Find where each voxel of a subject lies in a template.

    Parameters
    ----------
    maps, template
        (C, X, Y, Z) landmark maps (brain, white matter, ventricles) on 1 mm RAS grids.
    step_voxels
        Spacing of the returned field's nodes, in voxels of the subject.
    iterations
        Optimiser steps for each of the two stages.

    Returns
    -------
    array (3, x, y, z) float32
        Template voxel coordinates at every ``step_voxels``-th voxel of the subject.
    """
    moving, fixed = _smooth(template), _smooth(maps)
    nodes = np.meshgrid(
        *(np.arange(0, n + step_voxels, step_voxels) for n in maps.shape[1:]), indexing="ij"
    )
    points = np.stack(nodes, -1).astype(np.float32)
    target = torch.from_numpy(
        np.stack([ndimage.map_coordinates(m, points.transpose(3, 0, 1, 2), order=1) for m in fixed])
    )
    source = torch.from_numpy(moving)[None]
    size = torch.tensor(template.shape[1:], dtype=torch.float32)

    centre, spread = (_moments(m) for m in (maps[0], template[0]))
    linear = torch.diag(torch.tensor(spread[1] / centre[1])).requires_grad_()
    shift = torch.zeros(3, requires_grad=True)
    lattice = torch.zeros((1, 3, 9, 11, 9), requires_grad=True)
    offsets = torch.from_numpy(points - centre[0])

    def locate(*, bend: bool) -> torch.Tensor:
        where = offsets @ linear.T + torch.from_numpy(spread[0]) + 10.0 * shift
        if bend:
            field = F.interpolate(
                lattice, size=offsets.shape[:3], mode="trilinear", align_corners=True
            )
            where = where + 10.0 * field[0].permute(1, 2, 3, 0)
        return where

    for bend in (False, True):
        parameters = [linear, shift, lattice] if bend else [linear, shift]
        optimiser = torch.optim.Adam(parameters, lr=0.02)
        for _ in range(iterations):
            where = locate(bend=bend)
            grid = (2.0 * (where + 0.5) / size - 1.0).flip(-1)[None]
            sampled = F.grid_sample(source, grid, align_corners=False)[0]
            loss = ((sampled - target) ** 2).mean()
            if bend:
                rough = sum(lattice.diff(dim=d).square().mean() for d in (2, 3, 4))
                loss = loss + 0.05 * rough
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return locate(bend=True).detach().permute(3, 0, 1, 2).numpy().astype(np.float32)


def _smooth(maps: FloatArray) -> FloatArray:
    return np.stack([ndimage.gaussian_filter(m, 3.0) for m in maps])


def _moments(mask: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the centre and the spread along each axis of a mask, in voxels."""
    where = np.argwhere(mask > 0)[::50].astype(np.float32)
    return where.mean(axis=0), where.std(axis=0)
