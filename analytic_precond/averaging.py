"""Moving averages of a student, by torch's own `AveragedModel`."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def exponential_moving_average(student: nn.Module, decay: float) -> AveragedModel:
    r"""Return a copy of a student that follows it: $\bar\theta \leftarrow \mu \bar\theta + (1 - \mu) \theta$.

    Call ``average.update_parameters(student)`` after each optimiser step; the first call copies. The copy is called as
    the student is, needs no gradients, and its ``state_dict`` holds the number of updates, so that training resumes
    where it was. It serves as the target of `consistency_distillation_loss` and `trajectory_distillation_loss`, and
    with a larger decay as the model to sample from; ``average.module`` is the student inside. Other buffers (batch
    statistics) are copied, not averaged. Make it once the student is on its device: an average moved to a GPU reads its
    counter back at each update.

    Args:
        student: The student, without a wrapper such as DistributedDataParallel (whose ``.module`` it is).
        decay: $\mu$ in [0, 1]; the paper uses 0.999 for both.

    Returns:
        The average, on the student's device and in its mode (train or eval).

    Raises:
        TypeError: If ``student`` is not an `nn.Module`.
        ValueError: If ``decay`` is not in [0, 1].

    Examples:
        >>> student = nn.Linear(1, 1)
        >>> average = exponential_moving_average(student, decay=0.75)
        >>> for value in (0.0, 1.0):
        ...     _ = nn.init.constant_(student.weight, value)
        ...     average.update_parameters(student)
        >>> average.module.weight.item()  # 0.75 * 0 + 0.25 * 1
        0.25
    """
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be an nn.Module, got {type(student).__name__}: only modules have parameters.")
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise ValueError(f"decay must be a number in [0, 1], got {decay!r}: 0.999 averages about 1000 steps.")
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return average.requires_grad_(False)
