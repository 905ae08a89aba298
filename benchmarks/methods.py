"""The methods: guidance in its variants, what a user would do instead, and two yardsticks.

A method makes samples from (task, seed, setting). Where it has several settings, the one is reported that did best on
the seeds for choosing: the smallest mean energy among those whose memorisation ratio is at least .8 there.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from alternatives import (
    CLASSIFIER_BATCH,
    ClassifierGuided,
    Extrapolated,
    FollowTheMean,
    examples,
    fine_tune,
    likeliest_width,
    some_reference,
    train_classifier,
)
from common import as_particles
from scores import judge
from task import Task

from mmdjax import (
    IMQ,
    RBF,
    DiffusionModel,
    Energy,
    Laplacian,
    Memory,
    MMDGuidance,
    Particles,
    RationalQuadratic,
    guided_sample,
    suggest_guidance,
)
from mmdjax.guidance import default_kernel
from mmdjax.kernels import Median, NearestNeighbour
from mmdjax.mixtures import Mixture
from mmdjax.schedules import diffuse
from mmdjax.tree import replace

DEFAULT, RULE, TUNED = "MMDGuidance()", "the authors' rule", "fine-tuning"
FOLLOW, LOW_RANK, EXTRAPOLATED = "follow the mean", "LoRA", "fine-tuning, extrapolated"
SDEDIT, NOISE, CLASSIFIER = "SDEdit from references", "references with noise", "classifier guidance"
ALTERNATIVES = (RULE, FOLLOW, TUNED, LOW_RANK, EXTRAPOLATED, SDEDIT, NOISE, CLASSIFIER)
PLAIN = "MMDGuidance(), kernel without conditions"
ALPHAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WIDTHS = {
    "default": IMQ().default_rule(),
    "nearest": NearestNeighbour(1.0),
    "0.3 median": Median(0.3),
    "median": Median(1.0),
}


@dataclass(frozen=True)
class Method:
    """A way to make samples.

    Args:
      run: (task, seed, setting) -> samples.
      settings: what is tried, by name; one that stands alone is not chosen.
      for_task: whether a task can have it.
    """

    run: Callable[[Task, int, Any], Any]
    settings: dict[str, Any] = field(default_factory=lambda: {"": None})
    for_task: Callable[[Task], bool] = lambda task: True

    def thinned(self, keep: int) -> "Method":
        """With one in `keep` of its settings."""
        return dataclasses.replace(self, settings=dict([*self.settings.items()][::keep]))


def guided(
    task: Task, seed: int, refs: Any, guidance: MMDGuidance | None = None, *, model: Any = None, params: Any = None,
    num_samples: int | None = None, num_steps: int | None = None, **more: Any,
) -> Any:  # fmt: skip
    """`guided_sample` on a task, with the samples' conditions."""
    num_samples = num_samples or task.num_samples
    cond = cond_of(task, num_samples)
    if "times" not in more:
        more["num_steps"] = num_steps or task.num_steps
    x = guided_sample(
        task.params if params is None else params,
        jax.random.key(seed),
        refs,
        model=task.model if model is None else model,
        num_samples=num_samples,
        cond=cond,
        guidance=guidance or MMDGuidance(),
        **more,
    ).x
    return Particles(x, cond)


def batches(task: Task, seed: int, refs: Any, size: int, count: int, *, remember: bool = True) -> Particles:
    """The default in small batches, each guided around those before it, or each on its own."""
    x = _batches(
        task.params, jax.random.key(seed), as_particles(refs), cond_of(task, size), default(task),
        model=task.model, size=size, count=count, num_steps=task.num_steps, remember=remember,
    )  # fmt: skip
    return Particles(x, None if task.cond is None else np.tile(cond_of(task, size), count))


@functools.partial(jax.jit, static_argnames=("size", "count", "num_steps", "remember"))
def _batches(params, key, refs, cond, guidance, *, model, size, count, num_steps, remember):
    def one(memory, key):
        made = guided_sample(
            params, key, refs, model=model, num_samples=size, cond=cond, guidance=guidance, memory=memory,
            num_steps=num_steps,
        )  # fmt: skip
        return made.memory, made.x

    memory = Memory.empty(size * count, model.shape, cond) if remember else None
    return jax.lax.scan(one, memory, jax.random.split(key, count))[1].reshape(-1, *model.shape)


