"""MMD guidance: moving generated particles down the gradient of MMD² to the references.

    shift_i = −scale · T(P_i · ∂MMD²/∂z_i / u_i)

`MMDGuidance` holds the choices. Its parts, each in a file of its own:

    placements    where particles are moved: "denoised", "sample", "clean", "diffused"
    rules         P_i: "none", "raw", "length", "mass"
    field         P_i of "field"
    shrunk        how much of "field" the references support: the default, "shrunk"
    sides         the particles and what they are compared with: all that a rule sees
    coordinates   points as combinations of known ones: fast inner steps in many dimensions
    avoid         samples to keep away from
    bound         the guidance with its references, applied at each step
    wrappers      guide_denoiser, guide_sampler
    advice        what users are told at run time
    paper         the published rule

References:
  MMD Guidance, arXiv 2601.08379.
"""

from typing import Any, Literal

import jax
import numpy as np

from mmdjax._points.particles import Particles, check_points
from mmdjax._points.streaming import HostReferences
from mmdjax.guidance import paper
from mmdjax.guidance.field import Field
from mmdjax.guidance.placements import AtSample, Clean, Denoised, Diffused, Placement
from mmdjax.guidance.rules import Length, Mass, Plain, Raw, Rule
from mmdjax.guidance.shrunk import Shrunk
from mmdjax.kernels import Kernel, as_kernel
from mmdjax.mmd import check_estimator
from mmdjax.tree import are_numbers, check_instance, check_number, choice, is_concrete, pytree, shown, static

__all__ = [
    "PLACEMENTS",
    "RULES",
    "AtSample",
    "Clean",
    "Denoised",
    "Diffused",
    "Field",
    "Length",
    "MMDGuidance",
    "Mass",
    "Placement",
    "Plain",
    "Raw",
    "Rule",
    "Shrunk",
    "check_guidance",
    "check_kind",
    "default_kernel",
]

PLACEMENTS = {"denoised": Denoised(), "sample": AtSample(), "clean": Clean(), "diffused": Diffused()}
RULES = {"field": Field(), "shrunk": Shrunk(), "mass": Mass(), "length": Length(), "none": Plain(), "raw": Raw()}


