"""How varied one set of samples is, as an effective number of distinct ones.

With K_ij = √(u_i u_j) k(x_i, x_j) over its trace, λ its eigenvalues,

    Vendi_q = exp(H_q(λ)),  H_1 = −Σ λ log λ,  H_q = log Σ λ^q / (1 − q),

from 1 for equal samples to n for n samples with k = 0 between them. RKE is Vendi_2 = 1/‖K‖_F², which needs no
eigenvalues.

References:
  Friedman & Dieng 2023 (Vendi score), Pasarkar & Dieng 2024 (of order q), Jalali et al. 2023 (RKE).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax._core.modes import in_own_modes
from mmdjax._core.numerics import product, reciprocal, safe_sqrt
from mmdjax._points.blocks import BLOCK, num_blocks, rows, sum_within, triangle
from mmdjax._points.particles import flat
from mmdjax.fit import with_kernel
from mmdjax.kernels import Cosine, Linear
from mmdjax.mmd import Estimator, check_estimator, if_known, per_pair
from mmdjax.tree import is_concrete

LARGEST = 8 * BLOCK  # samples whose Gram is made whole: 1 GB in float32


@in_own_modes
def vendi(kernel: Any, x: Any, *, order: Any = 1.0) -> Float[Array, ""]:
    """Vendi score: the effective number of distinct samples, exp of the entropy of the kernel matrix's eigenvalues.

    Differentiable; with `Cosine` and `Linear` if n ≤ D or the features have full rank.

    Args:
      kernel: positive definite, with k(x, x) = 1 (other kernels are divided by their trace). To compare sets, give the
        bandwidth as a number: None is taken from x. `Cosine()` and `Linear()` take any n, by the features' singular
        values.
      x: [n, ...].
      order: q, a Python number above 0. Small q weighs rare samples more, large q common ones; math.inf is 1/λ_max.
        Eigenvalues below rounding count as 0: in float32 those below about 1e-6 of the largest (1e-5 for 10,000
        samples). For orders below about .5, where they matter, use `jax_enable_x64`.
    Raises:
      ValueError: order is not above 0; the kernel's diagonal is 0 (Energy); more than 16,384 samples, with another
        kernel than `Cosine` and `Linear` (`rke` takes any number).

    Example:
      >>> round(float(vendi(Cosine(), jnp.eye(4))), 4), round(float(vendi(Cosine(), jnp.ones((4, 3)))), 4)
      (4.0, 1.0)

    Source: Friedman & Dieng 2023; Pasarkar & Dieng 2024.
    """
    if not order > 0:
        raise ValueError(f"order is {order}; give a number above 0")
    kernel, points = with_kernel(kernel, x=x)
    if points.n > LARGEST and not isinstance(kernel, Cosine | Linear):
        raise ValueError(
            f"x has {points.n} samples; the eigenvalues of a {type(kernel).__name__} Gram are computed for at most "
            f"{LARGEST}; use rke, Cosine() or a subset"
        )
    return _checked(kernel, _vendi(kernel, points, float(order)))


@in_own_modes
def rke(kernel: Any, x: Any, *, estimator: Estimator = "v") -> Float[Array, ""]:
    """Rényi kernel entropy of order 2, as a number of modes: 1 / Σ_ij u_i u_j k(x_i, x_j)², k(x, x) = 1.

    Differentiable, for any n.

    Args:
      kernel: see `vendi`; usually `RBF(bandwidth)`.
      x: [n, ...].
      estimator: "v": as published, at most n. "u": without self-pairs, so that 1/RKE is unbiased (∞ if no two samples
        are alike); needs two samples.
    Raises:
      ValueError: the kernel's diagonal is 0 (Energy); "u", and one sample has all the weight (NaN inside `jit`).

    Example:
      >>> from mmdjax import RBF
      >>> modes = jnp.repeat(10.0 * jnp.arange(3)[:, None], 4, axis=0)
      >>> round(float(rke(RBF(1.0), modes)), 4)
      3.0

    Source: Jalali et al. 2023.
    """
    check_estimator(estimator)
    kernel, points = with_kernel(kernel, estimator=estimator, x=x)
    return _checked(kernel, _rke(kernel, points, estimator))


def _checked(kernel, score):
    if is_concrete(score) and jnp.isnan(score):
        raise ValueError(f"{type(kernel).__name__} is 0 between a sample and itself; use a similarity such as RBF(1.0)")
    return score


@functools.partial(jax.jit, static_argnames="order")
def _vendi(kernel, p, order):
    u = p.probabilities()
    if isinstance(kernel, Cosine | Linear):
        x = flat(p.x)

        def features(i):
            length = safe_sqrt((x[i] ** 2).sum(1)) if isinstance(kernel, Cosine) else jnp.ones(i.shape, x.dtype)
            return x[i] * (jnp.sqrt(u[i]) * reciprocal(length))[:, None]

        singular = jnp.linalg.svd(triangle(features, *x.shape), compute_uv=False)
        rounding = (math.sqrt(p.n) * jnp.finfo(x.dtype).eps * singular.max()) ** 2
        spectrum = singular**2
        trace = spectrum.sum()
    else:
        gram = kernel.gram(p, p, same=True) * jnp.sqrt(u[:, None] * u)
        spectrum, trace = jnp.linalg.eigvalsh(gram), jnp.trace(gram)
        rounding = jnp.finfo(gram.dtype).eps * spectrum.max()
        if order < 1:  # no true one is below 0: about as far as the least lies there, those that are 0 lie above
            rounding = jnp.maximum(4 * rounding, -3 * spectrum.min())
    share = spectrum / trace
    present = spectrum > rounding
    log = jnp.log(jnp.where(present, share, 1.0))
    if order == math.inf:
        entropy = -log[jnp.argmax(share)]
    elif abs(order - 1) < 0.01:  # Σ λ^q = 1 + Σ λ (λ^(q−1) − 1), which keeps its digits as q goes to 1
        gain = jnp.expm1((order - 1) * log) if order != 1 else log
        total = jnp.sum(jnp.where(present, share * gain, 0.0))
        entropy = jnp.log1p(total) / (1 - order) if order != 1 else -total
    else:
        entropy = jax.nn.logsumexp(jnp.where(present, order * log, -jnp.inf)) / (1 - order)
    return jnp.where(trace > 0, jnp.exp(entropy), jnp.nan)


@functools.partial(jax.jit, static_argnames="estimator")
def _rke(kernel, p, estimator):
    u = p.probabilities()

    def squared(a, b, *, same=False):
        return kernel.gram(a, b, same=same) ** 2

    def form(k, left, right):
        return product(product(left, k), right)

    def trace(i):
        block = rows(p.n, i)
        part = block.of(p)
        return product(block.weights(u), jnp.diagonal(kernel.gram(part, part, same=True)))

    total = jax.lax.map(trace, jnp.arange(num_blocks(p.n))).sum()
    alike = sum_within(squared, form, p, u, self_pairs=estimator == "v")
    score = if_known(total**2 / per_pair(alike, u, estimator), estimator, u)
    return jnp.where(total > 0, score, jnp.nan)
