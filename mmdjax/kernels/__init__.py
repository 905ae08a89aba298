"""Kernels between samples, and how to write one.

    contract      Kernel: what the guidance asks; any function (a, b) -> Gram as a kernel
    radial        kernels of the distance: RBF, Laplacian, Matern32, Matern52, IMQ, RationalQuadratic, Energy
    inner         kernels of the inner product: Polynomial, Linear, Cosine
    composed      kernels made of kernels: Sum, Product, Mapped; Delta for labels
    bandwidths    where a bandwidth comes from when it is left to the references

A kernel of one's own is a subclass: of `Scaled` where it has a bandwidth, of `Radial` where it is of the distance, of
`Kernel` else. Nothing is to be registered or decorated, and no square root needs care at distance 0. Any callable
(a, b) -> Gram serves too, its gradient then being automatic, in MMD² and with precondition="none".
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