def cond_of(task: Task, num_samples: int) -> Any:
    """The conditions of a batch, in the proportions of the task's."""
    rows = np.arange(num_samples) * task.num_samples // num_samples
    return jax.tree.map(lambda leaf: leaf[rows], task.cond)


def default(task: Task, at: str = "denoised") -> MMDGuidance:
    """The untouched guidance at a placement; its kernel times one of the conditions where there are some."""
    return with_conditions(task, MMDGuidance(at=at), default_kernel(at))


def with_conditions(task: Task, guidance: MMDGuidance, kernel: Any) -> MMDGuidance:
    """The guidance as it is, or its kernel, made a product, where the task has conditions."""
    return guidance if task.kernel is None else replace(guidance, kernel=replace(task.kernel, x=kernel))


@functools.cache
def unguided(task: Task, seed: int) -> Any:
    """The prior's samples."""
    return guided(task, seed, None)


def _yardstick(part: str) -> Method:
    return Method(lambda task, seed, _: getattr(judge(task, seed).draw, part))


def _guidance(make: Callable[[Task, Any, Any], MMDGuidance], *settings: Any, **more: Any) -> Method:
    # make: (task, refs, setting) -> guidance
    def run(task, seed, setting):
        refs = judge(task, seed).draw.refs
        return guided(task, seed, refs, make(task, refs, setting))

    return Method(run, *settings, **more)


def _kernel(make: Callable[[Any], Any], widths: dict[str, Any]) -> Method:
    # make: width -> kernel; the width is a number, so that all widths share one compiled sampler
    def guidance(task, refs, rule):
        kernel = make(rule(Particles(as_particles(refs).x)))
        return with_conditions(task, MMDGuidance(kernel=kernel), kernel)

    return _guidance(guidance, widths)


def _suggested(task, seed, _):
    refs = judge(task, seed).draw.refs
    made = suggest_guidance(
        task.params, jax.random.key(seed + 10_000), as_particles(refs), model=task.model, num_samples=task.num_samples,
        cond=task.cond, guidance=default(task),
    )  # fmt: skip
    return guided(task, seed, refs, made.guidance)


def _rule(task, refs, alpha):
    rule = MMDGuidance.paper(alpha)
    return with_conditions(task, rule, rule.kernel)


def _refs_to_learn(task, seed):
    refs = as_particles(judge(task, seed).draw.refs)
    return Particles(refs.x, None if task.cond is None else refs.cond)


@functools.cache
def _tuned(task, seed, rate, batch_size, low_rank=False, share=1.0):
    return fine_tune(
        task.params, jax.random.key(seed), _refs_to_learn(task, seed), rate, model=task.model, batch_size=batch_size,
        num_examples=int(share * examples(task)), low_rank=low_rank,
    )  # fmt: skip


def _fine_tuned(task, seed, setting):
    return guided(task, seed, None, params=_tuned(task, seed, *setting))


def _low_rank(task, seed, rate):
    return guided(task, seed, None, params=_tuned(task, seed, rate, 16, low_rank=True))


