"""Few points or features in place of many references, with the error that this causes.

A step of guidance costs in proportion to the number m of references. A coreset of s references costs the same for
every m. So do features φ with k(x, y) ≈ φ(x)ᵀφ(y): their mean over the references is one vector.

    coreset           s references and weights; the MMD between them and all references is computed exactly
    random_features   cosines of random projections (radial kernels); |k̂ − k| bounded by Hoeffding, Rahimi & Recht
    nystroem          k(x, L) K_LL^(−1/2) for landmarks L; the MMD error of the references is at most √(mean residual)

References:
  Chen, Welling & Smola 2010 (herding). Rahimi & Recht 2007 (random features, claim 1). Williams & Seeger 2001
  (Nyström). Sutherland & Schneider 2015 (error of MMD² by random features).
"""

import contextlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import nnls

from mmdjax._core.modes import in_own_modes
from mmdjax._core.numerics import product
from mmdjax._points.blocks import block_of, columns_of, row_size, sum_over
from mmdjax._points.particles import Particles, as_particles, flat, on_device, whole, wide_dtype
from mmdjax.fit import with_kernel
from mmdjax.kernels import Kernel, Linear, Mapped
from mmdjax.mmd import Estimator, check_estimator, embedding, mmd2, pair_norm
from mmdjax.tree import is_concrete, is_traced, pytree, static

HELD = 10_000  # references whose Gram is held by "thinning": 400 MB


class Coreset(NamedTuple):
    """A few weighted references in place of all.

    Args:
      particles: s of the references, with weights: refs for `guided_sample`.
      mmd: MMD between them and all references, in the kernel's units: the most by which any MMD to them is wrong.
    """

    particles: Particles
    mmd: Float[Array, ""]


@in_own_modes
def coreset(kernel: Any, refs: Any, size: int, *, method: str = "herding", reweight: bool = True) -> Coreset:
    """A few references whose weighted sum is closest to all of them in MMD.

    "herding" adds one reference at a time, the one that brings the sum closest: m² + m · size kernel values, in blocks.
    "thinning" starts with all and drops the one whose loss matters least: m² values, all in memory. Weights of refs are
    taken into account; references of weight 0 are never chosen.

    Args:
      kernel: a kernel; a bandwidth of None is taken from refs.
      refs: m Particles or an array [m, ...].
      size: how many to keep. If fewer have a weight above 0, each of these is kept, and the result is smaller (inside
        `jit` it is filled up with weight 0).
      method: "herding" or "thinning".
      reweight: give the chosen ones the best non-negative weights, some of which may be 0; False: equal weights.
    Raises:
      ValueError: size not in 1 … m, a method that does not exist, "thinning" of more than 10,000 references.

    Example:
      >>> from mmdjax import RBF
      >>> few = coreset(RBF(1.0), jnp.array([[0.0], [0.1], [5.0]]), 2)
      >>> sorted(few.particles.x.ravel().tolist())[-1], bool(few.mmd < 0.05)
      (5.0, True)

    Source: Chen, Welling & Smola 2010; "thinning" is the greedy method that removes.
    """
    kernel, refs = with_kernel(kernel, refs=refs)
    if not 1 <= size <= refs.n:
        raise ValueError(f"size is {size}; give a number of references from 1 to {refs.n}")
    if method not in ("herding", "thinning"):
        raise ValueError(f'method is {method!r}; choose "herding" or "thinning"')
    refs = _counting(refs)
    if method == "thinning" and refs.n > HELD:
        raise ValueError(f'"thinning" keeps the Gram of all references, and {refs.n} are too many; use "herding"')
    size = min(int(size), refs.n)
    if method == "herding":
        chosen, square = jax.jit(_herd, static_argnums=2)(kernel, refs, size)
    else:
        chosen, square = jax.jit(_thin, static_argnums=(2, 3))(kernel, refs, size, reweight)
    present = jnp.arange(size) < (refs.probabilities() > 0).sum()
    few = on_device(Particles(*jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], (refs.x, refs.cond))))
    weight = jnp.asarray(present / present.sum(), wide_dtype(refs.x))
    if reweight:
        weight = _best_weights(kernel, refs, few, square, present)
    few = Particles(few.x, few.cond, weight)
    return Coreset(few, jnp.sqrt(jnp.maximum(jax.jit(mmd2)(kernel, refs, few), 0.0)))


