"""The parity toolkit: how far a result is from the truth, and the inputs most likely to show it.

for case in fuzz_cases(seed=0, n=100):
    assert not [f for f in compare_case(case, Ours("cpp")) if f.mismatches], case.repro
"""

from .cases import Case, TensorSpec, fuzz_case, fuzz_cases
from .hostile import KINDS, SPECIAL, hostile_gradients, hostile_shapes
from .poison import poisoned_memory
from .run import Finding, Ours, Subject, compare_case, run_case, truth_of_case
from .ulp import INCOMPARABLE, error_vs_truth, ulp_distance, ulp_size

__all__ = [
    "INCOMPARABLE", "KINDS", "SPECIAL", "Case", "Finding", "Ours", "Subject", "TensorSpec", "compare_case", "error_vs_truth", "fuzz_case",
    "fuzz_cases", "hostile_gradients", "hostile_shapes", "poisoned_memory", "run_case", "truth_of_case", "ulp_distance", "ulp_size",
]  # fmt: skip