@pytree
class MMDGuidance:
    """How to guide: what is compared, where particles are moved, and how far. `MMDGuidance()` needs no tuning.

    Each sample of a batch is a particle z_i of weight u_i: 1/n for n samples, a memory's included. Guidance moves it
    towards the references and away from the other particles, by

        shift_i = −scale · T(P_i · ∂MMD²/∂z_i / u_i),

    in the data's units. x̂0 is the model's estimate of the clean sample; x_s is the noisy sample after the sampler's
    step to level s. Give the object to `guided_sample`, `sample_many`, `guide_denoiser` or `guide_sampler`.
    `suggest_guidance` tries other choices on your references; `MMDGuidance.paper()` is the published rule.

    Args:
      kernel: what makes two samples alike: a kernel, or a function (a: Particles, b: Particles) -> Gram [n, m].
        None: `IMQ` with its bandwidth from the references (`mmdjax.guidance.default_kernel`); `RBF` for "diffused".
        `IMQ(h)`, `RBF(h)`, …: a bandwidth of your own, a distance in the data's units. The larger it is, the coarser
        the differences that guidance corrects.
        `Product(x=IMQ(), cond=Delta())`: references and samples have labels (prompts: `mmdjax.sd.prompt_kernel()`).
        `Mapped(fn, kernel)`: features fn(x) tell better than x what is alike. Take precondition="length" with it.
      scale: multiplies the shift. Leave it 1 for "shrunk", "field" and "mass", or take less for weaker guidance. 0 is
        plain sampling. The other preconditions need a scale found by trial.
      at: where particles are moved, by name or as a `Placement`.
        "denoised": x̂0, compared with clean references, at each network call. The default, for every solver.
        "clean": x_s after the step, compared with clean references, as published. Try it if the proportions of modes or
        classes are not right.
        "sample": x_s after the step, compared with references that got fresh noise of level s. It keeps samples in the
        modes of the model, but copies more if references are few.
        "diffused": as "sample", but averaged over that noise in closed form; for `RBF` only.
      estimator: "u" leaves the pair of a particle with itself out of MMD². "v" keeps it, as the paper does: biased.
      inner_steps: shifts for each network call, at least 1. None: 8 ("denoised"), 1 ("clean"); for "sample" and
        "diffused" up to 12, in proportion to the decrease in log σ²/α² over the step.
      precondition: P_i, the length of the shift, by name or as a `Rule`. None: "shrunk" for "denoised", else "mass".
        "field": "mass", with steps averaged over neighbours in the batch, so that few references are not copied, and
        the push between particles weakened at low noise.
        "shrunk": "field", less what the references' sampling error could explain if there are fewer than 100. An
        attribute of few pixels may be taken for chance, too; "field" follows it. It needs batches of about three
        samples for each reference, or more: in smaller ones, with a memory too, it is nearly "field". So it is with
        samples to avoid, and with a kernel that compares conditions. Only for "denoised".
        "mass": a mean-shift step, which is bounded. Like the two above it needs a kernel of the distance: `IMQ`, `RBF`,
        `Laplacian`, `Matern32`, `Matern52`, `RationalQuadratic`, `Energy`, a `Sum` or `Product` of these on samples.
        "length": the kernel's length squared, such as its bandwidth squared, so that the shift is a length. For kernels
        with a length that are not of the distance: `Mapped`, `Linear`, `Polynomial`, `Cosine`.
        "none": 1. For any kernel, such as a function.
        "raw": u_i, so that T is given the gradient itself, as in the paper. It shrinks as n grows.
      transform: T, an `optax.GradientTransformation` for one sample, such as `optax.scale_by_adam()`; None: no change.
        The guided point is its `params`. The shift is *minus* what it returns, so give no optimizer, which turns the
        sign itself. Make it once: another object compiles anew.
      window: (start, end): guidance acts while start <= steps done / all steps < end. (0, 0.8) leaves the last fifth of
        the steps to the model.
      published: keep the memory as the published code does; set by `paper`.
    Raises:
      ValueError: a choice that does not exist, or that the kernel cannot serve ("mass", "field" and "shrunk" need a
        kernel of the distance, "diffused" an RBF); a window out of order or range; a scale that is not finite;
        inner_steps below 1.
      TypeError: a scale that is not a number, a transform without `init` and `update`, a class in place of an object.

    Example:
      >>> from mmdjax import RBF
      >>> MMDGuidance(kernel=RBF(1.0), at="sample").at
      'sample'
      >>> MMDGuidance(kernel=RBF(1.0), at="sample", window=(0.0, 0.8)).placement
      AtSample()

    Source: arXiv 2601.08379.
    """

    kernel: Any = None
    scale: Any = 1.0
    at: Literal["denoised", "sample", "clean", "diffused"] | Placement = choice(default="denoised")
    estimator: Literal["u", "v"] = static(default="u")
    inner_steps: int | None = static(default=None)
    precondition: Literal["field", "shrunk", "mass", "length", "none", "raw"] | Rule | None = choice(default=None)
    transform: Any = static(default=None)
    window: tuple[Any, Any] = (0.0, 1.0)
    published: bool = static(default=False)

    def __post_init__(self):
        _check_choice("at", self.at, PLACEMENTS, Placement)
        if self.placement.moves not in ("x0_hat", "x_s"):
            raise ValueError(
                f'{type(self.placement).__name__}.moves is {self.placement.moves!r}; choose "x0_hat" or "x_s"'
            )
        check_estimator(self.estimator)
        if self.precondition is not None:
            _check_choice("precondition", self.precondition, RULES, Rule, "None, ")
        if self.inner_steps is not None and (not isinstance(self.inner_steps, int) or self.inner_steps < 1):
            raise ValueError(f"inner_steps is {self.inner_steps!r}; give an integer of at least 1, or None")
        check_number("scale", self.scale)
        if is_concrete(self.scale) and not np.isfinite(self.scale).all():
            raise ValueError(f"scale is {self.scale}; give a finite number (0 is plain sampling)")
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        if not isinstance(self.window, tuple) or len(self.window) != 2 or not are_numbers(self.window):
            raise ValueError(f"window is {self.window}; give (start, end), fractions of the steps between 0 and 1")
        if self.transform is not None and not all(hasattr(self.transform, name) for name in ("init", "update")):
            raise TypeError(
                f"transform is {shown(self.transform)}; give an optax transformation, such as optax.scale_by_adam()"
            )
        if is_concrete(self.window) and np.ndim(self.window[0]) == np.ndim(self.window[1]) == 0:
            start, end = map(float, self.window)
            if not 0 <= start < end <= 1:
                raise ValueError(
                    f"window is ({start:g}, {end:g}); it needs 0 <= start < end <= 1, fractions of the steps"
                )
        if self.rule.weighs and not _moves_to_clean(self.placement):
            raise ValueError(
                f"precondition={shown(self.precondition)} is for x̂0 moved to clean references, which {self.where} does "
                'not do; use at="denoised", or precondition="field"'
            )
        if self.kernel is not None:
            object.__setattr__(self, "kernel", as_kernel(self.kernel))
            named = self.precondition or self.placement.rule
            self.rule.check(self.kernel, named if isinstance(named, str) else type(named).__name__)
            self.placement.check(self.kernel)

    @property
    def placement(self) -> Placement:
        """The `Placement` that `at` names."""
        if self.published:
            return paper.Published()
        return PLACEMENTS[self.at] if isinstance(self.at, str) else self.at

    @property
    def base_kernel(self) -> Kernel:
        """The kernel; the placement's default where it is None. Bandwidths may still be None."""
        return self.placement.default_kernel() if self.kernel is None else self.kernel

    @property
    def rule(self) -> Rule:
        """The `Rule` that `precondition` names; the placement's default where it is None."""
        if self.precondition is None:
            rule = RULES[self.placement.rule]
            return RULES["field"] if rule.weighs and not _moves_to_clean(self.placement) else rule
        return RULES[self.precondition] if isinstance(self.precondition, str) else self.precondition

    @property
    def where(self) -> str:
        """`at` as the user wrote it, for error messages."""
        return f'at="{self.at}"' if isinstance(self.at, str) else f"at={shown(self.at)}"

    @property
    def steps(self) -> int:
        """The most inner steps for each network call."""
        return self.inner_steps or self.placement.steps

    @classmethod
    def paper(cls, alpha: Any = 0.002) -> "MMDGuidance":
        """The authors' rule: x_s − α ‖x_s‖ g/(‖g‖ + 1e-5), g the raw gradient of the biased MMD² with (xᵀy/D + 1)³.

        x_s is compared with clean references. Without a memory the whole batch is guided together; norms are taken for
        each sample. With a memory and num_samples=1 it is the published loop: nothing moves until one sample is
        remembered, samples are remembered as they were before the last shift, and a full memory keeps only its last
        sample.

        Args:
          alpha: the size of a move relative to ‖x_s‖; it becomes `scale`. The paper's images use .002.

        Example:
          >>> MMDGuidance.paper(alpha=0.01).scale
          0.01

        Source: arXiv 2601.08379.
        """
        return cls(**paper.settings(alpha))