def _counting(refs):
    """References without those of weight 0, if weights are concrete."""
    if refs.weight is None or not is_concrete(refs.weight) or (np.asarray(refs.weight) > 0).all():
        return refs
    counts = np.flatnonzero(np.asarray(refs.weight) > 0)
    return jax.tree.map(lambda leaf: leaf[counts], refs)


def _mean_kernel(kernel, points, refs):
    """E_y k(p, y) for each point, in blocks of points and of references."""
    v = refs.probabilities()

    return columns_of(lambda rows: embedding(kernel, refs, v, rows.of(points))[None], points.n, block_of(points.x))[0]


def _row(refs, index):
    return jax.tree.map(lambda leaf: leaf[index][None], refs)


def _self_values(kernel, refs):
    def one(point):
        point = jax.tree.map(lambda v: v[None], point)
        return kernel.gram(point, point, same=True)[0, 0]

    return columns_of(lambda rows: jax.vmap(one)(on_device(rows.of(refs)))[None], refs.n, block_of(refs.x))[0]


def _herd(kernel, refs, size):
    # of the references chosen: their numbers; and E k(y, y')
    v = refs.probabilities()
    mean, own, empty = _mean_kernel(kernel, refs, refs), _self_values(kernel, refs), v == 0

    def add(carry, t):
        # MMD² after adding j: [S + 2 s_j + k_jj]/(t+1)² − 2 [B + μ_j]/(t+1), s_j the sum over those there
        among, taken = carry
        change = (2 * among + own) / (t + 1) - 2 * mean
        j = jnp.argmin(jnp.where(taken, jnp.inf, change))
        column = kernel.gram(refs, _row(refs, j))[:, 0]
        return (among + column, taken.at[j].set(True)), j

    start = jnp.zeros_like(mean), empty
    return jax.lax.scan(add, start, jnp.arange(size, dtype=mean.dtype))[1], product(v, mean)


def _thin(kernel, refs, size, reweight):
    v = refs.probabilities()
    gram = kernel.gram(refs, refs, same=True)
    mean, own, empty = product(gram, v), jnp.diagonal(gram), v == 0
    # weights of those that are there, before they are normalised: their own, or equal ones as the result will have
    u = v / v.max() if reweight else jnp.where(empty, 0.0, 1.0)

    def drop(carry, _):
        # MMD² is A/U² − 2 B/U, U the sum of the weights; without j, r = U − u_j in its place, it is more by
        # u_j/r {[A/U² (U + r) − 2 s_j + u_j k_jj]/r − 2 (B/U − μ_j)}
        among, there = carry
        w = jnp.where(there, u, 0.0)
        total = w.sum()
        square, mixed = product(w, among) / total**2, product(w, mean) / total
        rest = jnp.maximum(total - u, jnp.finfo(u.dtype).tiny)
        more = u / rest * ((square * (total + rest) - 2 * among + u * own) / rest - 2 * (mixed - mean))
        j = jnp.argmin(jnp.where(there, jnp.where(empty, -jnp.inf, more), jnp.inf))
        return (among - u[j] * gram[:, j], there.at[j].set(False)), None

    there = jnp.ones(refs.n, bool)
    (_, there), _ = jax.lax.scan(drop, (product(gram, u), there), length=refs.n - size)
    return jnp.argsort(jnp.where(there, jnp.where(empty, 1, 0), 2), stable=True)[:size], product(v, mean)


