r"""Networks of other codebases as denoisers.

Whatever a network F predicts, the denoiser is linear in it: $D(x, t) = c_{skip} x + c_{out} F(c_{in} x, c_{noise})$
with four functions of the noise level, which follow from what it predicts under which schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_answer, check_callable, check_tensor
from .._conditions import expanded, on_device, plain
from .._modules import NetworkWrapper, attribute, modules_of
from .._precision import outlives, wide_dtype
from ..noise_levels.per_sample import expand_to, one_per_sample
from ..noise_levels.schedules import EDMSchedule, Schedule
from .denoiser import Denoiser
from .predictions import PredictionScalings

NetworkScalings = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


class NetworkDenoiser(NetworkWrapper):
    r"""The denoiser $D(x, t) = c_{skip} x + c_{out} F(c_{in} x, c_{noise})$ around a raw network F.

    The coefficients are computed in float64 and applied in float32 or wider. The network is called in its own dtype,
    under whatever autocast is active, and told ``c_noise`` in float32 or wider; the result is in ``x``'s dtype.

    Args:
        network: Called as ``network(c_in x, c_noise, **condition)`` with ``c_noise`` of shape ``(B,)``. If it is an
            `nn.Module`, its parameters are the denoiser's.
        scalings: From noise levels of shape ``(B,)`` to ``(c_skip, c_out, c_in, c_noise)``, for example an
            `EDMPreconditioning`.
        condition: Conditions of one sample, for all, e.g. a null label (see `common`); those of a call come on top.
        dtype: What the network is called in. Default: its own ``dtype`` if it says one, as diffusers' models do, else
            that of most elements of its parameters; ``x``'s if it has none (a dtype of one byte only stores).
        learned_variance: Drop the second half of twice as many channels as ``x`` has.
        time_dtype: What the network is told ``c_noise`` in. Default: float32, float64 for a network called in that.

    Raises:
        TypeError: If ``network`` is not callable.

    Examples:
        >>> from analytic_precond import EDMPreconditioning
        >>> denoiser = NetworkDenoiser(lambda x, c_noise: 0 * x, EDMPreconditioning(sigma_data=0.5))
        >>> denoiser(torch.tensor([[2.0]]), torch.tensor([0.5]))
        tensor([[1.]])
    """

    named_after = "network"

    def __init__(
        self,
        network: Callable[..., Any],
        scalings: NetworkScalings,
        condition: dict[str, Any] | None = None,
        *,
        dtype: torch.dtype | None = None,
        learned_variance: bool = False,
        time_dtype: torch.dtype | None = None,
    ) -> None:
        check_callable(network, "network", "network(x, time)")
        super().__init__(network)
        self.scalings = scalings
        self.condition = dict(condition or {})
        self.dtype = dtype
        self.learned_variance = learned_variance
        self.time_dtype = time_dtype

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """The lowest and the highest noise level that the network knows from its schedule's table, or None.

        Beyond, it is told the nearest one, and its answers are wrong.
        """
        return self.scalings.schedule.noise_range if isinstance(self.scalings, PredictionScalings) else None

    def forward(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """Return the estimate of the clean data. Shapes: ``x`` (B, ...), ``t`` (B,).

        Raises:
            TypeError: If the network does not take the conditions, or returns no floating-point tensor.
            ValueError: If shapes do not fit.
        """
        check_tensor(x, "x")
        c_skip, c_out, c_in, c_noise = self.scalings(one_per_sample(t, x).to(wide_dtype(x.device)))
        float_dtype = torch.promote_types(x.dtype, torch.float32)
        z = (expand_to(c_in, x).to(float_dtype) * x).to(self._network_dtype(x.dtype))

        own = on_device(self.condition, z.device)
        if own is not self.condition and outlives(z):
            self.condition = own  # stays there: one copy for all calls
        # len(x) would fix it in an export
        told = {**expanded(own, x.shape[0]), **on_device(plain(condition), z.device)}
        output = self._call_network(z, c_noise, told)
        float_dtype = torch.promote_types(float_dtype, output.dtype)
        c_skip, c_out = (expand_to(c, x).to(float_dtype) for c in (c_skip, c_out))
        return (c_skip * x + c_out * output).to(x.dtype)

    def _call_network(self, z: Tensor, c_noise: Tensor, condition: dict[str, Any]) -> Tensor:
        """Call the network; its output has z's shape or an error says why not."""
        if c_noise.is_floating_point():  # times and embeddings lose their meaning in half precision
            c_noise = c_noise.to(self.time_dtype or torch.promote_types(z.dtype, torch.float32))
        try:
            output: Tensor = self.network(z, c_noise, **condition)
        except TypeError as error:
            if any(phrase in str(error) for phrase in _CALL_ERRORS):
                given = "".join(f", {name}=..." for name in condition)
                raise TypeError(
                    f"expected a network callable as network(x, time{given}), got one that refuses: {error}. Pass the "
                    f"conditions that it takes, when building or calling the denoiser, and none to an unconditional "
                    f"teacher."
                ) from error
            raise
        may_be_twice = self.learned_variance and isinstance(output, Tensor) and output.ndim == z.ndim > 1
        if may_be_twice and output.shape[1] == 2 * z.shape[1]:
            output = output[:, : z.shape[1]]
        check_answer(output, z, "network")
        return output

    def _network_dtype(self, default: torch.dtype) -> torch.dtype:
        return super()._network_dtype(default) if self.dtype is None else self.dtype


