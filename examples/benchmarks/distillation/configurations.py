"""The sizes of the benchmark: a two-core CPU in under an hour, training to the plateau, one GPU, and a smoke test."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

LONG = 3  # times as many iterations in long runs
STEEP = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3)  # dense at first, where curves are steep
PLATEAU_SHARES = tuple(k / 16 for k in range(5, 17))  # twelve evaluations, where curves are flat
BASELINE = "ctm-euler"
ANALYTIC = ("analytic-backward", "analytic-forward")
FITTED = ("least-squares", "per-mode-dct", "shifted")
RELATIVES = ("ctm-variance", "ctm-mixed", "analytic-half", "analytic-gap", "per-mode-pca", "cm", "cm-shifted")


@dataclass(frozen=True)
class Problem:
    """Data, and the network for them.

    Attributes:
        name: A name from ``data_sets.LOADERS``.
        size: Pixels on a side.
        width: Of the network.
        iterations: Of a student.
        relatives: Also compare the baselines' relatives.
        teacher_steps: Training steps of the teacher.
        num_seeds: How many of the seeds each method is run with.
    """

    name: str
    size: int
    width: int
    iterations: int
    relatives: bool = False
    teacher_steps: int = 2500
    num_seeds: int | None = None

    def evaluations(self, iterations: int, shares: tuple[float, ...]) -> list[int]:
        """Return the iterations at which a run of some length is evaluated."""
        return sorted({round(share * self.iterations) for share in shares if share * self.iterations <= iterations})


@dataclass(frozen=True)
class Run:
    """One student: everything that decides its result, within a configuration."""

    problem: str
    method: str
    seed: int
    learning_rate: float
    iterations: int

    def path(self, folder: Path) -> Path:
        """Return the file of its numbers."""
        name = f"{self.method}_seed{self.seed}_lr{self.learning_rate:g}_{self.iterations}.json"
        return folder / self.problem / "runs" / name


@dataclass(frozen=True)
class Configuration:
    """Everything else.

    Attributes:
        name: Of the configuration, and of the folder of its results.
        problems: The data sets.
        methods: The preconditionings compared, by their names in ``preconditionings.py``.
        relatives: More of them, compared where a problem says so.
        seeds: Each method is run with all of them, unless a problem has fewer.
        shares: When a run is evaluated, in multiples of a problem's iterations.
        batch_size: Of teachers and students.
        learning_rate: Of the students.
        ema: Decay of the student's average: its target, and what is evaluated.
        num_levels: Levels of the training grid.
        max_steps: Most teacher steps in one iteration.
        denoising: Add CTM's denoising loss.
        distance: In which outputs are compared: "squared", "random-features" or "lpips".
        sweep_rates: Further learning rates for ``sweep_methods``, one seed.
        sweep_methods: Methods run with further learning rates.
        long_methods: Methods of which one seed trains three times as long.
        num_samples: Samples for Frechet distances.
        num_aligned: Samples for the errors at intermediate levels.
        num_statistics: Noisy samples per level for l_t and s_t.
        num_trajectories: Teacher trajectories for the least-squares fits.
        num_gap_levels: Levels of the gap maps.
        num_gap_samples: Jumps by whose gaps theta is chosen.
        device: Where networks run.
        processes: Runs at a time.
    """

    name: str
    problems: tuple[Problem, ...]
    methods: tuple[str, ...] = (BASELINE, *ANALYTIC, *FITTED)
    relatives: tuple[str, ...] = RELATIVES
    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = STEEP
    batch_size: int = 32
    learning_rate: float = 2e-3
    ema: float = 0.95
    num_levels: int = 18
    max_steps: int = 3
    denoising: bool = False
    distance: str = "squared"
    sweep_rates: tuple[float, ...] = (1e-3, 4e-3)
    sweep_methods: tuple[str, ...] = (BASELINE, "shifted")
    long_methods: tuple[str, ...] = (BASELINE, "shifted")
    num_samples: int = 1024
    num_aligned: int = 128
    num_statistics: int = 512
    num_trajectories: int = 512
    num_gap_levels: int = 10
    num_gap_samples: int = 256
    device: str = "cpu"
    processes: int = 2

    def problem(self, name: str) -> Problem:
        """Return a problem by its name."""
        return next(problem for problem in self.problems if problem.name == name)

    def settings_of(self, run: Run) -> str:
        """Return all that decides a run's numbers, in words: not which others there are, nor where it runs."""
        others = dict.fromkeys(("methods", "relatives", "seeds", "sweep_rates", "sweep_methods", "long_methods"), ())
        alone = replace(self, problems=(self.problem(run.problem),), device="", processes=0, **others)
        return f"{run} {alone}"

    def methods_of(self, problem: Problem) -> tuple[str, ...]:
        """Return the names of the methods compared on a problem; points of the plane have no cosine transform."""
        names = self.methods + (self.relatives if problem.relatives else ())
        return tuple(name for name in names if problem.name != "spiral" or not name.endswith("dct"))

    def runs(self) -> list[Run]:
        """Return all runs. A long run also serves as the short one that it begins with."""
        matrix = []
        for problem in self.problems:
            for seed, method in product(self.seeds[: problem.num_seeds], self.methods_of(problem)):
                is_long = seed == self.seeds[0] and method in self.long_methods
                length = problem.iterations * (LONG if is_long else 1)
                matrix.append(Run(problem.name, method, seed, self.learning_rate, length))
            swept = [name for name in self.sweep_methods if name in self.methods_of(problem)]
            for rate, method in product(self.sweep_rates, swept):
                matrix.append(Run(problem.name, method, self.seeds[0], rate, problem.iterations))
        return sorted(matrix, key=lambda run: (run.seed, -run.iterations))  # a whole seed first, long runs before short


