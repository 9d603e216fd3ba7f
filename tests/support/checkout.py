"""Where things are in the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BENCHMARKS = ROOT / "examples" / "benchmarks"
GOLDEN = ROOT / "tests" / "golden" / "peers.npz"  # outputs of published codes