def _moves_to_clean(placement: Placement) -> bool:
    return placement.moves == "x0_hat" and placement.clean


def _check_choice(name: str, value: Any, table: dict[str, Any], kind: type, also: str = "") -> None:
    """Raise unless a value is a name in the table, or a component of the kind."""
    if isinstance(value, kind) or (isinstance(value, str) and value in table):
        return
    check_instance(name, value)
    raise ValueError(
        f"{name} is {shown(value)}; choose one of {tuple(table)}, {also}or give a mmdjax.guidance.{kind.__name__}"
    )


def default_kernel(at: str | Placement) -> Kernel:
    """The kernel of `MMDGuidance(at=at)`.

    "denoised" and "clean": `IMQ(Neighbourhood())`. "sample": `IMQ` at 2.5 times the references' median distance to the
    nearest neighbour. "diffused": `RBF` at their median distance.
    """
    return (PLACEMENTS[at] if isinstance(at, str) else at).default_kernel()


def check_kind(guidance: Any) -> None:
    """Raise TypeError unless this is an MMDGuidance."""
    check_instance("guidance", guidance)
    if not isinstance(guidance, MMDGuidance):
        raise TypeError(
            f"guidance is {type(guidance).__name__}; give MMDGuidance(...), or refs=None for plain sampling"
        )


def check_guidance(guidance: Any, refs: Particles, cond: Any) -> None:
    """Raise for references and conditions that the guidance cannot use.

    Raises:
      TypeError: not an MMDGuidance; references that are not floats.
      ValueError: see `check_points`; a Product kernel and only one of cond and refs.cond, or of other shapes.
    """
    check_kind(guidance)
    check_points("refs", refs, floats=True)
    if isinstance(refs.x, HostReferences) and not guidance.placement.clean:
        raise ValueError(f'{guidance.where} adds noise to the references; HostReferences need at="denoised" or "clean"')
    if guidance.kernel is None or not guidance.kernel.uses_cond:
        return
    check_cond("refs", refs.cond, cond)


def check_cond(name: str, theirs: Any, cond: Any) -> None:
    """Raise ValueError unless the conditions of a point set, named in the message, are like those of the samples."""
    if theirs is None:
        have = "have" if name == "refs" else "has"
        raise ValueError(f"the kernel compares conditions but {name} {have} none; give {name}=Particles(x, cond=...)")
    if cond is None:
        raise ValueError(
            "the kernel compares conditions but cond is None; give cond, a row for each sample, or a kernel on x alone"
        )
    shapes = [jax.tree.map(lambda leaf: np.shape(leaf)[1:], tree) for tree in (theirs, cond)]
    if shapes[0] != shapes[1] or jax.tree.structure(theirs) != jax.tree.structure(cond):
        shapes = [jax.tree.map(np.shape, tree) for tree in (theirs, cond)]
        raise ValueError(f"{name}.cond has shape {shapes[0]} but cond has {shapes[1]}; conditions must match")
