r"""The modules behind a callable, and the dtype that a network is called in.

A teacher or a network may be a module, a method of one, or a function made of either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

_COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not dtypes of one byte, which only store


class Wrapper(nn.Module):
    """A module around callables; those that are no modules are plain attributes, which `modules_of` looks behind."""

    named_after: str | None = None  # the attribute whose name a user knows it by


def modules_of(denoiser: object) -> list[nn.Module]:
    """Return the modules of a callable, itself or what it is a method of first; none of a plain function.

    Looked behind are bound methods, `functools.partial`, what `functools.wraps` names, and what a `Wrapper` holds.
    """
    found: dict[nn.Module, None] = {}
    left = [denoiser]
    while left:
        part = left.pop()
        if isinstance(part, nn.Module):
            for module in part.modules():
                if module not in found:
                    found[module] = None
                    if isinstance(module, Wrapper):
                        left += [value for value in vars(module).values() if callable(value)]
        elif isinstance(part, MethodType):
            left.append(part.__self__)
        elif isinstance(part, partial):
            left.append(part.func)
        elif hasattr(part, "__wrapped__"):
            left.append(part.__wrapped__)
    return list(found)


def layers_of(network: object) -> Iterator[object]:
    """Yield a network and, from outside to inside, what is in it if it is a parallel, averaged or compiled one."""
    seen: list[object] = []
    while not any(network is other for other in seen):
        yield network
        seen.append(network)
        if isinstance(network, partial):
            network = network.func
        elif isinstance(network, nn.Module):
            inner = getattr(network, "module", None)
            inner = inner if isinstance(inner, nn.Module) and names_no_argument(network.forward) else network
            network = getattr(network, "_orig_mod", inner)


def names_no_argument(function: Callable[..., Any]) -> bool:
    """Whether a function takes anything, as wrappers do; a network's, which may have a part called module, does not."""
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    return kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def attribute(network: object, name: str, default: Any = None) -> Any:
    """Return an attribute of a network, of the one inside where a wrapper hides it: see `layers_of`."""
    for layer in layers_of(network):
        if hasattr(layer, name):
            return getattr(layer, name)
    return default


def tensors_of(denoiser: object) -> list[Tensor]:
    """Return the parameters and then the buffers of all modules of a callable, each once."""
    modules = modules_of(denoiser)
    parameters = (tensor for module in modules for tensor in module.parameters(recurse=False))
    buffers = (tensor for module in modules for tensor in module.buffers(recurse=False))
    return list(dict.fromkeys([*parameters, *buffers]))


class NetworkDtype:
    """The dtype that a network is called in; autocast does its own casts.

    That is what the network says itself (``dtype``, as diffusers' models do), or else what most elements of its
    parameters have. Found once, as going through all parameters takes time, and again when they are cast.
    """

    def __init__(self, network: object) -> None:
        self.network = network
        self._look()

    def __call__(self, default: torch.dtype) -> torch.dtype:
        """Return the dtype; ``default`` for a network that has none."""
        if [_dtype_at(*place) for place in self._places] != self._seen:
            self._look()
        return default if self._dtype is None else self._dtype

    def _look(self) -> None:
        modules = modules_of(self.network)
        places = [
            (module, name)
            for module in modules
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.is_floating_point()
        ]
        sizes: dict[torch.dtype, int] = {}
        largest: dict[torch.dtype, tuple[int, tuple[nn.Module, str]]] = {}
        for module, name in places:
            parameter = getattr(module, name)
            if parameter.dtype in _COMPUTED_IN:
                size = 1 if isinstance(parameter, UninitializedParameter) else parameter.numel()
                sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + size
                if parameter.dtype not in largest or size > largest[parameter.dtype][0]:
                    largest[parameter.dtype] = size, (module, name)
        most = max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None
        ends = [_dtype_at(*places[i]) for i in (0, -1)] if places else [None]
        said = attribute(modules[0], "dtype") if modules else None
        said = said if said in _COMPUTED_IN else None

        self._dtype = said or most
        by_property = modules and any(hasattr(type(layer), "dtype") for layer in layers_of(modules[0]))
        if ends[0] == ends[-1] != most and ends[0] in _COMPUTED_IN and not by_property:
            # guided-diffusion's networks, whose `dtype` is a setting, cast x inside, and back before their last layer
            self._dtype = ends[0]
        # what each call looks at: the ends, and the largest parameter of the dtype that most have
        self._places = [*places[:1], *places[-1:], *([] if most is None else [largest[most][1]])]
        self._seen = [_dtype_at(*place) for place in self._places]


class NetworkWrapper(Wrapper):
    """A module around a network, which is any callable."""

    def __init__(self, network: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self._found = NetworkDtype(network)

    def __call__(self, *arguments: Any, **condition: Any) -> Any:
        """Call it as any module; if the network is on another device than the data, say so."""
        if torch.compiler.is_compiling():
            return super().__call__(*arguments, **condition)
        try:
            return super().__call__(*arguments, **condition)
        except RuntimeError as error:
            x = arguments[0] if arguments else None
            devices = {tensor.device for tensor in tensors_of(self.network)}
            if not isinstance(x, Tensor) or not devices or x.device in devices:
                raise
            where = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"x must be on {where}, as the network of {type(self).__name__} is, got {x.device}: move the "
                f"{type(self).__name__} by .to('{x.device}')."
            ) from error

    def _network_dtype(self, default: torch.dtype) -> torch.dtype:
        """Return what the network is called in, ``default`` if nothing else is known."""
        if self._found.network is not self.network:  # another since, e.g. compiled
            self._found = NetworkDtype(self.network)
        return self._found(default)


def network_dtype(network: object, default: torch.dtype) -> torch.dtype:
    """Return the dtype that a network is called in, ``default`` for one without: see `NetworkDtype`."""
    return NetworkDtype(network)(default)


def _dtype_at(module: nn.Module, name: str) -> torch.dtype | None:
    """Return the dtype of a parameter as it is now; None of one that is gone."""
    parameter = getattr(module, name, None)
    return None if parameter is None else parameter.dtype
