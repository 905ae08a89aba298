"""`suggest_guidance`: bandwidth, placement and scale of the guidance, chosen by held-out references.

The references y_j are split into folds. Each candidate guides with all folds but one, from the same noise as every
other candidate. Its samples x are compared with the held-out fold, by MMD² of one fixed kernel k:

    score = Σ_j p_j h_j + E k(y, y'),    h_j = E k(x, x') − 2 E k(x, y_j),    x guided without the fold of y_j

without self-pairs, so that it is unbiased for samples guided by that many references. Two candidates are compared by
the mean of the paired differences of their h_j, and its standard error over the references.

Of some hundred random splits the one is taken whose folds differ from the rest as two samples of one distribution do on
average: with MMD²_u nearest to 0. With 20 references the scores of plain random folds vary 1.7 times as much as their
standard error says, and folds as alike as possible favour guidance where none is needed.

MMD² does not see copies: a batch that lies on its references in the right proportions scores well. So the samples'
distances to the nearest reference are compared with those of held-out references, too.

References:
  Breiman et al. 1984, section 3.4.3 (the one-standard-error rule). Gretton et al. 2012, eq. 3.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax._core.modes import in_own_modes
from mmdjax._core.numerics import product
from mmdjax._points.distances import squared_distance, subset, subset_of
from mmdjax._points.particles import Particles, as_particles, flat, widen
from mmdjax.calls import check_call
from mmdjax.denoisers import DiffusionModel
from mmdjax.guidance import MMDGuidance, check_guidance
from mmdjax.guidance.advice import Advisor
from mmdjax.guidance.bound import fit_kernel
from mmdjax.kernels import IMQ, Product
from mmdjax.mmd import pair_norm, self_term
from mmdjax.samplers import DDIM, Sampler
from mmdjax.sampling import sample_with
from mmdjax.tree import as_arrays, is_concrete, pytree, replace, static

# multiples of the bandwidth, placements, multiples of the scale: from 2 on a mass-preconditioned shift overshoots
VARIED = {"smoothness": (1.0, 1.5, 2.25, 0.75), "at": ("denoised", "sample"), "strength": (1.0, 0.5)}
COPIES, TYPICAL_COPIES, STRAYS = 0.8, 0.6, 1.5  # of the nearest ratio, its median, the ratio again
FEWEST = 10  # references that a choice can be made from
DRAWS = 200  # splits that one is taken of
UNGUIDED = "unguided"


@pytree
class Score:
    """The scores of a candidate.

    Args:
      guidance: the candidate.
      mmd2: held-out MMD², unbiased; it may be negative.
      excess: mmd2 minus that of the best eligible candidate; 0 for the best.
      error: standard error of `excess` over the references.
      ratio: mean distance of the samples to the nearest reference that guided them, divided by that of the held-out
        references: `mmdjax.metrics.nearest_ratio`.
      typical_ratio: the same with medians, which a few outliers do not change.
      label: the candidate in words.
    """

    guidance: MMDGuidance
    mmd2: Any
    excess: Any
    error: Any
    ratio: Any
    typical_ratio: Any
    label: str = static()


@pytree
class Suggestion:
    """What `suggest_guidance` returns; it prints as a table and the reason.

    Args:
      guidance: the chosen candidate; with scale 0 if guidance is not needed.
      scores: of each candidate in the order tried, unguided first; empty if nothing was tried.
      reason: why, in a sentence.
    """

    guidance: MMDGuidance
    scores: tuple[Score, ...]
    reason: str = static()

    def __repr__(self):
        if not self.scores:
            return self.reason
        width = max(len(score.label) for score in self.scores)
        lines = [f"{'':{width}}  held-out MMD²   above the best ± s.e.   nearest ratio   median"]
        for s in self.scores:
            excess = f"{s.excess:.2g} ± {s.error:.1g}"
            ratios = f"{s.ratio:13.2f}   {s.typical_ratio:6.2f}"
            lines.append(f"{s.label:{width}}  {s.mmd2:13.2g}   {excess:>21}   {ratios}")
        return "\n".join([*lines, self.reason])


@in_own_modes
def suggest_guidance(
    params: Any,
    key: Any,
    refs: Any,
    *,
    model: DiffusionModel,
    num_samples: int,
    cond: Any = None,
    guidance: MMDGuidance = MMDGuidance(),
    candidates: Sequence[MMDGuidance] | None = None,
    criterion: Any = None,
    sampler: Sampler = DDIM(eta=1.0),
    num_steps: int = 20,
    folds: int = 3,
    avoid: None = None,
) -> Suggestion:
    """Choose the bandwidth, placement and scale of the guidance by held-out references.

    A candidate's samples are compared with references that did not guide them; see the top of this module. Candidates
    have an order of preference: no guidance, the default, the others. A candidate is excluded if its samples copy the
    references (a ratio of nearest distances below .8, or of their medians below .6) or stray from them (above 1.5). Of
    the rest the first is chosen whose score is within a standard error of the best, so that the default stays unless
    the references speak against it. If all guided candidates are excluded, the least bad one remains.

    Without `candidates` three things are varied one after the other, each from the best so far: the bandwidth (× 1.5,
    2.25, .75), the placement ("denoised", "sample") and the scale (× .5). That is 7 candidates, each with a run of
    `num_steps` for each fold, and two compilations. With fewer than 10 references nothing is run, and the default is
    returned. Where no precondition is named, trials have "field" in place of "shrunk", which would leave out more with
    the references that a fold keeps than with all.

    Args:
      params, key, refs, model, cond, sampler: as in `guided_sample`; the default sampler is `DDPM()`, as DDIM(eta=1.0).
      num_samples: n. Give that of your later runs, as it affects how much a batch copies.
      guidance: the default, which is varied.
      candidates: the guidances to choose from instead, in order of preference.
      criterion: the kernel of the score. None: `IMQ()`, or if a candidate has a `Product` kernel, `IMQ()` times its
        kernel on conditions. A bandwidth of None is taken from the references.
      num_steps: steps of each run. Few suffice: a guidance means the same for any number.
      folds: how many parts the references are split into.
      avoid: not served, as held-out references do not show whether samples keep away from something.
    Returns:
      Suggestion: its `guidance` is the choice, printing it shows why.
    Raises:
      TypeError, ValueError: as `guided_sample`; an empty list of candidates; folds not in 2 … half of the references;
        a call inside `jit`, `vmap` or `grad`; something to avoid.
      FloatingPointError: the model's unguided samples are not finite.

    Example:
      >>> from mmdjax import IMQ, from_model
      >>> from mmdjax.schedules import VPLinear
      >>> shrink = from_model(lambda params, x, t, cond: params * x, "x0")
      >>> model = DiffusionModel(shrink, VPLinear(), (2,))
      >>> refs = 5.0 + jax.random.normal(jax.random.key(1), (12, 2))
      >>> one = MMDGuidance(kernel=IMQ(1.0), at="denoised")
      >>> suggestion = suggest_guidance(
      ...     0.5, jax.random.key(0), refs, model=model, num_samples=8, num_steps=5, candidates=[one])
      >>> print(suggestion.reason)
      Chosen: denoised, IMQ(1.0), scale 1; held-out MMD² ...

    Source: the one-standard-error rule, Breiman et al. 1984.
    """
    if avoid is not None:
        raise ValueError(
            "avoid is given, but candidates are compared by held-out references, which do not show whether samples "
            "keep away from something; leave avoid out here, and give it to guided_sample with the chosen guidance"
        )
    refs, cond = as_particles(refs), as_arrays("cond", cond)
    if candidates is not None and not (isinstance(candidates, Sequence) and candidates):
        raise ValueError(f"candidates is {candidates!r}; give a list of MMDGuidance, the preferred one first, or None")
    listed = [guidance] if candidates is None else candidates
    for candidate in listed:
        check_call(key, refs, model, num_samples, cond, candidate, sampler, None)
    if not is_concrete((params, key, refs, model, cond, listed)):
        raise ValueError("suggest_guidance compares values; there are none inside jit, vmap or grad: call it outside")
    advisor = Advisor()
    for candidate in listed:
        advisor.before(candidate, fit_kernel(candidate, refs), refs, cond, num_samples)

    p = np.asarray(refs.probabilities())
    present = np.flatnonzero(p)
    if len(present) < FEWEST:
        reason = f"{len(present)} references cannot decide, it takes {FEWEST}; {_label(listed[0])} is kept untried."
        return Suggestion(listed[0], (), reason)
    if not isinstance(folds, (int, np.integer)) or not 2 <= folds <= len(present) // 2:
        raise ValueError(f"folds is {folds}; {len(present)} references make from 2 to {len(present) // 2}")
    if criterion is None:
        conditions = [c.kernel.cond for c in listed if isinstance(c.kernel, Product)]
        criterion = Product(x=IMQ(), cond=conditions[0]) if conditions else IMQ()
    measure = MMDGuidance(kernel=criterion, precondition="none")
    check_guidance(measure, refs, cond)
    kernel = fit_kernel(measure, refs)

    wide = widen(jax.tree.map(jnp.asarray, refs))
    key_split, key_runs = jax.random.split(key)
    held = np.asarray(_split(key_split, kernel, wide, present, folds))
    kept = np.where(held, 0, p)  # weight 0, not fewer rows: the folds share one compilation
    distances = np.sum([fold * _nearest(wide, wide, keep) for fold, keep in zip(held, kept, strict=True)], axis=0)
    fresh = p @ distances, _median(distances, p)

    def attempt(candidate, label):
        whole = "field" if candidate.precondition is None and candidate.rule.weighs else candidate.precondition
        trial = replace(candidate, kernel=candidate.base_kernel, precondition=whole)  # a kernel of None compiles anew
        pull, distances, weights = np.zeros(refs.n), [], []
        for index, (fold, keep) in enumerate(zip(held, kept, strict=True)):
            x = sample_with(
                None,
                params,
                jax.random.fold_in(key_runs, index),
                replace(refs, weight=keep),
                model=model,
                num_samples=num_samples,
                cond=cond,
                guidance=trial,
                sampler=sampler,
                num_steps=num_steps,
            ).x
            x = widen(Particles(x, cond))
            pull[fold] = np.asarray(_pull(kernel, x, wide))[fold]
            distances.append(_nearest(x, wide, keep))
            weights.append(np.full(num_samples, p[fold].sum() / num_samples))
        near, weight = np.concatenate(distances), np.concatenate(weights)
        ratios = (
            a / b if b > 0 else np.inf for a, b in zip((weight @ near, _median(near, weight)), fresh, strict=True)
        )
        return _Trial(candidate, label, pull, *map(float, ratios))

    trials = [attempt(replace(listed[0], scale=0.0), UNGUIDED)]
    if not np.isfinite(trials[0].pull).all():
        raise FloatingPointError("the model's samples are not finite; guided_sample(..., checks=True) names the step")
    if candidates is None:
        trials = _search(trials, guidance, attempt, p)
    else:
        trials += [attempt(candidate, _label(candidate)) for candidate in candidates]
    chosen, best = _choose(trials, p)
    own = float(_own(kernel, wide))
    scores = tuple(
        Score(t.guidance, float(p @ t.pull) + own, *_excess(t, best, p), t.ratio, t.typical_ratio, t.label)
        for t in trials
    )
    return Suggestion(scores[chosen].guidance, scores, _reason(scores, chosen))


class _Trial(NamedTuple):
    guidance: MMDGuidance
    label: str
    pull: np.ndarray  # h, [m]
    ratio: float
    typical_ratio: float


def _search(trials, guidance, attempt, p):
    """The trials with those added that vary one thing after the other, each from the best so far."""
    settings, tried = {"smoothness": 1.0, "at": guidance.at, "strength": 1.0}, {}
    for name, values in VARIED.items():
        if name == "at" and guidance.precondition is not None and guidance.rule.weighs:
            continue  # it serves only "denoised"
        for value in values:
            varied = {**settings, name: value}
            candidate = _vary(guidance, **varied)
            label = _label(candidate)
            if label not in tried:
                tried[label] = varied
                trials = [*trials, attempt(candidate, label)]
        chosen, _ = _choose(trials, p)
        if chosen == 0:
            break
        settings = tried[trials[chosen].label]
    return trials


def _choose(trials, p):
    """Which of the trials is chosen, and the best one that it was compared with; the first is unguided."""
    finite = [i for i, t in enumerate(trials) if np.isfinite(t.pull).all()]
    eligible = [i for i in finite if _fault(trials[i]) <= 1]
    if not any(eligible):  # none that is guided
        eligible += sorted(finite[1:], key=lambda i: _fault(trials[i]))[:1]
    best = trials[min(eligible or [0], key=lambda i: p @ trials[i].pull)]
    return next((i for i in eligible if np.less_equal(*_excess(trials[i], best, p))), 0), best


def _copying(trial):
    # unguided samples have nothing to copy from
    if trial.label == UNGUIDED:
        return 0.0
    return max(COPIES / max(trial.ratio, 1e-9), TYPICAL_COPIES / max(trial.typical_ratio, 1e-9))


def _fault(trial):
    """At most 1 for samples that neither copy nor stray."""
    return max(_copying(trial), trial.ratio / STRAYS)


def _excess(trial, best, p):
    """How much higher a score is than the best, and the standard error of that."""
    difference = trial.pull - best.pull
    mean = p @ difference
    return float(mean), float(np.sqrt(p**2 @ (difference - mean) ** 2 / (1 - p @ p)))


def _median(values, weights):
    order = np.argsort(values)
    return np.asarray(values)[order][np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)]


def _vary(guidance, smoothness, at, strength):
    """The guidance with its bandwidths and its scale multiplied, at a placement."""
    moved = replace(guidance, at=at, scale=guidance.scale * strength)
    return moved if smoothness == 1 else replace(moved, kernel=moved.base_kernel.widened(smoothness))


def _label(guidance):
    kernel = re.sub(r"[a-z_]+=", "", repr(guidance.base_kernel))
    return f"{guidance.at}, {kernel}, scale {float(guidance.scale):g}"


def _reason(scores, chosen):
    """Why scores[chosen] was chosen."""
    unguided, first, it = scores[0], scores[1], scores[chosen]

    def above(score):
        return f"above the best by {score.excess:.2g} ± {score.error:.1g}" if score.excess else "the best"

    if chosen == 0 and not np.isfinite([score.mmd2 for score in scores[1:]]).any():
        return "Unguided, because no guided candidate's samples are finite."
    if chosen == 0:
        return (
            f"Guidance is not needed: unguided samples' held-out MMD² is {unguided.mmd2:.2g}, {above(unguided)}, and "
            f"their nearest ratio {unguided.ratio:.2f}."
        )
    ratios = f"nearest ratio {it.ratio:.2f}, median {it.typical_ratio:.2f}"
    what = f"Chosen: {it.label}; held-out MMD² {it.mmd2:.2g}, unguided {unguided.mmd2:.2g}; {ratios}."
    if _fault(it) > 1:
        why = "All candidates copy or stray, this one least; for copies, take more references or a smaller batch."
    elif chosen == 1:
        why = f"It is the preferred one, {above(it)}{', within a standard error' if it.excess else ''}."
    elif not np.isfinite(first.mmd2):
        why = f"The preferred one, {first.label}, is not finite."
    elif _fault(first) > 1:
        fault = "copies" if _copying(first) > 1 else "strays"
        ratios = f"nearest ratio {first.ratio:.2f}, median {first.typical_ratio:.2f}"
        why = f"The preferred one, {first.label}, {fault}: {ratios}."
    else:
        why = f"The preferred one, {first.label}, is {above(first)}."
    return f"{what} {why}"


@partial(jax.jit, static_argnames="folds")
def _split(key, kernel, refs, present, folds):
    """[folds, m] masks of the references held out."""
    n, rows, looked_at = refs.n, subset(refs.n, refs.weight), subset_of(refs)
    p = looked_at.probabilities()
    gram = kernel.gram(looked_at, looked_at, same=True)
    gram = jnp.where(jnp.eye(looked_at.n, dtype=bool), 0.0, gram)

    def deal(key):
        fold = jax.random.permutation(key, present.shape[0]) % folds
        return jnp.full(n, -1).at[present].set(fold) == jnp.arange(folds)[:, None]

    def mmd2(fold):
        u, v = (jnp.where(mask[rows], p, 0.0) for mask in (fold, ~fold))
        u, v = u / u.sum(), v / v.sum()
        within = sum(product(product(w, gram), w) / pair_norm(w, "u") for w in (u, v))
        return within - 2 * product(product(u, gram), v)

    keys = jax.random.split(key, DRAWS)
    differences = jax.lax.map(lambda key: jnp.abs(jax.vmap(mmd2)(deal(key))).sum(), keys)
    return deal(keys[differences.argmin()])


@jax.jit
def _own(kernel, refs):
    """E k(y, y'), on at most 2,000 references."""
    return self_term(kernel, subset_of(refs), "u")


@jax.jit
def _pull(kernel, x, refs):
    """h of each reference, [m]."""
    return self_term(kernel, x, "u") - 2 * product(x.probabilities(), kernel.gram(x, refs))


@jax.jit
def _nearest(points, refs, weight):
    """The distance of each point to the nearest reference of positive weight."""
    among = flat(refs.x)

    def nearest(row):
        d2 = squared_distance(row[None], among, accurate=True)[0]
        return jnp.sqrt(jnp.where(weight > 0, d2, jnp.inf).min())

    return jax.lax.map(nearest, flat(points.x))
