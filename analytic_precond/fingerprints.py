"""Fingerprints of data and teachers: what tells a request that is taken up again from another one."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_VALUES = 4096


def digest(*tensors: Tensor) -> str:
    """Return a fingerprint of some thousand values of each tensor, spread over all of it."""
    result = hashlib.sha256()
    for x in tensors:
        values = x.detach().flatten()[:: max(1, x.numel() // _VALUES)]
        result.update(str((tuple(x.shape), x.dtype)).encode() + values.to("cpu", torch.float64).numpy().tobytes())
    return result.hexdigest()[:16]


def weights_of(denoiser: object) -> str:
    """Return a fingerprint of a module's parameters and buffers; nothing of other teachers."""
    if not isinstance(denoiser, nn.Module):
        return ""
    return digest(*denoiser.parameters(), *denoiser.buffers())
