"""Kernels made of kernels, and the kernel of labels: Sum, Product, Mapped, Delta."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mmdjax._points.particles import Particles, wide_dtype
from mmdjax.kernels.contract import Kernel, as_kernel
from mmdjax.kernels.radial import Energy
from mmdjax.tree import as_component, pytree, replace


@pytree
class Sum(Kernel):
    """Σ_c weight_c k_c.

    Args:
      kernels: the terms.
      weights: one number each, default 1.

    Example:
      >>> from mmdjax import IMQ, RBF
      >>> p = Particles(jnp.zeros((1, 2)))
      >>> Sum(RBF(1.0), IMQ(1.0), weights=(1.0, 2.0))(p, p).tolist()
      [[3.0]]
    """

    kernels: Any
    weights: Any = None

    def __init__(self, *kernels: Any, weights: Any = None):
        if not kernels:
            raise ValueError("Sum needs at least one kernel")
        if weights is not None and len(weights) != len(kernels):
            raise ValueError(f"Sum has {len(kernels)} kernels and {len(weights)} weights; give one weight for each")
        object.__setattr__(self, "kernels", tuple(map(as_kernel, kernels)))
        object.__setattr__(self, "weights", (1.0,) * len(kernels) if weights is None else tuple(weights))

    @property
    def has_mass(self):
        return all(k.has_mass for k in self.kernels)

    @property
    def has_length(self):
        return all(k.has_length for k in self.kernels)

    @property
    def is_radial(self):
        return all(k.is_radial for k in self.kernels)

    def check_diffused(self):
        for k in self.kernels:
            k.check_diffused()

    @property
    def uses_cond(self):
        return any(k.uses_cond for k in self.kernels)

    @property
    def sees_cond(self):
        return any(k.sees_cond for k in self.kernels)

    def gram(self, a, b, *, same=False):
        return sum(w * k.gram(a, b, same=same) for w, k in zip(self.weights, self.kernels, strict=True))

    def gradient(self, a, b, coef, *, same=False, precondition="none"):
        terms = [
            k.gradient(a, b, w * coef, same=same, precondition=precondition)
            for w, k in zip(self.weights, self.kernels, strict=True)
        ]
        mass = sum(m for _, m in terms) if precondition == "mass" else terms[0][1]
        return jax.tree.map(lambda *g: sum(g), *[g for g, _ in terms]), mass

    def pair_weights(self, a, b, *, same=False):
        return sum(w * k.pair_weights(a, b, same=same) for w, k in zip(self.weights, self.kernels, strict=True))

    def distance2(self, a, b, *, same=False):
        return self.kernels[0].distance2(a, b, same=same)

    def map_radial(self, change):
        return replace(self, kernels=tuple(k.map_radial(change) for k in self.kernels))

    def widened(self, factor):
        return replace(self, kernels=tuple(k.widened(factor) for k in self.kernels))

    def diffused(self, level, size):
        among, fixed = zip(*(k.diffused(level, size) for k in self.kernels), strict=True)
        return Sum(*among, weights=self.weights), Sum(*fixed, weights=self.weights)

    def log_gram(self, a, b):
        logs = [jnp.log(w) + k.log_gram(a, b) for w, k in zip(self.weights, self.kernels, strict=True)]
        return jax.nn.logsumexp(jnp.stack(logs), axis=0)

    def reach(self):
        return sum(k.reach() for k in self.kernels) / len(self.kernels)

    def fit(self, refs):
        return replace(self, kernels=tuple(k.fit(refs) for k in self.kernels))

    def fit_factor(self, refs):
        return replace(self, kernels=tuple(k.fit_factor(refs) for k in self.kernels))

    def at_level(self, level):
        return replace(self, kernels=tuple(k.at_level(level) for k in self.kernels))

    def length2(self, a):
        raise ValueError("each component of a Sum has its own length; use a component, or precondition='none'")


@pytree
class Product(Kernel):
    """k((x, c), (x', c')) = k_x(x, x') k_c(c, c'): a sample is pulled only by references with a similar condition.

    Needs references with conditions, `Particles(x, cond=...)`, and `guided_sample(cond=...)`.

    Args:
      x: kernel on the samples.
      cond: kernel on the conditions (`Delta` for labels; for prompts see `mmdjax.sd.prompt_kernel`).

    Example:
      >>> from mmdjax import RBF
      >>> p = Particles(jnp.zeros((2, 3)), cond=jnp.array([0, 1]))
      >>> Product(x=RBF(1.0), cond=Delta())(p, p).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    x: Any
    cond: Any

    def __post_init__(self):
        object.__setattr__(self, "x", as_kernel(self.x))
        object.__setattr__(self, "cond", as_kernel(self.cond))

    @property
    def uses_cond(self):
        return True

    @property
    def splits_cond(self):
        return True

    @property
    def has_mass(self):
        return self.x.has_mass

    @property
    def has_length(self):
        return self.x.has_length

    @property
    def is_radial(self):
        return self.x.is_radial

    def check_diffused(self):
        self.x.check_diffused()

    def map_radial(self, change):
        return replace(self, x=self.x.map_radial(change))

    def widened(self, factor):
        return replace(self, x=self.x.widened(factor))

    def diffused(self, level, size):
        among, fixed = self.x.diffused(level, size)
        return Product(among, self.cond), Product(fixed, self.cond)

    def log_gram(self, a, b):
        of_x = self.x.log_gram(Particles(a.x), Particles(b.x))
        return of_x + self.cond.log_gram(Particles(a.cond), Particles(b.cond))

    def gram(self, a, b, *, same=False):
        return self._factor().gram(a, b, same=same) * self.cond_gram(a, b)

    def _factor(self):
        if isinstance(self.x, Energy) and self.x.origin is None:
            raise ValueError("Energy inside Product needs an origin, the references' mean; call kernel.fit(refs) first")
        return self.x

    def cond_gram(self, a: Particles, b: Particles) -> Array:
        """k_c alone."""
        if a.cond is None or b.cond is None:
            raise ValueError(
                "a Product kernel compares conditions, but these particles have none: Particles(x, cond=...)"
            )
        left = Particles(a.cond)
        return self.cond.gram(left, left if a.cond is b.cond else Particles(b.cond), same=a.cond is b.cond)

    def gradient(self, a, b, coef, *, same=False, precondition="none"):
        coef = coef * self.cond_gram(a, b)  # [n, m], held whole where the samples themselves are read in blocks
        return self._factor().gradient(a, b, coef, same=same, precondition=precondition)

    def pair_weights(self, a, b, *, same=False):
        return self._factor().pair_weights(a, b, same=same) * self.cond_gram(a, b)

    def distance2(self, a, b, *, same=False):
        return self.x.distance2(a, b, same=same)

    def reach(self):
        return self.x.reach()

    def fit(self, refs):
        if refs.cond is None:
            raise ValueError("a Product kernel compares conditions, but refs have none: Particles(x, cond=...)")
        fitted_cond = self.cond.fit_factor(Particles(refs.cond, weight=refs.weight))
        return replace(self, x=self.x.fit_factor(refs), cond=fitted_cond)

    def at_level(self, level):
        return replace(self, x=self.x.at_level(level))

    def length2(self, a):
        return self.x.length2(a)


