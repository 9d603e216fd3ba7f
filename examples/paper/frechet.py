"""Frechet distances of Inception's features, measured by all processes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from processes import Processes
from torch import Tensor, nn

NEEDS = (
    "--inception needs torch-fidelity, got {}: install torchvision from the same place as your PyTorch, then "
    "pip install 'analytic-precond[fid]'"
)


def load_inception(weights: Path, device: torch.device) -> nn.Module:
    """Return torch-fidelity's Inception-v3, a port of the network that FIDs are defined by, from a file."""
    if not weights.is_file():
        raise SystemExit(
            f"--inception: expected weights-inception-2015-12-05-6726825d.pth of torch-fidelity, no file {weights}"
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise SystemExit(NEEDS.format(error)) from error
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        )
    except Exception as error:  # of torch and of the package, which checks nothing
        raise SystemExit(
            f"--inception: {weights} is no file of torch-fidelity's weights: {str(error)[:200]}"
        ) from error
    return network.to(device).eval()


class Features:
    """The mean and the covariance of features.

    Args:
        network: From images, uint8 of shape ``(B, 3, H, W)``, to a tuple with features of shape ``(B, F)``.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.count = network, 0
        self.total: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Look at a batch."""
        (features,) = self.network(images)
        features = features.double()
        self.count += len(images)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features

    def result(self, processes: Processes, size: int = 2048) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the covariance over all processes."""
        device = processes.device
        if self.count == 0:  # a process without images
            self.total = torch.zeros(size, dtype=torch.float64, device=device)
            self.products = torch.zeros(size, size, dtype=torch.float64, device=device)
        count = processes.sum_(torch.tensor(float(self.count), dtype=torch.float64, device=device)).item()
        mean = processes.sum_(self.total) / count
        covariance = (processes.sum_(self.products) - count * torch.outer(mean, mean)) / (count - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, mean_ref: np.ndarray, covariance_ref: np.ndarray
) -> float:
    r"""Return $|\mu - \mu'|^2 + tr(C + C' - 2 (C C')^{1/2})$."""
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    overlap = np.sqrt(
        np.linalg.eigvalsh(root @ covariance_ref @ root).clip(min=0)
    ).sum()  # of C C', which has no symmetry
    return float(np.square(mean - mean_ref).sum() + np.trace(covariance) + np.trace(covariance_ref) - 2 * overlap)


@torch.no_grad()
def load_reference(path: Path, network: nn.Module, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the covariance of EDM's reference file, made by its ``fid.py ref``, of the network's size."""
    (features,) = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device))
    size = features.shape[1]
    try:
        with np.load(path) as file:
            mean, covariance = file["mu"], file["sigma"]
        if mean.shape != (size,) or covariance.shape != (size, size):
            raise ValueError(f"shapes {mean.shape} and {covariance.shape} for {size} features")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("values that are not finite")
        return mean, covariance
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise SystemExit(
            f"--reference: expected an npz file with mu and sigma, as EDM's fid.py ref writes, got {path}: {error}"
        ) from error
