r"""LPIPS, the perceptual distance of CM and CTM.

Needs torchvision, from the same place as your PyTorch, and lpips: then ``pip install analytic-precond[lpips]``. In the
other order pip may replace a CPU build of PyTorch (docs/howto/lpips-offline.md).

With $f_k$ the features of an image after stage k of a network trained on ImageNet, each position's vector scaled to
length 1, and weights $w_k$ fitted to people's judgements (Zhang et al. 2018):

$$d(x, y) = \sum_k \underset{positions}{\mathrm{mean}}\ \sum_c w_{k,c}\, (f_{k,c}(x) - f_{k,c}(y))^2$$
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .._checks import all_true, check_choice, check_count, check_tensor
from .._precision import without_autocast
from .lpips_weights import BACKBONES, Weights, frozen_lpips

_LIMIT = 1.01  # bfloat16's neighbour of 1 is 1.008
_FAR = 100.0  # where no student in training goes, but images in 0..255 do
_EPSILON = 1e-10  # lpips' own, for features of length 0


@dataclass(frozen=True)
class ResizeRule:
    """Which images to enlarge before features are taken, and to what size.

    Images whose smaller side is below ``below`` become ``to`` by ``to`` pixels, bilinearly (half-pixel centres, no
    antialiasing). The defaults are CM's; it looks at the width, CTM at the height, of square images.

    Attributes:
        below: Images with a side below it are resized.
        to: Side of the resized images.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is below 1.

    Examples:
        >>> ResizeRule()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 3, 224, 224])
    """

    below: int = 256
    to: int = 224

    def __post_init__(self) -> None:
        check_count(self.below, 1, "below")
        check_count(self.to, 1, "to")

    def __call__(self, images: Tensor) -> Tensor:
        """Return the images, resized where the rule says so. Shape ``(B, C, height, width)``."""
        if min(images.shape[-2:]) >= self.below:
            return images
        return functional.interpolate(images, size=(self.to, self.to), mode="bilinear", align_corners=False)


CM_RESIZE = ResizeRule()


class LPIPSDistance(nn.Module):
    r"""LPIPS of images in [-1, 1], as the lpips package computes it (CM and CTM use piq's, with other poolings).

    The network is frozen, stays in eval mode, and computes in float32 whatever autocast, ``.half()`` or the images'
    dtype say (in float64 after ``.double()``). Where features vanish, gradients are finite, which lpips' own are not.

    The range is checked where distances are *measured*: images outside [-1, 1] raise an error, or give NaN where
    looking would stall the device (off the CPU) or break a graph (torch.compile). Images in [0, 1] look valid: map
    them to [-1, 1] first. Where a gradient is wanted (``requires_grad`` of either argument) only images
    beyond ±100, such as those in 0..255, are refused: a student in training overshoots, as does its target, and an
    error, or NaN, would end the run. Nothing is clamped, as in the published codes: it would stop the gradient that
    brings the student back.

    Args:
        net: ``"vgg"`` (CM's and CTM's), ``"alex"`` or ``"squeeze"``.
        backbone: The network's weights: torchvision's state dict of vgg16, alexnet or squeezenet1_1, or the path of a
            ``.pth`` or ``.safetensors`` file of it. Default: torchvision's ImageNet weights, downloaded once.
        linear: The weights $w_k$: lpips' state dict (``lin0.model.1.weight``, ...), or the path of a file of it.
            Default: those inside the lpips package.
        resize: Which images to enlarge first; None for none.
        chunk: Number of samples to process at a time. Memory then does not grow with the batch, for gradients
            either, which cost a second evaluation of the network.
        check_range: Whether to check the range; False for measuring unclamped outputs, such as a validation loss.

    Raises:
        ImportError: If lpips or torchvision is missing or broken.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range, or weights do not fit ``net``.
        FileNotFoundError: If there is no file at a path.
        RuntimeError: If weights could not be downloaded.

    Examples:
        >>> distance = LPIPSDistance("alex", backbone="alexnet-owt-7be5be79.pth")  # doctest: +SKIP
        >>> images = torch.zeros(2, 3, 32, 32)  # doctest: +SKIP
        >>> distance(images, images)  # doctest: +SKIP
        tensor([0., 0.])
    """

    network: Any

    def __init__(
        self,
        net: str = "vgg",
        *,
        backbone: Weights | None = None,
        linear: Weights | None = None,
        resize: ResizeRule | None = CM_RESIZE,
        chunk: int | None = None,
        check_range: bool = True,
    ) -> None:
        super().__init__()
        check_choice(net, BACKBONES, "net")
        if chunk is not None:
            check_count(chunk, 1, "chunk")
        if resize is not None and not isinstance(resize, ResizeRule):
            raise TypeError(f"resize must be a ResizeRule or None, got {resize!r}: for example ResizeRule(256, 224).")
        self.net, self.resize, self.chunk, self.check_range = net, resize, chunk, check_range
        self.network = frozen_lpips(net, backbone, linear).to(torch.get_default_device(), torch.float32)
        self.eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances of images in [-1, 1], ``(B, 3, height, width)``, from their fellows, in float32.

        Returns:
            One distance per sample, in the network's dtype. Shape ``(B,)``.

        Raises:
            TypeError: If an argument is not a floating-point tensor.
            ValueError: If shapes do not fit, or images are (on the CPU) outside [-1, 1].
        """
        self._check_shapes(x, y)
        dtype = next(self.network.parameters()).dtype
        limit = _FAR if x.requires_grad or y.requires_grad else _LIMIT
        valid = self._in_range(x, y, limit) if self.check_range else None
        with without_autocast(x.device):
            x, y = x.to(dtype), y.to(dtype)
            if self.chunk is None:
                distances = self._distance(x, y)
            else:
                pieces = zip(x.split(self.chunk), y.split(self.chunk), strict=True)
                nothing_random: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
                distances = torch.cat([checkpoint(self._distance, *piece, **nothing_random) for piece in pieces])
        return distances if valid is None else torch.where(valid, distances, torch.nan)

    def train(self, mode: bool = True) -> LPIPSDistance:
        """Stay in eval mode, whatever a surrounding module is told."""
        return super().train(False)

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        stages = zip(self.network.lins, self._features(x), self._features(y), strict=True)
        return torch.stack([weigh((f_x - f_y).square()).mean((1, 2, 3)) for weigh, f_x, f_y in stages]).sum(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Return every stage's features at length 1; unlike lpips' root, torch's norm has a gradient at 0."""
        images = images if self.resize is None else self.resize(images)
        stages = self.network.net(self.network.scaling_layer(images))
        return [functional.normalize(stage, dim=1, eps=_EPSILON) for stage in stages]

    def _check_shapes(self, x: Tensor, y: Tensor) -> None:
        check_tensor(x, "x")
        check_tensor(y, "y")
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                f"x and y must be images of one shape (B, 3, height, width), got {tuple(x.shape)} and "
                f"{tuple(y.shape)}: repeat grey images with x.expand(-1, 3, -1, -1), decode latents."
            )
        side, smallest = min(x.shape[-2:]), BACKBONES[self.net][1]
        side = self.resize.to if self.resize is not None and side < self.resize.below else side
        if side < smallest:
            raise ValueError(
                f"images must have sides of at least {smallest} pixels for net={self.net!r}, got {side}: pass "
                f"resize=ResizeRule(below=256, to=224)."
            )

    def _in_range(self, x: Tensor, y: Tensor, limit: float) -> Tensor | None:
        """Raise for images outside [-1, 1]; where values cannot be read, return which samples are inside."""
        inside = ((x.abs() <= limit) & (y.abs() <= limit)).flatten(1).all(1)
        all_inside = all_true(inside)
        if all_inside is None:
            return inside
        if not all_inside:
            index = int((~inside).nonzero()[0])
            x_range, y_range = (f"{v[index].min().item():.4g} to {v[index].max().item():.4g}" for v in (x, y))
            raise ValueError(
                f"images must lie in [-1, 1], got x from {x_range} and y from {y_range} in sample {index}: scale them "
                f"(0..255 by x / 127.5 - 1, 0..1 by 2 * x - 1), clamp a network's outputs (x.clamp(-1, 1)), or pass "
                f"check_range=False to measure them as they are."
            )
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LPIPSDistance:
        """Move the network as ``fn`` says, but never into half precision, where squares of features underflow."""

        def keep_precision(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved if moved.dtype in (torch.float32, torch.float64) else value.to(moved.device)

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self
