"""Flow-matching schedulers: a checkpoint's scheduler_config.json as levels σ of x_σ = (1 − σ) x_0 + σ ε.

The levels start evenly between 1 and the last. A shift a > 0 moves them to where pictures of more pixels need them,

    σ ← a σ / (1 + (a − 1) σ) = a / (a + 1/σ − 1),

with a from the config ("static"), or a = e^μ ("exponential") or μ ("linear") where μ depends on the picture's size
("dynamic"). A terminal level s stretches them, 1 − σ ← (1 − σ) (1 − s) / (1 − σ_last), and Karras', exponential or beta
spacings replace those between the ends. Last comes 0.

All is computed as in diffusers, in the same order and precision, so that levels and times have the same bits.

References:
  Lipman et al. 2023 (flow matching), Esser et al. 2024, eq. 23 (the shift), Karras et al. 2022, eq. 5, Lee et al. 2024
  (beta spacing).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import betaincinv

from mmdjax.schedules import RectifiedFlow
from mmdjax.tree import pytree, static

CLASS = "FlowMatchEulerDiscreteScheduler"
GRIDS = ("own", "uniform", "flux2")
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
REFUSED = {
    "invert_sigmas": "it is for models whose level 0 is noise",
    "stochastic_sampling": "choose noise by the sampler: guided_sample(sampler=DDIM(eta=1.0))",
}
MAX_STEPS = 1_000_000
NUMBERS = {  # key: default, least, most
    "shift": (1.0, 1e-6, 1e6),
    "base_shift": (0.5, -100.0, 100.0),
    "max_shift": (1.15, -100.0, 100.0),
    "base_image_seq_len": (256, 1, 2**31),
    "max_image_seq_len": (4096, 1, 2**31),
    "num_train_timesteps": (1000, 1, MAX_STEPS),
    "shift_terminal": (0.0, 0.0, 0.999),
}
COUNTS = ("base_image_seq_len", "max_image_seq_len", "num_train_timesteps")


@pytree
class FlowTime:
    """σ → σ T: what a network trained on T levels takes as its time, for `from_model(time=...)`.

    Example:
      >>> float(FlowTime(1000)(0.25))
      250.0
    """

    num_train_steps: int = static(default=1000)

    def __call__(self, t: Any) -> Array:
        return jnp.asarray(t, float) * self.num_train_steps


@dataclasses.dataclass(frozen=True, eq=False)
class FlowScheduler:
    """A parsed scheduler_config.json of flow matching; missing keys take the default of diffusers' class.

    Raises:
      ValueError: another class, or a setting that is not implemented or no possible value.

    Example:
      >>> scheduler = FlowScheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
      >>> scheduler.prediction, scheduler.times(4, grid="uniform").tolist()
      ('flow', [1.0, 0.8999999761581421, 0.75, 0.5, 0.0])
    """

    raw: Mapping[str, Any]

    def __post_init__(self):
        name = self.raw.get("_class_name")
        if name != CLASS:
            raise ValueError(f"the scheduler's class is {name!r}; implemented for flow matching: {CLASS}")
        for key, why in REFUSED.items():
            if self.raw.get(key):
                raise ValueError(f"the scheduler's {key} is not implemented; {why}")
        for key, (_, low, high) in NUMBERS.items():
            value = self.raw.get(key)
            kinds = (int,) if key in COUNTS else (int, float)
            if value is not None and not (type(value) in kinds and low <= value <= high):
                raise ValueError(f"the scheduler's {key} is {value!r}, of another type or out of range")
        if self._number("base_image_seq_len") == self._number("max_image_seq_len"):
            raise ValueError("the scheduler's base_image_seq_len and max_image_seq_len are equal; they must differ")
        if self._shift_type not in ("exponential", "linear"):
            raise ValueError(
                f"the scheduler's time_shift_type is {self._shift_type!r}; implemented: exponential, linear"
            )
        chosen = [key for key in SPACINGS if self.raw.get(key)]
        if len(chosen) > 1:
            raise ValueError(f"the scheduler's {' and '.join(chosen)} exclude each other; keep one")

    @property
    def prediction(self) -> str:
        """What the network predicts, by its name in `from_model`: ε − x_0."""
        return "flow"

    @property
    def num_train_steps(self) -> int:
        """T: the network's time is T σ."""
        return self._number("num_train_timesteps")

    @property
    def clip(self) -> None:
        """x̂0 is not clipped."""
        return None

    @property
    def dynamic(self) -> bool:
        """Whether the levels depend on the picture's size."""
        return bool(self.raw.get("use_dynamic_shifting"))

    @property
    def time(self) -> FlowTime:
        """From level.t to the network's time, for `from_model(time=...)`."""
        return FlowTime(self.num_train_steps)

    def schedule(self) -> RectifiedFlow:
        """σ = t; the shift is in the grid."""
        return RectifiedFlow()

    def times(
        self, num_steps: int, image_seq_len: int | None = None, *, grid: str = "own", mu: float | None = None
    ) -> Float[np.ndarray, " times"]:
        """The levels σ that are visited, from the noisiest to 0: [num_steps + 1], float32.

        Args:
          num_steps: N, the number of network calls.
          image_seq_len: the picture's length in the network, its number of patches; a dynamic shift needs it.
          grid: where the levels start, by the pipeline: "own" evenly between the scheduler's largest and smallest
            (SD 3), "uniform" 1, 1 − 1/N, … 1/N (FLUX.1, SiT), "flux2" the same with μ by the number of steps, too.
          mu: μ of a dynamic shift, in place of what the length says.
        Raises:
          ValueError: another grid; no length where the shift is dynamic; a number of steps that gives no grid.
        """
        if grid not in GRIDS:
            raise ValueError(f"grid is {grid!r}; choose one of {GRIDS}")
        if not 1 <= num_steps <= MAX_STEPS:
            raise ValueError(f"num_steps is {num_steps}; give 1 to {MAX_STEPS:,}")
        sigmas = self._start(num_steps, grid)
        if self.dynamic:
            sigmas = self._dynamic(sigmas, self._mu(num_steps, image_seq_len, grid) if mu is None else float(mu))
        else:
            sigmas = _shifted(sigmas, self._number("shift"))
        terminal = self._number("shift_terminal")
        if terminal:
            if sigmas[-1] == 1:
                raise ValueError(f"num_steps is {num_steps}; shift_terminal needs at least 2")
            rest = 1 - sigmas
            sigmas = 1 - rest / (rest[-1] / (1 - terminal))
        sigmas = np.minimum(self._spaced(sigmas, num_steps).astype(np.float32), np.float32(1))  # rounding can pass 1
        return np.append(sigmas, np.float32(0))

    def _start(self, num_steps: int, grid: str) -> Float[np.ndarray, " N"]:
        if grid != "own":
            return np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32)
        total = self.num_train_steps
        ends = np.array([total, 1], np.float32) / np.float32(total)
        if not self.dynamic:
            ends = _shifted(ends, self._number("shift"))  # and once more later, as in diffusers
        first, last = (float(end) * total for end in ends)
        return np.linspace(first, last, num_steps) / total

    def _mu(self, num_steps: int, length: int | None, grid: str) -> float:
        if length is None or length < 1:
            raise ValueError(
                f"image_seq_len is {length}; this scheduler's levels depend on the picture's size, so give its number "
                "of patches, height × width of the latent over the patch's area"
            )
        if grid == "flux2":
            return flux2_mu(int(length), num_steps)
        base, most = self._number("base_image_seq_len"), self._number("max_image_seq_len")
        slope = (self._number("max_shift") - self._number("base_shift")) / (most - base)
        return int(length) * slope + (self._number("base_shift") - slope * base)

    def _dynamic(self, sigmas: np.ndarray, mu: float) -> np.ndarray:
        a = math.exp(mu) if self._shift_type == "exponential" else mu
        return a / (a + (1 / sigmas - 1))

    def _spaced(self, sigmas: np.ndarray, num_steps: int) -> np.ndarray:
        high, low, part = sigmas[0].item(), sigmas[-1].item(), np.linspace(0, 1, num_steps)
        if self.raw.get("use_karras_sigmas"):
            first, last = high ** (1 / 7), low ** (1 / 7)
            return (first + part * (last - first)) ** 7.0
        if self.raw.get("use_exponential_sigmas"):
            return np.exp(np.linspace(math.log(high), math.log(low), num_steps))
        if self.raw.get("use_beta_sigmas"):
            return low + betaincinv(0.6, 0.6, 1 - part) * (high - low)
        return sigmas

    def _number(self, key: str) -> Any:
        value = self.raw.get(key)
        return NUMBERS[key][0] if value is None else value

    @property
    def _shift_type(self) -> Any:
        return self.raw.get("time_shift_type", "exponential")


def flux2_mu(image_seq_len: int, num_steps: int) -> float:
    """μ of FLUX.2: two lines in the picture's length, fitted for 10 and for 200 steps, and a line in the steps between.

    Beyond a length of 4,300 it is that of 200 steps. The numbers are those of Black Forest Labs' flux2 code.

    Example:
      >>> round(flux2_mu(4096, 50), 3)
      2.023
    """
    at_200 = 0.00016927 * image_seq_len + 0.45666666
    if image_seq_len > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_seq_len + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * num_steps + (at_200 - 200.0 * slope)


def _shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigmas / (1 + (shift - 1) * sigmas)
