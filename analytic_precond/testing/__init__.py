"""For unit tests of other people's preconditionings and adapters: imported by name, it needs no test runner.

`preconditionings` asks one property after another of coefficients, which `jumps` calls, differentiates and compares,
and `advice` says what may be wrong with them;
`denoisers` compares adapters with a reference, `mistakes` says what is wrong with them; `problems` are data whose law,
statistics and jumps are known.
"""

from .denoisers import assert_denoiser
from .preconditionings import assert_preconditioning
from .problems import GaussianProblem, MixtureProblem

__all__ = ["GaussianProblem", "MixtureProblem", "assert_denoiser", "assert_preconditioning"]