def _best_weights(kernel, refs, few, square, present):
    """argmin over the simplex of wᵀKw − 2wᵀμ, on the host; `square` is E k(y, y')."""
    traced, dtype = is_traced((kernel, refs, few)), wide_dtype(refs.x)
    in_float64 = kernel.is_radial and not traced  # functions of one's own may not work there
    with jax.enable_x64(True) if in_float64 else contextlib.nullcontext():
        gram, mean = jax.jit(_gram_and_mean)(kernel, refs, few)
    given = gram, mean, square, present
    if not traced:
        return jnp.asarray(best_on_simplex(*given), dtype)
    like = jax.ShapeDtypeStruct((few.n,), dtype)
    return jax.pure_callback(
        lambda *given: best_on_simplex(*given).astype(dtype), like, *given, vmap_method="sequential"
    )


def _gram_and_mean(kernel, refs, few):
    """K among the few and μ of all; in float64 where that is enabled, whatever the points are stored as."""

    def widest(tree):
        def cast(leaf):
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            return leaf.astype(jnp.promote_types(leaf.dtype, jnp.result_type(float))) if floating else leaf

        return jax.tree.map(cast, tree)

    few = widest(few)
    v = widest(jnp.ones(refs.n) if refs.weight is None else jnp.asarray(refs.weight))

    def term(rows):
        return product(kernel.gram(few, widest(on_device(rows.of(refs)))), rows.weights(v / v.sum()))

    return kernel.gram(few, few, same=True), sum_over(term, refs.n, block_of(refs.x))


def best_on_simplex(gram: Any, mean: Any, square: Any, present: Any) -> np.ndarray:
    """argmin of wᵀKw − 2wᵀμ + c over the weights of those present that are non-negative and sum to one, in float64.

    There it is wᵀMw with M = K − μ1ᵀ − 1μᵀ + c11ᵀ, the Gram about the mean embedding, which is positive semidefinite,
    also for a kernel that is so only conditionally. With LᵀL = M the best weights are those of the least squares
    |Lw|² + (1ᵀw − 1)² over w ≥ 0, normalised: for w = s p with p on the simplex and pᵀMp = q that is s²q + (s − 1)², at
    best q/(1 + q), which increases in q. Lawson & Hanson 1974.

    Args:
      gram: K, among the points.
      mean: μ.
      square: c; more than E k(y, y') does as well, being constant on the simplex.
      present: which of the points count; the others get 0.
    """
    gram, mean, square, present = (np.asarray(v, np.float64) for v in (gram, mean, square, present))
    kept = np.flatnonzero(present)
    gram, mean = gram[np.ix_(kept, kept)], mean[kept]
    about_mean = (gram + gram.T) / 2 - mean[:, None] - mean[None, :] + square
    scale = max(np.abs(np.diagonal(about_mean)).max(), np.finfo(float).tiny)
    values, vectors = np.linalg.eigh(about_mean / scale + 1)  # + 1: rounding of c leaves it positive semidefinite
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    zeros, ones = np.zeros(len(kept)), np.ones(len(kept))
    w, _ = nnls(np.vstack([root, ones]), np.append(zeros, 1.0), maxiter=10 * len(kept) + 100)
    weights = np.zeros(len(present))
    weights[kept] = w / w.sum()
    return weights


