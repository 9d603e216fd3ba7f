r"""The lpips package's network with weights from files, from the package itself, or downloaded."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

Weights = Mapping[str, Tensor] | str | os.PathLike[str]
BACKBONES = {  # net: torchvision's name for its weights, and the smallest side that passes through
    "vgg": ("VGG16_Weights.IMAGENET1K_V1", 16),
    "alex": ("AlexNet_Weights.IMAGENET1K_V1", 31),
    "squeeze": ("SqueezeNet1_1_Weights.IMAGENET1K_V1", 17),
}


def frozen_lpips(net: str, backbone: Weights | None, linear: Weights | None) -> Any:
    """Return lpips' module with the weights, frozen."""
    try:
        import lpips
        from torchvision.models import get_weight
    except ImportError as error:
        raise ImportError(
            f"LPIPSDistance needs lpips and torchvision, got {error}: install torchvision from the same place as your "
            f"PyTorch (pytorch.org says how), then pip install 'analytic-precond[lpips]'; without the first step pip "
            f"may replace a CPU build of PyTorch."
        ) from error
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        raise ImportError(
            f"LPIPSDistance needs a torchvision built for the installed torch {torch.__version__}, got {error}: "
            f"install the two together, from the same package index, as pytorch.org says for your machine."
        ) from error
    # without storage: the weights that lpips would draw from the global generator are replaced anyway
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of lpips' way to call torchvision
        network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)

    trunk = _download(get_weight(BACKBONES[net][0])) if backbone is None else _read(backbone, "backbone")
    shipped = Path(lpips.__file__).with_name("weights") / "v0.1" / f"{net}.pth"
    weights = _read(shipped if linear is None else linear, "linear")
    # lpips keeps torchvision's features.3.weight under a slice of its own: slice2.3.weight
    names = {key: "features." + key.split(".", 1)[1] for key in network.net.state_dict()}
    _load(network.net, names, trunk, f"backbone must be a state dict of torchvision's network for net={net!r}")
    for number, layer in enumerate(network.lins):
        names = {key: f"lin{number}.{key}" for key in layer.state_dict()}
        _load(layer, names, weights, f"linear must be lpips' state dict for net={net!r}")
    return network.requires_grad_(False)


def _load(module: nn.Module, names: Mapping[str, str], weights: Mapping[str, Tensor], expected: str) -> None:
    """Give a module copies of the weights that ``names`` tells for its own."""
    for key, parameter in module.state_dict().items():
        found = weights.get(names[key])
        if not isinstance(found, Tensor) or found.shape != parameter.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else f"none among {list(weights)[:3]}, ..."
            raise ValueError(f"{expected}, with {names[key]!r} of shape {tuple(parameter.shape)}, got {got}.")
    copies = {key: weights[name].detach().to("cpu", torch.float32, copy=True) for key, name in names.items()}
    module.load_state_dict(copies, assign=True)


def _read(weights: Weights, name: str) -> Mapping[str, Tensor]:
    """Return a state dict, from its file if need be; pickled code is never run."""
    if isinstance(weights, Mapping):
        return weights
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(f"{name} must be a state dict or a path, got {type(weights).__name__}: pass .state_dict().")
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"{name} must be a .pth or .safetensors file, got no file at {path}: check the path.")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        found = error
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{name} must be a file of a state dict, written by torch.save(network.state_dict(), path) or safetensors, "
            f"got {path} with {found!r:.200}."
        )
    return found


def _download(weights: Any) -> Mapping[str, Tensor]:
    """Return torchvision's pretrained weights, from its cache or the network."""
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
        return state
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"expected to download {weights.url}, got {error}: fetch that file elsewhere and pass its path as "
            f"backbone=."
        ) from error
