"""What one would do with references in place of MMD Guidance: other guidance, or more training.

Compute is counted in calls of the denoiser on one sample. Guided sampling makes one a step of each; training gets as
many again on top of its own sampling, an example counting 3 (forward and backward). The classifier has a tenth of the
digits network's parameters, so its examples count a tenth; the unguided samples that it learns from are not counted.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import as_particles
from scipy.special import logsumexp
from task import Task

from mmdjax import DiffusionModel, Particles
from mmdjax.digits.network import fourier
from mmdjax.schedules import diffuse
from mmdjax.training import UniformTimes, denoising_loss
from mmdjax.tree import pytree

RANK = 4  # of what LoRA adds to a matrix
ADAM = optax.adam(1.0)
CLASSIFIER_BATCH = 32  # references, and as many generated


def _descend(loss, params, state, key, i, num_steps, rate):
    # step i of Adam, its rate falling to 0
    updates, state = ADAM.update(jax.grad(loss)(params, jax.random.fold_in(key, i)), state)
    shrink = rate * (1 - i / num_steps)
    return optax.apply_updates(params, jax.tree.map(lambda u: shrink * u, updates)), state


def examples(task: Task) -> int:
    """How many references training sees, with repetition, for as many calls as sampling makes."""
    return task.num_samples * task.num_steps // 3


def fine_tune(
    params: Any, key: Any, refs: Particles, rate: Any, *, model: DiffusionModel, batch_size: int, num_examples: int,
    low_rank: bool = False,
) -> Any:  # fmt: skip
    """The parameters after so many references, drawn with replacement, under the denoising loss.

    Args:
      low_rank: learn what LoRA does, arXiv 2106.09685: a matrix of rank 4 on top of each.
    """
    params = jax.tree.map(jnp.asarray, params)
    trained = low_rank_parts(params, key) if low_rank else params
    base = params if low_rank else None
    state, num_steps = ADAM.init(trained), num_examples // batch_size
    for i in range(num_steps):  # in a compiled loop, gradients of convolutions are slow on CPU
        trained, state = _tune(trained, state, key, i, num_steps, refs, rate, base, model=model, batch_size=batch_size)
    return _merged(trained, base)


@functools.partial(jax.jit, static_argnames="batch_size")
def _tune(trained, state, key, i, num_steps, refs, rate, base, *, model, batch_size):
    def loss(trained, key):
        key_rows, key_loss = jax.random.split(key)
        rows = jax.random.randint(key_rows, (batch_size,), 0, refs.n)
        x, cond = jax.tree.map(lambda leaf: leaf[rows], (refs.x, refs.cond))
        return denoising_loss(_merged(trained, base), key_loss, x, cond, model=model)

    return _descend(loss, trained, state, key, i, num_steps, rate)


def low_rank_parts(params: Any, key: Any) -> list[tuple[Any, Any] | None]:
    """For each leaf with two axes or more, (a [inputs, 4], b [4, outputs]), whose product is 0; None for the others."""
    parts = []
    for i, leaf in enumerate(jax.tree.leaves(params)):
        rows, columns = (leaf.size // max(leaf.shape[-1], 1), leaf.shape[-1]) if leaf.ndim > 1 else (0, 0)
        if min(rows, columns) <= RANK:
            parts.append(None)
            continue
        a = jax.random.normal(jax.random.fold_in(key, i), (rows, RANK)) / np.sqrt(rows)
        parts.append((a, jnp.zeros((RANK, columns))))
    return parts


def _merged(trained, base):
    # the parameters; trained is them all, or what is added to `base`
    if base is None:
        return trained
    leaves, structure = jax.tree.flatten(base)
    added = [
        leaf if ab is None else leaf + (ab[0] @ ab[1]).reshape(leaf.shape)
        for leaf, ab in zip(leaves, trained, strict=True)
    ]
    return structure.unflatten(added)


@pytree
class Extrapolated:
    """D_tuned + (w − 1) (D_tuned − D_prior): guidance by the prior.  Domain Guidance, arXiv 2504.01521."""

    denoiser: Any

    def __call__(self, params, x, level, cond):
        prior, tuned, w = params
        before, after = (self.denoiser(each, x, level, cond) for each in (prior, tuned))
        return after + (w - 1) * (after - before)


@pytree
class FollowTheMean:
    """(1 − β) x̂0 + β Σ_j w_j y_j, w = softmax(−|x − α y_j|²/2σ²).  arXiv 2605.10302.

    With conditions, only references of the sample's own condition count.
    """

    denoiser: Any

    def __call__(self, params, x, level, cond):
        prior, refs, beta = params
        d2 = jnp.sum((_flat(x)[:, None] - level.alpha * _flat(refs.x)[None]) ** 2, axis=-1)
        own = True if cond is None else _same(cond, refs.cond)
        weight = jax.nn.softmax(jnp.where(own, -d2 / (2 * level.sigma**2), -jnp.inf), axis=1)
        mean = (weight @ _flat(refs.x)).reshape(x.shape)
        return (1 - beta) * self.denoiser(prior, x, level, cond) + beta * mean


def _same(cond, other):
    # which conditions are equal [n, m]; the group says it where there is one
    cond, other = (c["group"] if isinstance(c, dict) else c for c in (cond, other))
    return (cond.reshape(len(cond), 1, -1) == other.reshape(1, len(other), -1)).all(-1)


class Classifier(nn.Module):
    """log p(reference | x_t) / p(generated | x_t), by time and class."""

    width: int = 128

    @nn.compact
    def __call__(self, x, t, cond):
        n = x.shape[0]
        h = [x.reshape(n, -1), fourier(jnp.broadcast_to(t, (n,)), 32)]
        h = jnp.concatenate(h if cond is None else [*h, jax.nn.one_hot(cond, 10)], axis=1)
        for _ in range(3):
            h = nn.silu(nn.Dense(self.width)(h))
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(h)[:, 0]


def _logit(weights, x, level, cond):
    size = jnp.sqrt((level.alpha * weights["spread"]) ** 2 + level.sigma**2)
    return Classifier().apply(weights["network"], x / _per_sample(size, x), level.t, cond)


@jax.jit
def train_classifier(
    key: Any, refs: Particles, generated: Particles, rate: Any, num_steps: Any, *, model: DiffusionModel
) -> Any:
    """The weights after so many steps, half of their examples references, noised as in training a denoiser."""
    spread = jnp.sqrt(jnp.mean(jnp.concatenate([_flat(refs.x), _flat(generated.x)]) ** 2))
    key_init, key_steps = jax.random.split(key)
    network = Classifier().init(key_init, refs.x[:1], jnp.zeros(1), jax.tree.map(lambda c: c[:1], refs.cond))

    def loss(network, key):
        key_rows, key_times, key_noise = jax.random.split(key, 3)
        level = jax.vmap(model.schedule)(UniformTimes()(key_times, CLASSIFIER_BATCH))
        losses = []
        for sign, points in ((1, refs), (-1, generated)):
            rows = jax.random.randint(jax.random.fold_in(key_rows, sign + 1), (CLASSIFIER_BATCH,), 0, points.n)
            x = diffuse(jax.random.fold_in(key_noise, sign + 1), points.x[rows], level)
            cond = jax.tree.map(lambda leaf, rows=rows: leaf[rows], points.cond)
            weights = {"network": network, "spread": spread}
            losses.append(jax.nn.softplus(-sign * _logit(weights, x, level, cond)).mean())
        return sum(losses)

    step = lambda i, carry: _descend(loss, *carry, key_steps, i, num_steps, rate)
    network, _ = jax.lax.fori_loop(0, num_steps, step, (network, ADAM.init(network)))
    return {"network": network, "spread": spread}


@pytree
class ClassifierGuided:
    """x̂0 + scale σ²/α ∇_x log p(reference | x_t)/p(generated | x_t).  Dhariwal & Nichol 2021, with a ratio."""

    denoiser: Any

    def __call__(self, params, x, level, cond):
        prior, weights, scale = params
        slope = jax.grad(lambda x: _logit(weights, x, level, cond).sum())(x)
        return self.denoiser(prior, x, level, cond) + _per_sample(scale * level.sigma**2 / level.alpha, x) * slope


def some_reference(task: Task, refs: Any, rng: Any) -> np.ndarray:
    """A reference for each sample, of the sample's group; all as often as can be."""
    refs, groups = as_particles(refs), task.groups(task.cond)
    if groups is None:
        return np.asarray(refs.x)[rng.permutation(np.resize(np.arange(refs.n), task.num_samples))]
    rows, theirs = np.empty(task.num_samples, int), task.groups(refs.cond)
    for c in np.unique(groups):
        mine = np.flatnonzero(groups == c)
        rows[mine] = rng.permutation(np.resize(np.flatnonzero(theirs == c), len(mine)))
    return np.asarray(refs.x)[rows]


def likeliest_width(refs: Any) -> float:
    """The width of a Gaussian kernel density estimate under which each reference is likeliest given the others."""
    x = np.asarray(_flat(as_particles(refs).x), np.float64)
    m, d = x.shape
    d2 = ((x[:, None] - x[None]) ** 2).sum(-1)
    np.fill_diagonal(d2, np.inf)
    widths = np.geomspace(0.1 * np.sqrt(np.median(d2.min(1)) / d), x.std(), 100)
    return float(max(widths, key=lambda h: logsumexp(-d2 / (2 * h**2), axis=1).sum() - m * d * np.log(h)))


def _flat(x):
    return x.reshape(len(x), -1)


def _per_sample(v, x):
    """v [n], to be multiplied with x [n, ...]."""
    return v.reshape(-1, *(1,) * (x.ndim - 1))
