"""What users are told at run time: that guidance will not do what it is meant to, why, and what to do.

Everything is a `GuidanceWarning`, said once a call, from values that the call has anyway; inside `jit` there are none.
Each function here returns the message, or None where all is well; `Advisor` says them.

    before a run    the scale, the number of references, conditions that no reference has, a sample on its own
    after it        a kernel that reaches no reference, references that are hardly followed, or in another range than
                    the model's samples

Thresholds come from benchmarks/README.md. With "field" and 20 references for 100 or 200 samples the memorisation ratio
is below .8 on 17 of 19 tasks, and where changing nothing is right the energy distance rises by .16 to .36; with 50
references it is below .8 on three, and rises by .03 to .12. With "shrunk" and 20 references it is below .8 on three of
16, and rises by .01 to .18. A mean-shift step overshoots from a scale of about 2 on.
"""

import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax._points.distances import subset_of
from mmdjax._points.particles import Particles, effective_number, flat, num_present, whole
from mmdjax.guidance import MMDGuidance
from mmdjax.guidance.bound import weighs
from mmdjax.guidance.placements import Placement
from mmdjax.guidance.shrunk import Shrunk
from mmdjax.kernels import Kernel
from mmdjax.memory import Memory
from mmdjax.tree import is_concrete, shown

FEW, FEWEST, TIMES = 50, 10, 4  # references, those for "shrunk", and samples for each
STRONG, FAINT = 3.0, 1e-3  # scales of whole steps above it; those below it, which may not move a sample visibly
NONE = 1e-6  # of a condition's likeness to itself: like no other
UNMOVED = 0.05  # of the samples, if no more of them were moved
LITTLE = 0.2  # of a shift, if no more of any was made
UNIT = 1.5  # pictures in [−1, 1] do not reach further, nor does x̂0 of an imperfect model
LOOKED_AT = 256  # references, for their range
SHOWN = 5  # conditions

JOIN = (
    'under jax.vmap(..., axis_name="batch") or shard_map give axis_name="batch", which guides the samples of all calls '
    "together"
)
REMEMBER = "give a memory, which guides it around those that were made before"
MORE = "make more samples in a call"


class GuidanceWarning(UserWarning):
    """Guidance will not do what it is meant to; the message names the value and the remedy.

    It is given once a call: where a sample is guided alone; and, outside of `jit`, where references are few for the
    samples, hardly followed, in another range, or missing; no reference has a sample's condition; the scale is below 0
    or above 3; or the kernel is so narrow that it reaches no reference. Silence all of them by

      >>> import warnings
      >>> from mmdjax import GuidanceWarning
      >>> warnings.filterwarnings("ignore", category=GuidanceWarning)
    """


class Advisor:
    """Says each kind of thing once: one for each call of the user's.

    Args:
      together: how many samples are guided together, those that are remembered counted; None: as a call has.
    """

    def __init__(self, together: int | None = None):
        self.together, self._said = together, set()

    def say(self, kind: Any, message: str | None) -> None:
        """Warn, unless all is well (None) or something of the kind was said."""
        if message is not None and kind not in self._said:
            self._said.add(kind)
            warn(message)

    def before(
        self, guidance: MMDGuidance, kernel: Kernel | None, refs: Particles | None, cond: Any, num_samples: int | None,
        memory: Memory | None = None, avoid: Any = None,
    ) -> None:  # fmt: skip
        """What the arguments tell; `num_samples` None: not known."""
        if refs is None or kernel is None or (is_concrete(guidance.scale) and not np.any(guidance.scale)):
            return
        self.say(of_scale, of_scale(guidance))
        self.say(of_conditions, of_conditions(kernel, refs, cond))
        if num_samples is not None:
            self.number(guidance, kernel, refs, num_samples, None if memory is None else memory.particles, avoid)

    def number(
        self, guidance: MMDGuidance, kernel: Kernel, refs: Particles, num_samples: int, memory: Particles | None,
        avoid: Any = None,
    ) -> None:  # fmt: skip
        """Few references for the samples, those that are remembered counted."""
        together = self.together
        if together is None and is_concrete(memory):
            together = num_samples + (0 if memory is None else num_present(memory))
        if together is not None:
            self.say(of_number, of_number(guidance, kernel, refs, together, num_samples, avoid))

    def alone(self, num_samples: int, *remedies: str) -> None:
        """A sample that is guided as if it were a whole batch."""
        self.say(of_one, of_one(num_samples, *remedies))

    def reach(self, guidance: MMDGuidance, kernel: Kernel, moved: Any) -> None:
        """What the samples' moves have shown."""
        if of_conditions not in self._said:  # which may be why nothing moved
            self.say(of_reach, of_reach(guidance, kernel, np.asarray(moved)))

    def part(self, guidance: MMDGuidance, refs: Particles, part: Any) -> None:
        """How much of the shifts was made."""
        if is_concrete(refs.weight):
            self.say(of_part, of_part(guidance, round(float(effective_number(refs))), np.asarray(part)))

    def range(self, name: str, points: Particles, low: Any, high: Any) -> None:
        """What x̂0 has shown beside references, or samples to avoid, of that name."""
        self.say((of_range, name), of_range(name, points, np.asarray(low), np.asarray(high)))


