"""The data: three sets of real images that ship inside packages, and a density in the plane.

Images are in [-1, 1], shape ``(N, C, H, W)``; points of the plane have shape ``(N, 2)``.
"""

import math
from collections.abc import Callable

import skimage.data
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor


def cut(photograph: object, size: int, stride: int) -> Tensor:
    """Shrink a photograph by 2 and cut it into overlapping patches. Shape ``(N, C, size, size)``."""
    image = torch.tensor(photograph).float() / 127.5 - 1
    image = image.permute(2, 0, 1) if image.ndim == 3 else image[None]
    windows = F.avg_pool2d(image, 2).unfold(1, size, stride).unfold(2, size, stride)
    return windows.permute(1, 2, 0, 3, 4).reshape(-1, len(image), size, size)


def digits(size: int) -> Tensor:
    """1797 handwritten digits of 8x8 pixels (scikit-learn)."""
    if size != 8:
        raise ValueError(f"the digits have 8x8 pixels, got size {size}.")
    return torch.tensor(load_digits().images).float()[:, None] / 8 - 1


def photographs(size: int) -> Tensor:
    """Colour patches of eight photographs (scikit-learn's two, and six of scikit-image)."""
    images = list(load_sample_images().images)
    for name in ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry"):
        images.append(getattr(skimage.data, name)())
    images.append(skimage.data.stereo_motorcycle()[0])
    return torch.cat([cut(image, size, size // 2) for image in images])


def textures(size: int) -> Tensor:
    """Grey patches of brick, grass and gravel (scikit-image): little power at low frequencies."""
    images = [getattr(skimage.data, name)() for name in ("brick", "grass", "gravel")]
    return torch.cat([cut(image, size, size // 2) for image in images])


def spiral(size: int) -> Tensor:
    """Points on two arms of a spiral with a little noise; ``size`` is not used."""
    generator = torch.Generator().manual_seed(0)
    angle = 3 * math.pi * torch.rand(20_000, generator=generator).sqrt()
    arm = torch.where(torch.rand(20_000, generator=generator) < 0.5, 1.0, -1.0)
    points = arm[:, None] * angle[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    points = points + 0.25 * torch.randn(points.shape, generator=generator)
    return 0.5 * points / points.std()


LOADERS: dict[str, Callable[[int], Tensor]] = {
    "digits": digits,
    "photographs": photographs,
    "textures": textures,
    "textures-long": textures,  # students train longer
    "spiral": spiral,
}
