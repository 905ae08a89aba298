"""Kernels between samples, and how to write one.

    contract      Kernel, the base class; any function (a, b) -> Gram as a kernel
    radial        kernels of the distance: RBF, Laplacian, Matern32, Matern52, IMQ, RationalQuadratic, Energy
    inner         kernels of the inner product: Polynomial, Linear, Cosine
    composed      kernels made of kernels: Sum, Product, Mapped; Delta for labels
    bandwidths    bandwidths taken from the references

Your own kernel is a subclass: of `Scaled` if it is a function of the distance with a bandwidth, of `Radial` if it is
another function of the distance, else of `Kernel`. It needs no registration or decorator, and square roots need no care
at distance 0. Any callable (a, b) -> Gram is a kernel too, differentiated automatically: for MMD² and the guidance with
precondition="none".
"""

from mmdjax.kernels.bandwidths import Median, NearestNeighbour, Neighbourhood, median_bandwidth
from mmdjax.kernels.composed import Delta, Mapped, Product, Sum
from mmdjax.kernels.contract import Custom, Kernel, as_kernel, check_fitted
from mmdjax.kernels.inner import Cosine, Linear, Polynomial
from mmdjax.kernels.radial import IMQ, RBF, Energy, Laplacian, Matern32, Matern52, Radial, RationalQuadratic, Scaled

__all__ = [
    "IMQ",
    "RBF",
    "Cosine",
    "Custom",
    "Delta",
    "Energy",
    "Kernel",
    "Laplacian",
    "Linear",
    "Mapped",
    "Matern32",
    "Matern52",
    "Median",
    "NearestNeighbour",
    "Neighbourhood",
    "Polynomial",
    "Product",
    "Radial",
    "RationalQuadratic",
    "Scaled",
    "Sum",
    "as_kernel",
    "check_fitted",
    "median_bandwidth",
]
