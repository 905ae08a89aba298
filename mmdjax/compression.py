"""Few points or features in place of many references, with the error that this makes.

A step of guidance against m references costs in proportion to m. A coreset of s references, or features φ with
k(x, y) ≈ φ(x)ᵀφ(y), whose mean over the references is one vector, cost the same however many references there were.

    coreset           s references and weights; the MMD between them and all references is computed exactly
    random_features   cosines of random projections (radial kernels); |k̂ − k| bounded by Hoeffding, Rahimi & Recht
    nystroem          k(x, L) K_LL^(−1/2) for landmarks L; the MMD error of the references is at most √(mean residual)

References:
  Chen, Welling & Smola 2010 (herding). Rahimi & Recht 2007 (random features, claim 1). Williams & Seeger 2001
  (Nyström). Sutherland & Schneider 2015 (error of MMD² by random features).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax.blocks import block_of, columns_of, row_size, sum_over
from mmdjax.comparable import with_kernel
from mmdjax.host import HostReferences
from mmdjax.kernels import IMQ, RBF, Kernel, Laplacian, Linear, Mapped, RationalQuadratic
from mmdjax.mmd import Estimator, check_estimator, embedding, mmd2, pair_norm
from mmdjax.numerics import product
from mmdjax.particles import Particles, as_particles, flat, whole, wide_dtype
from mmdjax.tree import pytree, replace, static

HELD = 10_000  # references whose Gram is held by "thinning": 400 MB


class Coreset(NamedTuple):
    """References that stand for all.

    Args:
      particles: s of the references, with weights: refs for `guided_sample`.
      mmd: their MMD from all references, in the kernel's units; guidance's MMD to them is off by at most as much.
    """

    particles: Particles
    mmd: Float[Array, ""]


def coreset(kernel: Any, refs: Any, size: int, *, method: str = "herding", reweight: bool = True) -> Coreset:
    """A few references whose weighted sum is closest to all of them in MMD.

    "herding" adds the reference that brings the sum closest, one at a time; time m² + m · size kernel values, memory
    that of blocks. "thinning" starts from all and drops the one that is missed least; m² values, all of them held.

    Args:
      kernel: a bandwidth of None is taken from refs.
      refs: m Particles or an array [m, ...].
      size: how many to keep.
      reweight: then find the best non-negative weights; False: equal ones.
    Raises:
      ValueError: size not in 1 … m, a method that does not exist, "thinning" of more than 10,000 references.

    Example:
      >>> from mmdjax import RBF
      >>> few = coreset(RBF(1.0), jnp.array([[0.0], [0.1], [5.0]]), 2)
      >>> sorted(few.particles.x.ravel().tolist())[-1], bool(few.mmd < 0.05)
      (5.0, True)

    Source: Chen, Welling & Smola 2010; "thinning" is its greedy counterpart from above.
    """
    kernel, refs = with_kernel(kernel, refs=refs)
    if not 1 <= size <= refs.n:
        raise ValueError(f"size is {size}; give a number of references from 1 to {refs.n}")
    if method not in ("herding", "thinning"):
        raise ValueError(f'method is {method!r}; choose "herding" or "thinning"')
    if method == "thinning" and refs.n > HELD:
        raise ValueError(f'"thinning" holds the Gram of all references and {refs.n} are too many; use "herding"')
    chosen = jax.jit(_herd if method == "herding" else _thin, static_argnums=2)(kernel, refs, int(size))
    few = _on_device(Particles(*jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], (refs.x, refs.cond))))
    weight = jnp.full(size, 1 / size, wide_dtype(refs.x))
    if reweight:
        weight = jax.jit(_best_weights)(kernel, refs, few)
    few = Particles(few.x, few.cond, weight)
    return Coreset(few, jnp.sqrt(jnp.maximum(jax.jit(mmd2)(kernel, refs, few), 0.0)))


def _mean_kernel(kernel, points, refs):
    """E_y k(p, y) for each point, in blocks of points and of references."""
    v = refs.probabilities()

    return columns_of(lambda rows: embedding(kernel, refs, v, rows.of(points))[None], points.n, block_of(points.x))[0]


def _row(refs, index):
    return jax.tree.map(lambda leaf: leaf[index][None], refs)


def _on_device(points):
    x = points.x
    return replace(points, x=flat(x).reshape(x.shape)) if isinstance(x, HostReferences) else points


def _self_values(kernel, refs):
    def one(point):
        point = jax.tree.map(lambda v: v[None], point)
        return kernel.gram(point, point, same=True)[0, 0]

    return columns_of(lambda rows: jax.vmap(one)(_on_device(rows.of(refs)))[None], refs.n, block_of(refs.x))[0]


def _herd(kernel, refs, size):
    mean, own = _mean_kernel(kernel, refs, refs), _self_values(kernel, refs)
    empty = refs.probabilities() == 0

    def add(carry, t):
        # MMD² after adding j: [S + 2 s_j + k_jj]/(t+1)² − 2 [B + μ_j]/(t+1), s_j the sum over those there
        among, taken = carry
        change = (2 * among + own) / (t + 1) - 2 * mean
        j = jnp.argmin(jnp.where(taken, jnp.inf, change))
        column = kernel.gram(refs, _row(refs, j))[:, 0]
        return (among + column, taken.at[j].set(True)), j

    start = jnp.zeros_like(mean), empty
    return jax.lax.scan(add, start, jnp.arange(size, dtype=mean.dtype))[1]


def _thin(kernel, refs, size):
    gram = kernel.gram(refs, refs, same=True)
    mean, own = product(gram, refs.probabilities()), jnp.diagonal(gram)
    there = jnp.ones(refs.n, bool)

    def drop(carry, n):
        # MMD² without j: [A − 2 s_j + k_jj]/(n−1)² − 2 [B − μ_j]/(n−1)
        among, there = carry
        change = (own - 2 * among) / (n - 1) + 2 * mean
        j = jnp.argmin(jnp.where(there, change, jnp.inf))
        return (among - gram[:, j], there.at[j].set(False)), None

    counts = jnp.arange(refs.n, size, -1, dtype=gram.dtype)
    (_, there), _ = jax.lax.scan(drop, (gram.sum(1), there), counts)
    return jnp.nonzero(there, size=size)[0]


def _best_weights(kernel, refs, few):
    """argmin over the simplex of wᵀKw − 2wᵀμ, by accelerated projected gradient from equal weights."""
    gram, mean = kernel.gram(few, few, same=True), _mean_kernel(kernel, few, refs)
    step = 1 / jnp.abs(gram).sum(1).max()

    def loss(w):
        return product(product(w, gram), w) - 2 * product(w, mean)

    def one(carry, t):
        w, ahead = carry
        new = _on_simplex(ahead - step * (product(gram, ahead) - mean))
        new = jnp.where(loss(new) <= loss(w), new, w)  # never worse than before
        restarted = _on_simplex(w - step * (product(gram, w) - mean))
        new = jnp.where(loss(restarted) < loss(new), restarted, new)
        return (new, new + t / (t + 3) * (new - w)), None

    equal = jnp.full(few.n, 1 / few.n, mean.dtype)
    return jax.lax.scan(one, (equal, equal), jnp.arange(500, dtype=mean.dtype))[0][0]


def _on_simplex(v):
    """The nearest weights that are non-negative and sum to one.  Duchi et al. 2008, figure 1."""
    ordered = jnp.sort(v)[::-1]
    excess = (jnp.cumsum(ordered) - 1) / jnp.arange(1, v.size + 1)
    count = jnp.sum(ordered > excess)
    return jnp.maximum(v - excess[count - 1], 0.0)


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
        """What |k̂ − k| exceeds for any of so many pairs with at most this probability: √(2 log(2 pairs/δ)/F).

        Source: Hoeffding's inequality for a mean of F cosines, and the union bound.
        """
        return math.sqrt(2 * math.log(2 * pairs / failure) / self.frequencies.shape[0])

    def uniform_bound(self, diameter: float, bandwidth: float, failure: float = 0.05) -> float:
        """The same for all pairs in a set of this diameter, for an RBF: ε with 2⁸ (σℓ/ε)² exp(−Fε²/4(d + 2)) = δ.

        σ² = d/h². Above 2 it says nothing; F must be many times d. Source: Rahimi & Recht 2007, claim 1.
        """
        count, d = self.frequencies.shape
        low, high = 1e-6, 1e6
        for _ in range(200):
            e = math.sqrt(low * high)
            log_left = math.log(256 * d * (diameter / bandwidth / e) ** 2) - count * e**2 / (4 * (d + 2))
            low, high = (e, high) if log_left > math.log(failure) else (low, e)
        return high


def random_features(kernel: Any, key: Array, refs: Any, num: int) -> RandomFeatures:
    """Features whose inner products estimate a radial kernel.

    Args:
      kernel: RBF, Laplacian, IMQ or RationalQuadratic, a bandwidth of None taken from refs; of a tuple of bandwidths
        each frequency draws one.
      refs: Particles or an array [m, ...].
      num: F; the features are 2F.
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
    match kernel:
        case RBF():
            width = jnp.ones(num, dtype)
        case Laplacian():  # the spectrum is Cauchy's in d dimensions: normal over |normal|
            width = 1 / jnp.abs(jax.random.normal(key_width, (num,), dtype))
        case IMQ():  # (1 + r)^(−1/2) = E exp(−sr), s ~ Gamma(1/2)
            width = jnp.sqrt(2 * jax.random.gamma(key_width, 0.5, (num,), dtype))
        case RationalQuadratic(shape=shape):
            width = jnp.sqrt(jax.random.gamma(key_width, shape, (num,), dtype) / shape)
        case _:
            raise TypeError(
                f"{type(kernel).__name__} has no known spectrum; use RBF, Laplacian, IMQ or RationalQuadratic, "
                "or `nystroem`"
            )
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
      error: the MMD between references before and after the projection is at most this.
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


def nystroem(kernel: Any, refs: Any, landmarks: Any) -> Nystroem:
    """Features from the kernel's values at landmarks.

    Args:
      kernel: on samples, positive definite; a bandwidth of None is taken from refs.
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
        raise ValueError("Nyström features are of samples alone; give the kernel on x")
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
    """References as one vector of features: MMD² and its gradient at a cost that their number does not enter.

    Args:
      features: x [n, ...] -> φ [n, F], such as `random_features` or `nystroem` give.
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
        """∂MMD²/∂z_i / u_i, as `mmdjax.direction` has it with precondition "none"; descend it."""
        z = whole(as_particles(z, "z"))
        u = z.probabilities()
        phi, pull_back = jax.vjp(self.features, z.x)
        mean = product(u, phi)
        own = jnp.broadcast_to(mean, phi.shape)
        if self.estimator == "u":  # without the pair of a particle with itself
            own = (own - u[:, None] * phi) / pair_norm(u, "u")
        return pull_back((2 / phi.shape[1]) * (own - self.mean))[0]


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