def _extrapolated(task, seed, setting):
    # two networks a step: half the training and three quarters of the steps make the same compute
    rate, w = setting
    model = DiffusionModel(Extrapolated(task.model.denoiser), task.model.schedule, task.model.shape)
    params = (task.params, _tuned(task, seed, rate, 16, share=0.5), np.float32(w))
    return guided(task, seed, None, model=model, params=params, num_steps=3 * task.num_steps // 4)


def _follow(task, seed, beta):
    model = DiffusionModel(FollowTheMean(task.model.denoiser), task.model.schedule, task.model.shape)
    refs = as_particles(judge(task, seed).draw.refs)
    return guided(task, seed, None, model=model, params=(task.params, Particles(refs.x, refs.cond), np.float32(beta)))


def _sdedit(task, seed, t):
    first = some_reference(task, judge(task, seed).draw.refs, np.random.default_rng(seed))
    x_init = diffuse(jax.random.key(seed + 10_000), first, task.model.schedule(t))
    return guided(task, seed, None, x_init=x_init, times=np.linspace(t, 0, task.num_steps + 1))


def _noisy_references(task, seed, factor):
    refs, rng = judge(task, seed).draw.refs, np.random.default_rng(seed)
    x = some_reference(task, refs, rng)
    x = x + np.float32(factor * likeliest_width(refs)) * rng.normal(size=x.shape).astype(np.float32)
    images = x.ndim == 4 and task.show is None
    return Particles(np.clip(x, -1, 1) if images else x, task.cond)


@functools.cache
def _classifier(task, seed, rate):
    steps = 10 * examples(task) // (2 * CLASSIFIER_BATCH)
    refs = _refs_to_learn(task, seed)
    return train_classifier(jax.random.key(seed), refs, unguided(task, seed), rate, steps, model=task.model)


def _classifier_guided(task, seed, setting):
    rate, scale = setting
    model = DiffusionModel(ClassifierGuided(task.model.denoiser), task.model.schedule, task.model.shape)
    params = (task.params, _classifier(task, seed, rate), np.float32(scale))
    return guided(task, seed, None, model=model, params=params)


def methods(task: Task) -> dict[str, Method]:
    """All methods of a task, by the names that the tables have."""
    every = task.methods == "all"
    found = {
        "fresh sample": _yardstick("fresh"),
        "references": _yardstick("refs"),
        "unguided": Method(lambda task, seed, _: unguided(task, seed)),
        RULE: _guidance(_rule, {f"α = {alpha:g}": alpha for alpha in (ALPHAS if every else ALPHAS[2:6])}),
        DEFAULT: _guidance(lambda task, refs, _: default(task)),
        PLAIN: _guidance(lambda task, refs, _: MMDGuidance(), for_task=lambda task: task.kernel is not None),
    }
    if every:
        found["as suggest_guidance chooses"] = Method(_suggested)
        for at in ("sample", "clean", "diffused"):
            found[f'at="{at}"'] = _guidance(lambda task, refs, _, at=at: default(task, at))
        found |= _kernels()
    found[FOLLOW] = Method(_follow, {f"β = {beta:g}": beta for beta in (0.1, 0.2, 0.4, 0.7)})
    found |= _trained(task)
    times = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6) if every else (0.2, 0.4, 0.6)
    found[SDEDIT] = Method(_sdedit, {f"t = {t:g}": t for t in times})
    factors = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0)
    found[NOISE] = Method(_noisy_references, {f"{f:g} × likeliest width": f for f in factors})
    return {name: method for name, method in found.items() if method.for_task(task)}


def _kernels():
    return {
        "IMQ": _kernel(IMQ, WIDTHS),
        "RBF": _kernel(RBF, WIDTHS),
        "Laplacian": _kernel(Laplacian, WIDTHS),
        "RationalQuadratic": _kernel(RationalQuadratic, WIDTHS),
        "RBF of three widths": _kernel(lambda h: RBF((0.5 * h, h, 2 * h)), WIDTHS),
        "Energy": _guidance(lambda task, refs, _: with_conditions(task, MMDGuidance(kernel=Energy()), Energy())),
    }


def _trained(task):
    if task.methods == "few":
        return {}
    if task.methods == "network":
        pairs = ((5e-4, 1.5), (5e-4, 2.0))
        return {
            TUNED: Method(_fine_tuned, {f"rate {rate:g}, batch 16": (rate, 16) for rate in (5e-4, 1e-3)}),
            LOW_RANK: Method(_low_rank, {f"rate {rate:g}": rate for rate in (3e-3, 1e-2)}),
            EXTRAPOLATED: Method(_extrapolated, {f"rate {rate:g}, w = {w:g}": (rate, w) for rate, w in pairs}),
        }
    rates = (0.03, 0.1, 0.2, 0.4) if isinstance(task.params, Mixture) else (2e-4, 5e-4, 1e-3, 2e-3)
    pairs = [(rate, scale) for rate in (0.003, 0.01) for scale in (0.6, 0.8, 1.0, 1.4, 2.0)]
    return {
        TUNED: Method(_fine_tuned, {f"rate {rate:g}, batch {n}": (rate, n) for rate in rates for n in (16, 64)}),
        CLASSIFIER: Method(_classifier_guided, {f"rate {rate:g}, scale {w:g}": (rate, w) for rate, w in pairs}),
    }
