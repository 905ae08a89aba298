"""MMD guidance: moving generated particles down the gradient of MMD² to the references.

    shift_i = −scale · T(P_i · ∂MMD²/∂z_i / u_i)

`MMDGuidance` says how. Its parts, each in a file of its own:

    placements    where particles are moved: "denoised", "sample", "clean", "diffused"
    rules         P_i: "none", "raw", "length", "mass"
    field         P_i of the default, "field"
    sides         who is compared with whom: what a rule sees
    coordinates   points as combinations of known ones: fast inner steps in many dimensions
    bound         the guidance with its references, at work
    wrappers      guide_denoiser, guide_sampler
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
    "check_guidance",
    "check_kind",
    "default_kernel",
]

PLACEMENTS = {"denoised": Denoised(), "sample": AtSample(), "clean": Clean(), "diffused": Diffused()}
RULES = {"field": Field(), "mass": Mass(), "length": Length(), "none": Plain(), "raw": Raw()}


@pytree
class MMDGuidance:
    """How to guide: the kernel, the placement and the size of the move. `MMDGuidance()` needs no tuning.

    Args:
      kernel: compares samples, or, as a `Product`, samples and conditions. None: `IMQ`, its bandwidth `Neighbourhood()`
        of the references ("denoised", "clean") or 2.5 times their median nearest-neighbour distance ("sample");
        "diffused": `RBF` at their median distance.
      scale: multiplies the shift. 0 is plain sampling.
      at: where particles are moved, by name or a `Placement` of one's own.
        "denoised": x̂0, against clean references. Serves every solver; the default.
        "sample": x_s after the step, against references with fresh noise of level s. Keeps samples in their modes.
        "clean": x_s after the step, against clean references: the published placement.
        "diffused": as "sample" with the noise in closed form: no noise in the gradient, but RBF only.
      estimator: "u" leaves the self-pair out, "v" keeps it. "v" also pushes a particle off itself: it is biased.
      inner_steps: shifts a network call. None: 8 ("denoised"); 20 × the decrease in log σ²/α² over the step, that
        capped at .575, in equal parts ("sample", "diffused"); 1 ("clean").
      precondition: the rule, P_i, by name or a `Rule` of one's own. None: "field" ("denoised"), "mass" (elsewhere).
        "mass": a mean-shift step, bounded, with no scale to tune. "field": that, averaged over neighbours, so that few
        references are not copied. Both need a kernel of the distance.
        "length": the kernel's length squared, by component in a sum. "none": 1. "raw": u_i, the gradient itself. Their
        `scale` is for the user to choose.
      transform: T, an `optax.GradientTransformation` vmapped over samples, the guided point being its `params`. Static:
        make it once. Its numbers may follow the count of updates (a schedule). The shift is *minus* what it returns, so
        give a `scale_by_…` transformation, such as `optax.scale_by_adam()`, not an optimizer, which turns the sign
        itself.
      window: (start, end), fractions of the steps done between which guidance acts; 0 is pure noise, 1 is clean.
      published: keep the memory as the published code does; see `paper`.
    Raises:
      ValueError: a choice that does not exist, or that the kernel cannot serve ("mass" and "field" need a kernel of the
        distance, "diffused" an RBF); a window out of order or range; a scale that is not finite; inner_steps below 1.

    Example:
      >>> from mmdjax import RBF
      >>> MMDGuidance(kernel=RBF(1.0), at="sample").at
      'sample'

    Source: arXiv 2601.08379.
    """

    kernel: Any = None
    scale: Any = 1.0
    at: Literal["denoised", "sample", "clean", "diffused"] | Placement = choice(default="denoised")
    estimator: Literal["u", "v"] = static(default="u")
    inner_steps: int | None = static(default=None)
    precondition: Literal["field", "mass", "length", "none", "raw"] | Rule | None = choice(default=None)
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
        if self.kernel is not None:
            object.__setattr__(self, "kernel", as_kernel(self.kernel))
            named = self.precondition or self.placement.rule
            self.rule.check(self.kernel, named if isinstance(named, str) else type(named).__name__)
            self.placement.check(self.kernel)

    @property
    def placement(self) -> Placement:
        """Where particles are moved."""
        if self.published:
            return paper.Published()
        return PLACEMENTS[self.at] if isinstance(self.at, str) else self.at

    @property
    def base_kernel(self) -> Kernel:
        """The kernel, None filled in; bandwidths may still be left to the references."""
        return self.placement.default_kernel() if self.kernel is None else self.kernel

    @property
    def rule(self) -> Rule:
        """P_i, None filled in."""
        rule = self.placement.rule if self.precondition is None else self.precondition
        return RULES[rule] if isinstance(rule, str) else rule

    @property
    def where(self) -> str:
        """`at` as it is written, for messages."""
        return f'at="{self.at}"' if isinstance(self.at, str) else f"at={shown(self.at)}"

    @property
    def steps(self) -> int:
        """Inner steps a network call, at most."""
        return self.inner_steps or self.placement.steps

    @classmethod
    def paper(cls, alpha: Any = 0.002) -> "MMDGuidance":
        """The authors' rule: x_s − α ‖x_s‖ g/(‖g‖ + 1e-5), g the raw gradient of the biased MMD² with (xᵀy/D + 1)³.

        Clean references against x_s. Without memory the joint batch is guided, each sample's norms its own. With a
        memory and num_samples=1 it is the published loop: nothing moves until one sample is remembered, samples are
        remembered as they were before the last shift, and a full memory keeps only its last sample.

        Args:
          alpha: the relative size of a move, the `scale` leaf. The paper's images use .002.

        Example:
          >>> MMDGuidance.paper(alpha=0.01).scale
          0.01

        Source: arXiv 2601.08379.
        """
        return cls(**paper.settings(alpha))


def _check_choice(name: str, value: Any, table: dict[str, Any], kind: type, also: str = "") -> None:
    """Raise unless a value is a name in the table, or a component of the kind."""
    if isinstance(value, kind) or (isinstance(value, str) and value in table):
        return
    check_instance(name, value)
    raise ValueError(
        f"{name} is {shown(value)}; choose one of {tuple(table)}, {also}or give a mmdjax.guidance.{kind.__name__}"
    )


def default_kernel(at: str | Placement) -> Kernel:
    """The kernel of `MMDGuidance()` at a placement."""
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
        raise ValueError(f'{guidance.where} brings references to each noise level; HostReferences need at="denoised"')
    if guidance.kernel is None or not guidance.kernel.uses_cond:
        return
    if refs.cond is None:
        raise ValueError("the kernel compares conditions but refs have none; give refs=Particles(x, cond=...)")
    if cond is None:
        raise ValueError(
            "the kernel compares conditions but cond is None; give cond, one row a sample, or a kernel on x alone"
        )
    shapes = [jax.tree.map(lambda leaf: np.shape(leaf)[1:], tree) for tree in (refs.cond, cond)]
    if shapes[0] != shapes[1] or jax.tree.structure(refs.cond) != jax.tree.structure(cond):
        shapes = [jax.tree.map(np.shape, tree) for tree in (refs.cond, cond)]
        raise ValueError(f"refs.cond has shape {shapes[0]} but cond has {shapes[1]}; conditions must match")