CPU = Configuration(
    name="cpu",
    problems=(
        Problem("photographs", size=16, width=16, iterations=400, teacher_steps=3000),
        Problem("digits", size=8, width=16, iterations=300, relatives=True),
        Problem("textures", size=8, width=16, iterations=300),
        Problem("spiral", size=2, width=64, iterations=1200, relatives=True),
    ),
)

SMOKE = replace(
    CPU,
    name="smoke",
    problems=(
        Problem("digits", size=8, width=8, iterations=3, teacher_steps=30),
        Problem("spiral", size=2, width=16, iterations=3, relatives=True, teacher_steps=30),
    ),
    methods=(BASELINE, *ANALYTIC, *FITTED, "annealed"),
    seeds=(0, 1),
    batch_size=8,
    sweep_rates=(1e-3,),
    num_samples=64,
    num_aligned=8,
    num_statistics=16,
    num_trajectories=32,
    num_gap_levels=3,
    num_gap_samples=8,
)

PLATEAU = replace(
    CPU,
    name="plateau",
    problems=(
        Problem("digits", size=8, width=16, iterations=3000, teacher_steps=6000),
        Problem("textures", size=8, width=16, iterations=3000, teacher_steps=6000, num_seeds=5),
        Problem("textures-long", size=8, width=16, iterations=9000, teacher_steps=6000, num_seeds=3),
        Problem("photographs", size=16, width=16, iterations=3000, teacher_steps=6000, num_seeds=5),
    ),
    methods=(BASELINE, "ctm-variance", "analytic-backward", "least-squares", "shifted", "annealed"),
    seeds=tuple(range(8)),
    shares=(0, 1 / 128, 1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, *PLATEAU_SHARES),
    ema=0.98,
    sweep_rates=(),
    long_methods=(),
    num_samples=4096,
)

GPU = replace(
    CPU,
    name="gpu",
    problems=(Problem("photographs", size=32, width=112, iterations=4000, teacher_steps=20_000),),
    batch_size=256,
    learning_rate=4e-4,
    ema=0.99,
    max_steps=17,
    denoising=True,
    distance="random-features",
    sweep_rates=(2e-4, 8e-4),
    num_samples=5000,
    num_aligned=512,
    num_statistics=4096,
    num_trajectories=2048,
    device="cuda",
    processes=1,
)

CONFIGURATIONS = {configuration.name: configuration for configuration in (CPU, PLATEAU, SMOKE, GPU)}