@pytree
class RandomFeatures:
    """φ(x) = √2 [cos Ωx, sin Ωx] for F frequencies Ω [F, d], so that φ(x)ᵀφ(y)/2F estimates k(x, y) without bias."""

    frequencies: Any

    def __call__(self, x: Any) -> Float[Array, "n features"]:
        angle = product(flat(x), self.frequencies.T)
        return math.sqrt(2.0) * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)

    def kernel(self) -> Kernel:
        """k̂ as a kernel."""
        return Mapped(self, Linear())

    def pair_bound(self, pairs: int = 1, failure: float = 0.05) -> float:
        """A bound on |k̂ − k| for all of so many pairs, wrong with at most this probability: √(2 log(2 pairs/δ)/F).

        Source: Hoeffding's inequality for a mean of F cosines, and the union bound.
        """
        return math.sqrt(2 * math.log(2 * pairs / failure) / self.frequencies.shape[0])

    def uniform_bound(self, diameter: float, bandwidth: float, failure: float = 0.05) -> float:
        """The same for all pairs in a set of this diameter, for an RBF: ε with 2⁸ (σℓ/ε)² exp(−Fε²/4(d + 2)) = δ.

        σ² = d/h². It is useful below 2, for F many times d. Source: Rahimi & Recht 2007, claim 1.
        """
        count, d = self.frequencies.shape
        low, high = 1e-6, 1e6
        for _ in range(200):
            e = math.sqrt(low * high)
            log_left = math.log(256 * d * (diameter / bandwidth / e) ** 2) - count * e**2 / (4 * (d + 2))
            low, high = (e, high) if log_left > math.log(failure) else (low, e)
        return high


@in_own_modes
def random_features(kernel: Any, key: Array, refs: Any, num: int) -> RandomFeatures:
    """Features whose inner products estimate a radial kernel.

    Args:
      kernel: RBF, Laplacian, Matern32, Matern52, IMQ or RationalQuadratic. A bandwidth of None is taken from refs; with
        a tuple of bandwidths one is drawn for each frequency.
      refs: Particles or an array [m, ...].
      num: F; there are 2F features.
    Raises:
      TypeError: a kernel with no known spectrum.

    Example:
      >>> from mmdjax import RBF
      >>> phi = random_features(RBF(1.0), jax.random.key(0), jnp.zeros((2, 3)), 4096)
      >>> x, y = jnp.zeros((1, 3)), jnp.ones((1, 3))
      >>> abs(float(phi.kernel()(Particles(x), Particles(y))[0, 0]) - 0.223) < phi.pair_bound()
      True

    Source: Rahimi & Recht 2007; mixtures of Gaussian widths for the kernels other than RBF.
    """
    kernel, refs = with_kernel(kernel, refs=refs)
    d = row_size(refs.x)
    dtype = wide_dtype(refs.x)
    key_normal, key_width, key_choice = jax.random.split(key, 3)
    normal = jax.random.normal(key_normal, (num, d), dtype)
    width = kernel.spectral_width(key_width, num, dtype)
    hs = jnp.asarray(kernel.bandwidth if isinstance(kernel.bandwidth, tuple) else (kernel.bandwidth,), dtype)
    h = jax.random.choice(key_choice, hs, (num,))
    return RandomFeatures(normal * (width / h)[:, None])


@pytree
class Nystroem:
    """φ(x) = √s K_LL^(−1/2) k(L, x) for s landmarks L, so that φ(x)ᵀφ(y)/s is k projected onto their span.

    Args:
      base: k.
      landmarks: L.
      root: K_LL^(−1/2) [s, s].
      error: a bound on the MMD between the references before and after the projection.
    """

    base: Any
    landmarks: Any
    root: Any
    error: Any

    def __call__(self, x: Any) -> Float[Array, "n features"]:
        gram = self.base.gram(Particles(x), self.landmarks)
        return math.sqrt(self.landmarks.n) * product(gram, self.root)

    def kernel(self) -> Kernel:
        """k̂ as a kernel."""
        return Mapped(self, Linear())