@pytree
class Mapped(Kernel):
    """k(fn(x), fn(x')): compares features. Guidance needs precondition="length" or "none" with it.

    Args:
      fn: a batch of samples [n, ...] -> features [n, ...] (any pytree), differentiable. Make it once: another function
        compiles anew. At a noise level it gets noisy samples, and the kernel keeps its bandwidth.
      kernel: on the features.

    Example:
      >>> from mmdjax import Linear
      >>> p = Particles(jnp.ones((1, 4)))
      >>> Mapped(lambda x: x.mean(1), Linear())(p, p).tolist()
      [[1.0]]
    """

    fn: Any
    kernel: Any

    def __post_init__(self):
        object.__setattr__(self, "fn", as_component(self.fn))
        object.__setattr__(self, "kernel", as_kernel(self.kernel))

    @property
    def has_length(self):
        return self.kernel.has_length

    @property
    def uses_cond(self):
        return self.kernel.uses_cond

    @property
    def sees_cond(self):
        return self.kernel.sees_cond

    def gram(self, a, b, *, same=False):
        return self.kernel.gram(replace(a, x=self.fn(a.x)), replace(b, x=self.fn(b.x)), same=same)

    def gradient(self, a, b, coef, *, same=False, precondition="none"):
        if precondition == "mass":
            return super().gradient(a, b, coef, same=same, precondition=precondition)
        features, pull_back = jax.vjp(self.fn, a.x)
        gradient, one = self.kernel.gradient(
            replace(a, x=features), replace(b, x=self.fn(b.x)), coef, same=same, precondition=precondition
        )
        gradient = jax.tree.map(lambda g, f: g.astype(f.dtype), gradient, features)
        return pull_back(gradient)[0], one

    def widened(self, factor):
        return replace(self, kernel=self.kernel.widened(factor))

    def log_gram(self, a, b):
        return self.kernel.log_gram(*(replace(points, x=self.fn(points.x)) for points in (a, b)))

    def fit(self, refs):
        return replace(self, kernel=self.kernel.fit(replace(refs, x=self.fn(refs.x))))

    def fit_factor(self, refs):
        return replace(self, kernel=self.kernel.fit_factor(replace(refs, x=self.fn(refs.x))))

    def length2(self, a):
        return self.kernel.length2(replace(a, x=self.fn(a.x)))


@pytree
class Delta(Kernel):
    """1 where two samples are equal in every entry, else 0: for class labels as `cond`.

    Example:
      >>> labels = Particles(jnp.array([0, 3]))
      >>> Delta()(labels, labels).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    def gram(self, a, b, *, same=False):
        def equal(x, y):
            x, y = x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)
            return (x[:, None] == y[None]).all(-1)

        leaves = jax.tree.leaves(jax.tree.map(equal, a.x, b.x))
        return jnp.stack(leaves).all(0).astype(wide_dtype(a.x))