def noise_range_of(denoiser: Denoiser) -> tuple[float, float] | None:
    """Return the noise levels that all networks of a denoiser know, as far as these are known."""
    adapted = (module for module in modules_of(denoiser) if isinstance(module, NetworkDenoiser))
    known = [adapter.noise_range for adapter in adapted if adapter.noise_range is not None]
    return (max(low for low, _ in known), min(high for _, high in known)) if known else None


_CALL_ERRORS = ("unexpected keyword argument", "required positional argument", "required keyword-only argument")


def denoiser_from_network(
    network: Callable[..., Any],
    prediction: str,
    schedule: Schedule,
    *,
    dtype: torch.dtype | None = None,
    learned_variance: bool = False,
    time_dtype: torch.dtype | None = None,
    **condition: Any,
) -> NetworkDenoiser:
    r"""Return the denoiser of a network that predicts something else, under any noise schedule.

    The network gets $x' = \alpha x = \alpha x_0 + \sigma n$ and the schedule's time $\tau$ (`Schedule.network_time`).
    It predicts

    - ``"epsilon"``: the noise $n$, so $D = x - t F$ with the noise level $t = \sigma / \alpha$,
    - ``"sample"``: the clean data, $D = F$,
    - ``"v"``: $\alpha n - \sigma x_0$, so $D = (\alpha^2 x - \sigma F) / (\alpha^2 + \sigma^2)$,
    - ``"score"``: $\nabla_{x'} \ln q = -n / \sigma$, so $D = x + (\sigma^2 / \alpha) F$,
    - ``"velocity"``: $dx'/d\tau = \dot\alpha x_0 + \dot\sigma n$ of a flow or of TrigFlow, so
      $D = (\alpha \dot\sigma x - \sigma F) / (\alpha \dot\sigma - \sigma \dot\alpha)$.

    Args:
        network: Called as ``network(x', time, **condition)``; put it in eval mode.
        prediction: One of the five.
        schedule: The noise schedule that the network was trained under.
        dtype: What the network is called in. Default: its own, as for `NetworkDenoiser`.
        learned_variance: Drop the second half of twice as many channels (guided-diffusion's learned sigma).
        time_dtype: What the network is told its time in. Default: float32, float64 for a network called in that. Near
            the end of a schedule float32 has few digits of the noise level left: TrigFlow's angle makes 80.0007 of
            80. ``torch.float64`` keeps all, for networks that take it (FastGen's and rCM's codes count in it).
        **condition: Conditions of one sample, for all, e.g. a null label (see `common`); those of a call come on top.

    Raises:
        TypeError: If ``network`` is not callable or ``schedule`` is not a `Schedule`.
        ValueError: If ``prediction`` is unknown.

    Examples:
        >>> from analytic_precond import RectifiedFlowSchedule
        >>> flow = lambda x, time: x  # a velocity
        >>> denoiser = denoiser_from_network(flow, "velocity", RectifiedFlowSchedule())
        >>> denoiser(torch.tensor([[8.0]]), torch.tensor([3.0]))  # time 3/4, x' = 8/4, D = x' - 3/4 x'
        tensor([[0.5000]])
    """
    scalings = PredictionScalings(prediction, schedule)
    return NetworkDenoiser(
        network, scalings, condition, dtype=dtype, learned_variance=learned_variance, time_dtype=time_dtype
    )