@in_own_modes
def nystroem(kernel: Any, refs: Any, landmarks: Any) -> Nystroem:
    """Features from the kernel's values at landmarks.

    Args:
      kernel: a positive definite kernel on samples; a bandwidth of None is taken from refs.
      refs: m Particles or an array [m, ...].
      landmarks: s Particles or an array: a `coreset` of refs, or some rows of them.

    Example:
      >>> from mmdjax import RBF
      >>> refs = jnp.array([[0.0], [1.0]])
      >>> phi = nystroem(RBF(1.0), refs, refs)
      >>> bool(phi.error < 1e-3), round(float(phi.kernel()(Particles(refs), Particles(refs))[0, 1]), 3)
      (True, 0.607)

    Source: Williams & Seeger 2001. The error is √(Σ_j v_j (k(y_j, y_j) − k̂(y_j, y_j))).
    """
    kernel, landmarks, refs = with_kernel(kernel, landmarks=landmarks, refs=refs)
    if kernel.uses_cond:
        raise ValueError("Nyström features are of samples, not of conditions; give the kernel on x")
    few = Particles(landmarks.x)
    values, vectors = jnp.linalg.eigh(kernel.gram(few, few, same=True))
    kept = values > values[-1] * few.n * jnp.finfo(values.dtype).eps
    root = product(vectors * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1.0)), 0.0), vectors.T)

    def residual(rows):
        some = Particles(rows.of(refs.x))
        phi = product(kernel.gram(some, few), root)
        own = _self_values(kernel, some)
        return jnp.sum(rows.weights(refs.probabilities()) * jnp.maximum(own - jnp.sum(phi**2, axis=1), 0.0))

    mean = sum_over(residual, refs.n, block_of(refs.x))
    return Nystroem(kernel, few, root, jnp.sqrt(mean))


@pytree
class MeanEmbedding:
    """References as one vector of features: MMD² and its gradient at a cost that does not depend on their number.

    Args:
      features: x [n, ...] -> φ [n, F], such as those of `random_features` or `nystroem`.
      mean: Σ_j v_j φ(y_j) [F].
      own: E k̂(y, y') over the references, by `estimator`.
    """

    features: Any
    mean: Any
    own: Any
    estimator: str = static(default="u")

    def mmd2(self, z: Any) -> Float[Array, ""]:
        """MMD² between particles z and the references under k̂."""
        z = whole(as_particles(z, "z"))
        u = z.probabilities()
        phi = self.features(z.x)
        mean = product(u, phi)
        own = _square(mean, _squares(phi, u), u, self.estimator)
        return (own - 2 * product(mean, self.mean)) / phi.shape[1] + self.own

    def gradient(self, z: Any) -> Any:
        """∂MMD²/∂z_i / u_i, as guidance with precondition="none" has it: move z_i against it."""
        z = whole(as_particles(z, "z"))
        u = z.probabilities()
        phi, pull_back = jax.vjp(self.features, z.x)
        mean = product(u, phi)
        own = jnp.broadcast_to(mean, phi.shape)
        if self.estimator == "u":  # without the pair of a particle with itself
            own = (own - u[:, None] * phi) / pair_norm(u, "u")
        return pull_back((2 / phi.shape[1]) * (own - self.mean))[0]


@in_own_modes
def embed(features: Any, refs: Any, *, estimator: Estimator = "u") -> MeanEmbedding:
    """The mean of the references' features, taken in blocks.

    Args:
      features: from `random_features` or `nystroem`, or any function [n, ...] -> [n, F] that is a pytree.
      refs: m Particles or an array [m, ...].
      estimator: as in `mmd2`.

    Example:
      >>> refs = jnp.array([[0.0], [1.0]])
      >>> from mmdjax import RBF
      >>> embed(nystroem(RBF(1.0), refs, refs), refs).gradient(jnp.array([[0.5], [2.0]])).shape
      (2, 1)
    """
    check_estimator(estimator)
    refs = whole(as_particles(refs))
    v = refs.probabilities()

    def term(rows):
        phi, w = features(rows.of(refs.x)), rows.weights(v)
        return product(w, phi), _squares(phi, w)

    mean, squares = sum_over(term, refs.n, block_of(refs.x))
    return MeanEmbedding(features, mean, _square(mean, squares, v, estimator) / mean.shape[0], estimator)


def _squares(phi, u):
    # the pairs of each point with itself
    return jnp.sum(u**2 * jnp.sum(phi**2, axis=1))


def _square(mean, squares, u, estimator):
    square = product(mean, mean)
    return square if estimator == "v" else (square - squares) / pair_norm(u, "u")
