"""Standard augmentation of training images: random crops out of a padded image and mirror images.

Draws come from PyTorch's default CPU generator, whatever the device: a step that is taken again in a reverse
pass draws the same, and a seed means the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from l2t import check

AUGMENTS = ("none", "crop", "flip", "crop-flip")
PAD = 4  # pixels a side


def augment(images: Tensor, kind: str) -> Tensor:
    """Images (..., C, H, W), each as it is or changed at random: same shape, dtype and device.

    As in He et al., "Deep residual learning" (CVPR 2016), section 4.2: four zeros are put on each side and an
    image of the old size is cut out anywhere (``"crop"``), and it is mirrored left to right with probability
    1/2 (``"flip"``). Zero is the mean pixel of standardised images.

    Args:
        images: the images.
        kind: one of ``AUGMENTS``; ``"none"`` returns ``images`` and draws nothing.

    Example:
        >>> _ = torch.manual_seed(1)
        >>> augment(torch.arange(1.0, 10.0).reshape(1, 1, 3, 3), "flip")
        tensor([[[[3., 2., 1.],
                  [6., 5., 4.],
                  [9., 8., 7.]]]])
    """
    check.known("augment", "kind", kind, AUGMENTS)
    if kind == "none":
        return images
    lead, (height, width) = images.shape[:-3], images.shape[-2:]
    rows = torch.arange(height).expand(*lead, height)
    columns = torch.arange(width).expand(*lead, width)
    if "flip" in kind:
        columns = torch.where(torch.randint(2, (*lead, 1)).bool(), columns.flip(-1), columns)
    if "crop" in kind:
        top, left = torch.randint(2 * PAD + 1, (2, *lead, 1))
        rows, columns = rows + top, columns + left
        images = F.pad(images, (PAD, PAD, PAD, PAD))
    pixels = rows[..., :, None] * images.shape[-1] + columns[..., None, :]  # [..., H, W]
    places = pixels.flatten(-2)[..., None, :].to(images.device).expand(*images.shape[:-2], -1)
    cut: Tensor = images.flatten(-2).gather(-1, places).unflatten(-1, (height, width))
    return cut