def denoiser_from_edm(
    network: Callable[..., Any], dtype: torch.dtype | None = None, **condition: Any
) -> NetworkDenoiser:
    """Return the denoiser of an EDM-style network, which is one already: ``network(x, sigma, class_labels=...)``.

    Such networks hold their own preconditioning and cast down inside; they are called in float32 or wider, also under
    autocast, their output comes back in ``x``'s dtype, and labels for an unconditional one (``label_dim`` 0) are an
    error.

    Args:
        network: The network, in eval mode.
        dtype: What the network is called in. Default: its own, float32 at least.
        **condition: Conditions of one sample, for all, e.g. ``class_labels`` (see `common`); those of a call come on
            top.

    Raises:
        TypeError: If ``network`` is not callable.

    Examples:
        >>> denoiser = denoiser_from_edm(lambda x, sigma, class_labels=None: x / (1 + sigma.reshape(-1, 1) ** 2))
        >>> denoiser(torch.tensor([[5.0]]), torch.tensor([2.0]))
        tensor([[1.]])
    """
    return _EDMDenoiser(network, PredictionScalings("sample", EDMSchedule()), condition, dtype=dtype)


class _EDMDenoiser(NetworkDenoiser):
    """A network that keeps its skip connection inside, so that its input must not be rounded."""

    @cached_property  # k-diffusion's are tensors: on a GPU, to be waited for once
    def noise_range(self) -> tuple[float, float] | None:
        """What the network says, as EDM's and k-diffusion's do, by ``sigma_min`` and ``sigma_max``; None of all."""
        ends = float(attribute(self.network, "sigma_min", 0)), float(attribute(self.network, "sigma_max", math.inf))
        return None if ends == (0, math.inf) else ends

    def _call_network(self, z: Tensor, c_noise: Tensor, condition: dict[str, Any]) -> Tensor:
        labels = condition.get("class_labels")
        some = labels is not None and not (isinstance(labels, Tensor) and labels.shape[-1:] == (0,))  # EDM's loaders
        if some and attribute(self.network, "label_dim") == 0:
            raise ValueError(
                "expected no class_labels, as the network is unconditional (label_dim = 0) and would ignore them, got "
                "some: drop them, or load the conditional network."
            )
        kind = z.device.type
        half = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with _answers_as_asked(self.network) if half else nullcontext():
            return super()._call_network(z, c_noise, condition)

    def _network_dtype(self, default: torch.dtype) -> torch.dtype:
        own = super()._network_dtype(default)
        return own if self.dtype is not None else torch.promote_types(own, torch.float32)


@contextmanager
def _answers_as_asked(network: object) -> Iterator[None]:
    """Return the output of the model inside EDM's networks to its input's dtype: they insist on it, autocast does not.

    They widen it themselves as their next step, so that nothing is lost.
    """
    inner = (model for module in modules_of(network) if isinstance(model := getattr(module, "model", None), nn.Module))
    handles = [model.register_forward_hook(_as_asked) for model in inner]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_asked(_: nn.Module, asked: tuple[Any, ...], answer: Any) -> Any:
    return answer.to(asked[0].dtype) if isinstance(answer, Tensor) else answer
