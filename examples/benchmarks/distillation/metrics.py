r"""What is measured, stated before any student was trained.

On samples in 1, 2 and 5 steps from the same noise, with the student's moving average:

- ``ode``: squared distance (mean over elements) to the end of the teacher's own ODE from the same noise, solved as in
  training (Heun's method on the training grid),
- ``pixels``: Frechet distance $\lVert m_1 - m_2 \rVert^2 + \operatorname{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})$ of the
  first 64 principal components of the data, to the data and to the teacher's samples from other noise,
- ``features``: the same of the means over the image of three layers of a random convolutional network (random cosines
  in the plane), each divided by its standard deviation on the data,
- ``precision``, ``recall`` (Kynkäänniemi et al. 2019, k = 3) in principal components, to the data, and ``nearest``, the
  RMS distance to the nearest sample of the data: lower than that of the teacher's samples would be memorisation.

Further ``midpoint``: squared error of the first of two jumps relative to the teacher's point at that level; ``levels``:
the same for jumps from the top to every level. Consistency gaps before training are in ``diagnosis.py``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from configurations import Configuration
from teachers import Reference
from torch import Tensor, nn

import analytic_precond as ap

Sample = Callable[[Tensor, list[int]], Tensor]
STEPS = (1, 2, 5)


class RandomFeatures(nn.Module):
    """Random features of images or points, with weights that never change."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.is_image = len(shape) == 3
        if self.is_image:
            sizes = [(32, shape[0], 3, 3), (32, 32, 3, 3), (32, 32, 3, 3)]
            weights = [torch.randn(s, generator=generator) * (2 / (s[1] * 9)) ** 0.5 for s in sizes]
        else:
            weights = [4 * torch.randn(*shape, 32, generator=generator), 6.28 * torch.rand(32, generator=generator)]
        for i, weight in enumerate(weights):
            self.register_buffer(f"weight{i}", weight)

    def layers(self, images: Tensor) -> list[Tensor]:
        """Return the activations of the three layers."""
        h, activations = images, []
        for weight in (self.weight0, self.weight1, self.weight2):
            h = F.relu(F.conv2d(h, weight, padding=1))
            activations.append(h)
            h = F.avg_pool2d(h, 2)
        return activations

    def forward(self, x: Tensor) -> Tensor:
        """Return features. Shape ``(B, 96)``, or ``(B, 32)`` of points."""
        if not self.is_image:
            return (x @ self.weight0 + self.weight1).cos()
        return torch.cat([h.mean((2, 3)) for h in self.layers(x)], 1)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return squared distances of pixels and of all activations, for training. Shape ``(B,)``."""
        pairs = [(x, y), *zip(self.layers(x), self.layers(y), strict=True)]
        return sum((a - b).square().flatten(1).mean(1) for a, b in pairs)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance in float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet_distance(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> float:
    """Return the squared Frechet distance of two normal laws, given as mean and covariance."""
    values, vectors = torch.linalg.eigh(x[1])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ y[1] @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return ((x[0] - y[0]).square().sum() + x[1].trace() + y[1].trace() - 2 * cross).item()


def coverage(x: Tensor, y: Tensor, k: int = 3) -> float:
    """Return the share of x that lies within the k-nearest-neighbour balls of y."""
    radius = torch.cdist(y, y).kthvalue(k + 1, dim=1).values
    return (torch.cdist(x, y) <= radius).any(1).float().mean().item()


class Evaluation:
    """Compares a student with its teacher and with the data."""

    def __init__(self, config: Configuration, data: Tensor, reference: Reference) -> None:
        self.reference, self.batch = reference, min(512, config.num_samples)
        self.levels = ap.karras_noise_levels(config.num_levels)
        last = config.num_levels - 1
        self.paths = {n: [round(last * i / n) for i in range(n + 1)] for n in STEPS}

        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(3)).to(data.device)
        self.data, self.some = data.flatten(1), data[chosen[: config.num_samples]]
        flat = data[chosen[:8192]].flatten(1)
        self.mean = flat.mean(0)
        self.components = torch.linalg.eigh((flat - self.mean).T.cov())[1][:, -64:]
        self.random = RandomFeatures(data.shape[1:]).to(data.device)
        scale = torch.cat([self.random(x) for x in data[chosen[:8192]].split(512)]).std(0)
        self.scale = torch.where(scale > 1e-3 * scale.max(), scale, torch.inf)  # features that do not vary tell nothing
        self.spaces = {"pixels": self.project, "features": lambda x: self.random(x) / self.scale}
        sides = {"data": data[chosen[:8192]], "teacher": reference.samples}
        self.sides = {
            (space, side): moments(extract(samples))
            for space, extract in self.spaces.items()
            for side, samples in sides.items()
        }

    def project(self, x: Tensor) -> Tensor:
        """Return principal components."""
        return (x.flatten(1) - self.mean) @ self.components

    def frechet(self, x: Tensor) -> dict[str, float]:
        """Return Frechet distances in both spaces to data and teacher."""
        own = {space: moments(extract(x)) for space, extract in self.spaces.items()}
        return {f"{space}-{side}": frechet_distance(own[space], m) for (space, side), m in self.sides.items()}

    def checks(self, x: Tensor) -> dict[str, float]:
        """Return precision, recall, and the RMS distance to the nearest sample of the data."""
        own, data = self.project(x), self.project(self.some)
        nearest = torch.cat([torch.cdist(part, self.data).amin(1) for part in x.flatten(1).split(256)])
        rms = nearest.square().mean().sqrt().item() / self.data.shape[1] ** 0.5
        return {"precision": coverage(own, data), "recall": coverage(data, own), "nearest": rms}

    def __call__(self, sample: Sample, follows_ode: bool, detailed: bool) -> dict[str, float | list[float]]:
        """Measure a student.

        Args:
            sample: Draws samples from noise, jumping to the given levels of the grid.
            follows_ode: Whether it stays on its own trajectory, or adds new noise on the way.
            detailed: Also measure what only tells something at the end.
        """
        reference, result = self.reference, {}
        for n, path in self.paths.items():
            x = torch.cat([sample(start, path) for start in reference.start.split(self.batch)])
            if n == 1 or follows_ode:
                result[f"ode/{n}"] = (x - reference.ends).square().mean().item()
            result |= {f"{name}/{n}": value for name, value in self.frechet(x).items()}
            if detailed:
                result |= {f"{name}/{n}": value for name, value in self.checks(x).items()}
        if follows_ode:
            few = reference.start[: reference.trajectory.shape[1]]
            points = list(enumerate(reference.trajectory))[1:]
            errors = [(sample(few, [0, i]) - point).square().mean() / point.square().mean() for i, point in points]
            result["levels"] = [error.item() for error in errors]
            result["midpoint"] = result["levels"][self.paths[2][1] - 1]
        return result