def warn(message: str) -> None:
    """A `GuidanceWarning` that points at the line of the user's that called this library."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "mmdjax":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, GuidanceWarning, stacklevel=level)


def of_one(num_samples: int, *remedies: str) -> str | None:
    """A sample that is guided as if it were a whole batch."""
    if num_samples != 1:
        return None
    return (
        f"one sample is guided as if it were the whole batch, towards where most references are; {MORE}, or "
        + ", or ".join(remedies)
    )


def of_scale(guidance: MMDGuidance) -> str | None:
    """A scale below 0; or above 3, where 1 is a whole step."""
    scale = guidance.scale
    if not is_concrete(scale) or np.ndim(scale) > 0:
        return None
    scale = float(scale)
    if scale < 0:
        return (
            f"scale is {scale:g}, which drives samples away from the references; give a scale above 0, or samples to "
            "keep away from as avoid"
        )
    if scale <= STRONG:
        return None
    if guidance.published:
        return f"alpha is {scale:g}: each step moves a sample by {scale:g} times its own norm; the paper has 0.002"
    if guidance.rule.needs != "mass":  # its scale is found by trial
        return None
    return f"scale is {scale:g}, and 1 is a whole step to the references: larger ones overshoot; give 1 or less"


def of_number(
    guidance: MMDGuidance, kernel: Kernel, refs: Particles, together: int, at_once: int, avoid: Any = None
) -> str | None:
    """Few references for the samples that are guided together, of which so many are made at once."""
    if not is_concrete(refs.weight):
        return None
    count = round(float(effective_number(refs)))
    enough = TIMES * count  # samples
    careful = isinstance(guidance.rule, Shrunk) and weighs(guidance, kernel, refs, avoid) and at_once >= enough
    if count >= (FEWEST if careful else FEW) or together < enough:
        return None
    said = f"{count} references for {together} samples: "
    if careful:
        return f"{said}so few show little of what they are drawn from; give {2 * FEWEST} or more"
    can = kernel.has_mass and not kernel.uses_cond and avoid is None
    larger = "" if at_once >= enough else f" and {enough} samples at once"
    shrunk = f', or precondition="shrunk" with at="denoised"{larger}' if can else ""
    return f"{said}these gather around so few, and take on their accidents; give {FEW} or more{shrunk}"


def of_conditions(kernel: Kernel, refs: Particles, cond: Any) -> str | None:
    """Conditions that no reference has, or one like it."""
    if not kernel.splits_cond or cond is None or refs.cond is None:
        return None
    if not is_concrete((kernel, refs.cond, refs.weight, cond)):
        return None
    lacks = np.flatnonzero(np.asarray(_lacks(*whole((kernel, cond, refs.cond, refs.weight)))))
    if not lacks.size:
        return None
    count = len(jax.tree.leaves(cond)[0])
    return (
        f"no reference has {_named(cond, lacks)}, or one like it, so that nothing pulls {lacks.size} of the {count} "
        "samples; give references that do, or a kernel on x alone"
    )


@jax.jit
def _lacks(kernel, cond, refs_cond, weight):
    points, refs = Particles(None, cond), Particles(None, refs_cond)
    alike = jnp.abs(kernel.cond_gram(points, refs))
    alike = alike if weight is None else jnp.where(jnp.asarray(weight) > 0, alike, 0.0)
    itself = jnp.diagonal(jnp.abs(kernel.cond_gram(points, points)))
    return alike.max(1) < NONE * itself


def _named(cond: Any, rows: np.ndarray) -> str:
    """The conditions of some samples, if they are short; else the numbers of these samples."""
    leaves = jax.tree.leaves(cond)
    if len(leaves) == 1 and np.size(leaves[0][0]) <= SHOWN:
        values, name = np.unique(np.asarray(leaves[0][rows]), axis=0).tolist(), "cond"
    else:
        values, name = rows.tolist(), "the condition of sample"
    more = f", … {len(values)} in all" if len(values) > SHOWN else ""
    return f"{name} {', '.join(map(str, values[:SHOWN]))}{more}"


def of_reach(guidance: MMDGuidance, kernel: Kernel, moved: np.ndarray) -> str | None:
    """A kernel that reaches no reference: in the later half of the guided steps hardly a sample moved.

    Early on samples are near each other, and even such a kernel pushes them apart.

    Args:
      moved: [num_steps] the share of the samples that moved; below 0 in steps without guidance.
    """
    if guidance.transform is not None:
        return None  # what may well stand still
    if type(guidance.placement).acts is not Placement.acts or not is_concrete((guidance.scale, kernel)):
        return None
    if np.min(np.abs(np.asarray(guidance.scale))) < FAINT:
        return None
    guided = moved[moved >= 0]
    late = guided[len(guided) // 2 :]
    if not late.size or late.max() > UNMOVED:
        return None
    return (
        f"guidance moved hardly any sample: the kernel {shown(kernel)} reaches no reference from where they are; give "
        "a larger bandwidth, or None, which takes it from the references"
    )


def of_part(guidance: MMDGuidance, count: int, part: np.ndarray) -> str | None:
    """References that may differ from the model's samples by chance only, so that "shrunk" hardly follows them.

    Args:
      count: of the references.
      part: [num_steps] how much was made of the shifts; below 0 in steps without guidance.
    """
    part = part[part >= 0]
    if not part.size or part.max() > LITTLE or not is_concrete(guidance.scale) or not np.any(guidance.scale):
        return None
    return (
        f"{count} references do not show that they differ from what the model makes: guidance made at most "
        f'{part.max():.0%} of a shift; give more references, or precondition="field", which follows these all the way'
    )


def of_range(name: str, points: Particles, low: np.ndarray, high: np.ndarray) -> str | None:
    """Pictures in [0, 1] or [0, 255] as references of a model of pictures in [−1, 1].

    Args:
      name: of the argument.
      points: x [m, h, w, c].
      low, high: [num_steps] least and largest number of x̂0 before it is guided. The first steps tell the model's range:
        later ones follow the guidance.
    """
    first = max(1, len(low) // 2)
    made_from, made_to = float(low[:first].min()), float(high[0])
    if made_from > -0.5 or made_to > UNIT:
        return None
    some = flat(subset_of(points, LOOKED_AT).x)
    least, most = float(some.min()), float(some.max())
    if least < 0:
        return None
    for top, remedy in ((1, f"2 * {name} - 1"), (255, f"{name} / 127.5 - 1")):
        if 0.6 * top < most <= top:
            return (
                f"{name} lie between {least:.3g} and {most:.3g}, but the model makes samples down to {made_from:.2g}. "
                f"Are they pictures in [0, {top}], and the model's in [-1, 1]? Then give {remedy}"
            )
    return None
