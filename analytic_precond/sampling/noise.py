r"""Noise for samplers, drawn sample by sample: a sample does not depend on the batch that it is made in.

Each sample has a generator of its own, as in diffusers and EDM's ``generate.py``. Noise is drawn in float32 and then
cast, so that a seed means the same image in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Generator, Tensor

from .._checks import check_count, check_tensor
from .._precision import place

Generators = Generator | Sequence[Generator] | None


def per_sample_generators(
    num: int, generator: Generator | None = None, *, device: torch.device | str | None = None
) -> list[Generator]:
    """Return one generator per sample, seeded from one generator, one draw after the other.

    Two lists of 32 drawn from a generator hold the same generators as one list of 64. Hand a list to `draw_noise` and
    then to the sampler, and each sample goes on with its own stream: the images are the same however they are batched.

    torch's CPU generator takes 32 bits of its seed: among 50,000 samples, two are equal with probability 1/4. Where
    that matters, count: ``[torch.Generator().manual_seed(i) for i in range(first, last)]``.

    Args:
        num: Number of samples.
        generator: What the seeds are drawn from; torch's default CPU generator by default.
        device: Where the new generators draw: ``generator``'s device by default, else the CPU.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``num`` is negative.

    Examples:
        >>> parent = torch.Generator().manual_seed(0)
        >>> halves = [draw_noise((1, 4), per_sample_generators(1, parent)) for _ in range(2)]
        >>> whole = draw_noise((2, 4), per_sample_generators(2, parent.manual_seed(0)))
        >>> torch.equal(torch.cat(halves), whole)
        True
    """
    check_count(num, 0, "num")
    if generator is not None:
        _check_generators([generator], 1)
    source = torch.default_generator if generator is None else generator
    device = source.device if device is None else torch.device(device)
    seeds = [torch.randint(2**63 - 1, (), generator=source, device=source.device) for _ in range(num)]
    return [Generator(device).manual_seed(seed) for seed in (torch.stack(seeds).tolist() if seeds else [])]


def draw_noise(
    shape: Sequence[int],
    generator: Generators = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return standard normal noise, drawn sample by sample; times ``levels[0]`` it is what samplers start from.

    Args:
        shape: Shape ``(B, ...)``.
        generator: One generator per sample, or one from which they are seeded as by `per_sample_generators`; torch's
            default generator by default. From a single generator, the sampler then seeds others: what it has given
            here depends on the batch size, and so does what follows. Hand both the same list to avoid that.
        device: Where the noise goes; the generator's device by default, else torch's default.
        dtype: Of the noise.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``shape`` is empty or there is not one generator per sample.

    Examples:
        >>> generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        >>> x = 80.0 * draw_noise((4, 3, 32, 32), generators)
        >>> torch.equal(x[3:], 80.0 * draw_noise((1, 3, 32, 32), [torch.Generator().manual_seed(3)]))
        True
    """
    if len(shape) == 0:
        raise ValueError("shape must be (B, ...), with the number of samples first, got ().")
    check_count(shape[0], 0, "shape[0]", "It is the number of samples.")
    _check_generators(generator, shape[0])
    if device is None:
        some = generator[0] if isinstance(generator, Sequence) and generator else generator
        device = some.device if isinstance(some, Generator) else torch.get_default_device()
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype}: for example torch.float32.")
    device = torch.device(device)
    return _draw(_spread(generator, shape[0], device), shape[1:], device, dtype)


def noise_source(x: Tensor, count: int, generator: Generators, noise: Tensor | None) -> Callable[[int], Tensor]:
    """Return the function from a number, below ``count``, to a sampler's draw of that number, shaped like ``x``."""
    if noise is None:  # the generators are untouched before its first call
        _check_generators(generator, len(x))
        own = cache(lambda: _spread(generator, len(x), x.device))  # seeded at the first draw
        return lambda _: _draw(own(), x.shape[1:], x.device, x.dtype)
    if generator is not None:
        raise ValueError("expected a generator or the noise itself, got both: leave one out.")
    check_tensor(noise, "noise")
    if noise.shape != (count, *x.shape):
        raise ValueError(
            f"noise must hold {count} draws, one for each level between the first and sigma_min, shape "
            f"{(count, *x.shape)}, got {tuple(noise.shape)}."
        )
    return lambda number: place(noise[number], x.device, x.dtype)


def _check_generators(generator: object, batch: int) -> None:
    """Refuse anything but a generator, one per sample, or None."""
    one_each = generator if isinstance(generator, Sequence) else None
    for own in [] if generator is None else [generator] if one_each is None else one_each:
        if not isinstance(own, Generator):
            raise TypeError(
                f"generator must be a torch.Generator, got {own!r}: torch.Generator().manual_seed(0) for a seed of 0, "
                f"or a list with one per sample."
            )
    if one_each is not None and len(one_each) != batch:
        raise ValueError(f"generator must be one, or a list with one for each of {batch} samples, got {len(one_each)}.")


def _spread(generator: Generators, batch: int, device: torch.device) -> Sequence[Generator]:
    """Return one generator per sample; those of torch's default generator draw on ``device``."""
    if generator is None:
        return per_sample_generators(batch, device=device)
    return per_sample_generators(batch, generator) if isinstance(generator, Generator) else generator


def _draw(generators: Sequence[Generator], shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return one draw of each generator. Shape ``(B, *shape)``."""
    places = {generator.device for generator in generators}
    together = places.pop() if len(places) == 1 else device  # drawn there, and copied to the device at once
    noise = torch.empty(len(generators), *shape, device=together, dtype=torch.float32)
    for sample, generator in zip(noise, generators, strict=True):
        sample.copy_(torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32))
    return place(noise, device, dtype)
