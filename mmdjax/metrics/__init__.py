"""How far samples are from a target, how much of it they cover, how varied they are, and whether they are copies.

Every metric takes samples, or features of them: arrays [n, ...] or pytrees of arrays, and `Particles` if it takes
weights. x is generated, y is the target. All run under `jit` and `vmap`, and in blocks: memory grows with n, not n².

    energy_distance, mmd2_with_error, kid, frechet_distance    distances between two sets
    permutation_test, nearest_neighbour_accuracy               are two sets one distribution?
    precision_recall, density_coverage                         fidelity and coverage
    vendi, rke                                                 diversity of one set
    nearest_ratio, nearest_distance                            memorisation
"""

from mmdjax.metrics.discrepancy import (
    Estimate,
    TwoSampleTest,
    energy_distance,
    frechet_distance,
    kid,
    mmd2_with_error,
    permutation_test,
)
from mmdjax.metrics.diversity import rke, vendi
from mmdjax.metrics.neighbours import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    nearest_distance,
    nearest_neighbour_accuracy,
    nearest_ratio,
    precision_recall,
)

__all__ = [
    "DensityCoverage",
    "Estimate",
    "PrecisionRecall",
    "TwoSampleTest",
    "density_coverage",
    "energy_distance",
    "frechet_distance",
    "kid",
    "mmd2_with_error",
    "nearest_distance",
    "nearest_neighbour_accuracy",
    "nearest_ratio",
    "permutation_test",
    "precision_recall",
    "rke",
    "vendi",
]
