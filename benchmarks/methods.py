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
    ClassifierGuided,
    fine_tune,
    likeliest_width,
    some_reference,
    train_classifier,
)
from common import as_particles
from scores import judge
from tasks import NUM_SAMPLES, NUM_STEPS, Task

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
    num_samples: int = NUM_SAMPLES, num_steps: int = NUM_STEPS, **more: Any,
) -> Any:  # fmt: skip
    """`guided_sample` on a task, with the samples' conditions."""
    cond = cond_of(task, num_samples)
    x = guided_sample(
        task.params if params is None else params,
        jax.random.key(seed),
        refs,
        model=task.model if model is None else model,
        num_samples=num_samples,
        cond=cond,
        guidance=guidance or MMDGuidance(),
        num_steps=num_steps,
        **more,
    ).x
    return Particles(x, cond)


def batches(task: Task, seed: int, refs: Any, size: int, count: int, *, remember: bool = True) -> Particles:
    """The default in small batches, each guided around those before it, or each on its own."""
    x = _batches(
        task.params, jax.random.key(seed), as_particles(refs), cond_of(task, size), default(task),
        model=task.model, size=size, count=count, remember=remember,
    )  # fmt: skip
    return Particles(x, None if task.cond is None else np.tile(cond_of(task, size), count))


@functools.partial(jax.jit, static_argnames=("size", "count", "remember"))
def _batches(params, key, refs, cond, guidance, *, model, size, count, remember):
    def one(memory, key):
        made = guided_sample(
            params, key, refs, model=model, num_samples=size, cond=cond, guidance=guidance, memory=memory,
            num_steps=NUM_STEPS,
        )  # fmt: skip
        return made.memory, made.x

    memory = Memory.empty(size * count, model.shape, cond) if remember else None
    return jax.lax.scan(one, memory, jax.random.split(key, count))[1].reshape(-1, *model.shape)


def cond_of(task: Task, num_samples: int) -> Any:
    """The conditions of a batch, in the proportions of the task's."""
    return None if task.cond is None else task.cond[np.arange(num_samples) * len(task.cond) // num_samples]


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
        task.params, jax.random.key(seed + 10_000), as_particles(refs), model=task.model, num_samples=NUM_SAMPLES,
        cond=task.cond, guidance=default(task),
    )  # fmt: skip
    return guided(task, seed, refs, made.guidance)


def _rule(task, refs, alpha):
    rule = MMDGuidance.paper(alpha)
    return with_conditions(task, rule, rule.kernel)


def _fine_tuned(task, seed, setting):
    rate, batch_size = setting
    refs = as_particles(judge(task, seed).draw.refs)
    refs = Particles(refs.x, refs.cond if task.cond is not None else None)
    params = fine_tune(task.params, jax.random.key(seed), refs, rate, model=task.model, batch_size=batch_size)
    return guided(task, seed, None, params=params)


def _sdedit(task, seed, t):
    first = some_reference(task, judge(task, seed).draw.refs, np.random.default_rng(seed))
    x_init = diffuse(jax.random.key(seed + 10_000), first, task.model.schedule(t))
    return guided(task, seed, None, x_init=x_init, times=np.linspace(t, 0, NUM_STEPS + 1))


def _noisy_references(task, seed, factor):
    refs, rng = judge(task, seed).draw.refs, np.random.default_rng(seed)
    x = some_reference(task, refs, rng)
    x = x + np.float32(factor * likeliest_width(refs)) * rng.normal(size=x.shape).astype(np.float32)
    return Particles(np.clip(x, -1, 1) if x.ndim == 4 else x, task.cond)


@functools.cache
def _classifier(task, seed, rate):
    refs = as_particles(judge(task, seed).draw.refs)
    refs = Particles(refs.x, refs.cond if task.cond is not None else None)
    return train_classifier(jax.random.key(seed), refs, unguided(task, seed), rate, model=task.model)


def _classifier_guided(task, seed, setting):
    rate, scale = setting
    model = DiffusionModel(ClassifierGuided(task.model.denoiser), task.model.schedule, task.model.shape)
    params = (task.params, _classifier(task, seed, rate), np.float32(scale))
    return guided(task, seed, None, model=model, params=params)


def _fine_tuning_rates(rates):
    return {f"rate {rate:g}, batch {batch}": (rate, batch) for rate in rates for batch in (16, 64)}


def methods(task: Task) -> dict[str, Method]:
    """All methods of a task, by the names that the tables have."""
    rates = (2e-4, 5e-4, 1e-3, 2e-3)
    if isinstance(task.params, Mixture):
        rates = (0.03, 0.1, 0.2, 0.4)
    elif task.costly:
        rates = (2e-5, 5e-5, 1e-4, 2e-4)
    widths = {"default": WIDTHS["default"]} if task.costly else WIDTHS
    found = {
        "fresh sample": _yardstick("fresh"),
        "references": _yardstick("refs"),
        "unguided": Method(lambda task, seed, _: unguided(task, seed)),
        RULE: _guidance(_rule, {f"α = {alpha:g}": alpha for alpha in ALPHAS}),
        DEFAULT: _guidance(lambda task, refs, _: default(task)),
        PLAIN: _guidance(lambda task, refs, _: MMDGuidance(), for_task=lambda task: task.kernel is not None),
    }
    found["as suggest_guidance chooses"] = Method(_suggested)
    for at in ("sample", "clean", "diffused"):
        found[f'at="{at}"'] = _guidance(lambda task, refs, _, at=at: default(task, at))
    found |= {
        "IMQ": _kernel(IMQ, widths),
        "RBF": _kernel(RBF, widths),
        "Laplacian": _kernel(Laplacian, widths),
        "RationalQuadratic": _kernel(RationalQuadratic, widths),
        "RBF of three widths": _kernel(lambda h: RBF((0.5 * h, h, 2 * h)), widths),
        "Energy": _guidance(lambda task, refs, _: with_conditions(task, MMDGuidance(kernel=Energy()), Energy())),
        TUNED: Method(_fine_tuned, _fine_tuning_rates(rates)),
        "SDEdit from references": Method(
            _sdedit, {f"t = {t:g}": t for t in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)}
        ),
        "references with noise": Method(
            _noisy_references, {f"{f:g} × likeliest width": f for f in (0.25, 0.5, 0.7, 1.0, 1.4, 2.0)}
        ),
        "classifier guidance": Method(
            _classifier_guided,
            {
                f"rate {rate:g}, scale {scale:g}": (rate, scale)
                for rate in (0.003, 0.01)
                for scale in (0.6, 0.8, 1.0, 1.4, 2.0)
            },
        ),
    }
    if task.costly:
        found = {name: method if name == RULE else method.thinned(2) for name, method in found.items()}
    return {name: method for name, method in found.items() if method.for_task(task)}
