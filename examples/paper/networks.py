"""EDM's pickles as teachers, and the students that start as their copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

import analytic_precond as ap

WARNING = "WARNING: {} is a pickle, and loading it runs the code in it. Go on only with files that you trust."


def load_teacher(path: Path, experiment: ap.PaperExperiment) -> nn.Module:
    """Return the network of EDM's pickle, in eval mode, or say what is wrong with it, before any data are read."""
    try:
        with path.open("rb") as file:
            net = pickle.load(file)["ema"]
    except ModuleNotFoundError as error:
        raise SystemExit(f"--teacher: {error}: EDM's files need its code, NVlabs/edm on PYTHONPATH") from error
    except OSError as error:
        raise SystemExit(f"--teacher: expected a network of NVlabs/edm, got {path}: {error}") from error
    except Exception as error:  # what a damaged pickle raises is anything
        raise SystemExit(
            f"--teacher: expected NVlabs/edm's pickle with a network 'ema', got {path}, which is another or damaged: "
            f"{type(error).__name__}: {error}"
        ) from error
    missing = [name for name in ("model", "sigma_data", "img_resolution", "label_dim") if not hasattr(net, name)]
    if missing:
        raise SystemExit(
            f"--teacher: expected an EDMPrecond, got {type(net).__name__} without {', '.join(missing)}: EDM's baseline "
            f"networks have other scalings; take edm-*.pkl"
        )
    if net.img_resolution != experiment.resolution:
        raise SystemExit(
            f"--teacher: {experiment.name} has images of {experiment.resolution} pixels, got a network for "
            f"{net.img_resolution}: take the one of {experiment.dataset}"
        )
    if bool(net.label_dim) != experiment.class_conditional:
        wanted, got = (("a class-conditional", "an unconditional"), ("an unconditional", "a class-conditional"))[
            not experiment.class_conditional
        ]
        raise SystemExit(
            f"--teacher: {experiment.name} needs {wanted} network, got {got} one ({net.label_dim} classes)"
        )
    net.use_fp16 = False  # the precision is autocast's to say, which the statistics are estimated without
    return net.eval().requires_grad_(False).float()


class TargetTime(nn.Module):
    """A raw EDM network that is also told where to jump to, through its slot for augmentation labels.

    Args:
        network: The teacher's, which is copied.
        seed: Of the embedding, which must be the same in all processes.
    """

    def __init__(self, network: nn.Module, seed: int) -> None:
        super().__init__()
        self.network, channels = copy.deepcopy(network), network.map_layer0.in_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels)
        self.network.map_augment = nn.Sequential(copy.deepcopy(network.map_noise), *layers)
        ap.initialize_from_teacher(self.network, network, zero=["map_augment.3"])  # the student starts as its teacher

    def forward(self, x: Tensor, c_noise: Tensor, c_target: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return the raw output F."""
        return self.network(x, c_noise, class_labels, augment_labels=c_target)


def make_student(
    net: nn.Module, precond: ap.Preconditioning, experiment: ap.PaperExperiment, seed: int
) -> ap.ConsistencyTrajectoryModel:
    """Return the student that starts as the network: ``D_student(x, t, s) = D(x, t)`` for all s."""
    network = TargetTime(net.model, seed)
    for module in network.modules():
        if isinstance(getattr(module, "dropout", None), float | int):  # a number in EDM's blocks
            module.dropout = experiment.dropout
    return ap.ConsistencyTrajectoryModel(network.requires_grad_(True), precond, float(net.sigma_data))


def last_layer(student: ap.ConsistencyTrajectoryModel) -> nn.Parameter:
    """Return the weight of the last convolution, where CTM balances its losses."""
    return [p for p in student.network.parameters() if p.ndim == 4][-1]
