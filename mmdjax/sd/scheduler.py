"""A checkpoint's scheduler_config.json: the table of noise levels, the prediction and the time grid.

    β by its schedule,  ᾱ_i = Π_{j ≤ i} (1 − β_j)

The table is computed as in diffusers, in float32 with the product in float64, and has the same bits. With
`rescale_betas_zero_snr`, √ᾱ is shifted to end at 0 and scaled to keep its start. Lin et al. 2024, algorithm 1.

Some configs space σ/α = √((1 − ᾱ)/ᾱ) by itself, between its values at the first and last level that are visited: evenly
in its 7th root (Karras et al. 2022, eq. 5), evenly in its logarithm, or by the quantiles of a beta distribution. The
levels between those of the table are then visited as they are, where some classes of diffusers tell the network the
nearest one of the table.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import betaincinv

from mmdjax.schedules import Discrete, discrete_times

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
GRIDS = {  # which kind of grid each class visits, and its default spacing
    "DDIMScheduler": ("ddim", "leading"),
    "DDPMScheduler": ("ddim", "leading"),
    "PNDMScheduler": ("ddim", "leading"),
    "EulerDiscreteScheduler": ("sigma", "linspace"),
    "EulerAncestralDiscreteScheduler": ("sigma", "linspace"),
    "LMSDiscreteScheduler": ("sigma", "linspace"),
    "HeunDiscreteScheduler": ("sigma", "linspace"),
    "DPMSolverMultistepScheduler": ("multistep", "linspace"),
    "UniPCMultistepScheduler": ("multistep", "linspace"),
}
SHARED = {  # settings that mean the same in every class
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range", "set_alpha_to_one"),
    *("rescale_betas_zero_snr", "thresholding"),
}
CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # x̂0, unless their file says otherwise
SPACED = (  # classes that may space σ/α by itself
    *("EulerDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
)
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
REFUSED = ("use_lu_lambdas", "use_flow_sigmas")
REMEDY = '--scheduler DDIMScheduler, or load(..., scheduler={"_class_name": "DDIMScheduler"})'
MAX_STEPS = 1_000_000
TINY = 2.0**-24  # diffusers' zero where σ/α is formed


@dataclasses.dataclass(frozen=True, eq=False)
class Scheduler:
    """A parsed scheduler_config.json; missing keys take the default of the class that wrote it.

    Raises:
      ValueError: a class, prediction, table or setting that is not implemented.

    Example:
      >>> scheduler = Scheduler({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"})
      >>> scheduler.prediction, scheduler.num_train_steps
      ('eps', 1000)
    """

    raw: Mapping[str, Any]

    def __post_init__(self):
        name, prediction = self.raw.get("_class_name"), self.raw.get("prediction_type", "epsilon")
        for key, ok in (
            ("_class_name", name is None or isinstance(name, str)),
            ("prediction_type", isinstance(prediction, str)),
            ("num_train_timesteps", _is_number(self.raw, "num_train_timesteps", 1, MAX_STEPS, int)),
            ("beta_start", _is_number(self.raw, "beta_start", 0, 1)),
            ("beta_end", _is_number(self.raw, "beta_end", 0, 1)),
            ("clip_sample_range", _is_number(self.raw, "clip_sample_range", 0, math.inf)),
            ("steps_offset", _is_number(self.raw, "steps_offset", 0, MAX_STEPS, int)),
        ):
            if not ok:
                raise ValueError(f"the scheduler's {key} is {self.raw[key]!r}, of another type or out of range")
        if name not in GRIDS:
            raise ValueError(
                f"the scheduler's class is {name!r}; implemented: {', '.join(GRIDS)}. Take one in its place: {REMEDY}"
            )
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"the scheduler's prediction_type is {prediction!r}; implemented: {', '.join(PREDICTIONS)}"
            )
        if self.raw.get("thresholding"):
            raise ValueError("the scheduler's thresholding is for pixel models; latents have no fixed range")
        _betas(self.raw)

    @property
    def prediction(self) -> str:
        """What the network predicts, by its name in `from_model`."""
        return PREDICTIONS[self.raw.get("prediction_type", "epsilon")]

    @property
    def num_train_steps(self) -> int:
        """T, the length of the table."""
        return len(_betas(self.raw))

    @property
    def clip(self) -> float | None:
        """x̂0 is clipped to ± this number; None: it is not clipped."""
        name = self.raw["_class_name"]
        clips = self.raw.get("clip_sample", name in CLIPPING)
        return float(self.raw.get("clip_sample_range", 1.0)) if clips else None

    @property
    def alphas_cumprod(self) -> Float[np.ndarray, " T"]:
        """ᾱ, float32. Zero terminal SNR: the last is 0, or 2⁻²⁴ in the classes that divide by it."""
        betas = _betas(self.raw)
        if not self.raw.get("rescale_betas_zero_snr"):
            return _cumprod(betas)
        table = _cumprod(_zero_terminal(betas))
        table[-1] = 0.0 if GRIDS[self.raw["_class_name"]][0] == "ddim" else TINY
        return table

    def schedule(self) -> Discrete:
        """The table as a schedule."""
        return Discrete(self.alphas_cumprod)

    def times(self, num_steps: int) -> Float[np.ndarray, " times"]:
        """The scheduler's time grid: the indices i that it visits as t = (i + 1)/T, then the end; [num_steps + 1].

        The end is t = 0. If `set_alpha_to_one` is false it is index 0, t = 1/T, with a little noise left, as in the
        first versions of Stable Diffusion. If index 0 is visited anyway, the end is t = 0: diffusers would stand still.
        With "linspace", DDIM and PNDM of diffusers step from the same levels to others, T/N below; here a step ends
        where the next begins.

        Raises:
          ValueError: more steps than levels, or a spacing that is not implemented.
        """
        raw, total = self.raw, self.num_train_steps
        kind, default = GRIDS[raw["_class_name"]]
        spacing, offset = raw.get("timestep_spacing", default), raw.get("steps_offset", 0)
        other = [key for key in REFUSED if raw.get(key) and raw["_class_name"] in SPACED]
        if other:
            raise ValueError(
                f"the scheduler's {other[0]} is not implemented; give guided_sample(times=...) yourself, or take a "
                f"scheduler without it: {REMEDY}"
            )
        grid = discrete_times(total, num_steps, spacing=spacing, offset=offset)
        if kind == "ddim":
            ends_clean = raw.get("set_alpha_to_one", raw["_class_name"] != "PNDMScheduler")
            if raw["_class_name"] != "DDPMScheduler" and not ends_clean and grid[-2] > 1.5 / total:
                grid[-1] = 1.0 / total
        elif spacing == "linspace" and kind == "sigma":  # not rounded to indices
            grid[:-1] = (np.linspace(0, total - 1, num_steps, dtype=np.float32)[::-1] + 1.0) / total
        elif spacing == "linspace":
            grid[:-1] = (np.linspace(0, total - 1, num_steps + 1).round()[:0:-1] + 1.0) / total
        elif spacing == "leading" and kind == "multistep":
            grid[:-1] = (np.arange(num_steps, 0, -1) * (total // (num_steps + 1)) + offset + 1.0) / total
        spaced = [key for key in SPACINGS if raw.get(key) and raw["_class_name"] in SPACED]
        if spaced:
            grid[:-1] = self._spaced(spaced[0], grid, whole=kind == "multistep")
        return grid

    def _spaced(self, how: str, grid: Float[np.ndarray, " times"], whole: bool) -> Float[np.ndarray, " steps"]:
        """The grid's levels, spaced in σ/α between its first and last, or with `whole` over the whole table."""
        bar = self.alphas_cumprod.astype(np.float64)
        table, index, steps = np.sqrt((1 - bar) / bar), np.arange(len(bar)), len(grid) - 1
        first, last = table[[-1, 0]] if whole else np.interp(grid[[0, -2]] * len(bar) - 1, index, table)
        part = np.linspace(0, 1, steps)
        if how == "use_karras_sigmas":
            sigmas = (first ** (1 / 7) + part * (last ** (1 / 7) - first ** (1 / 7))) ** 7
        elif how == "use_exponential_sigmas":
            sigmas = np.exp(np.log(first) + part * (np.log(last) - np.log(first)))
        else:
            sigmas = last + betaincinv(0.6, 0.6, 1 - part) * (first - last)
        return (np.interp(np.log(sigmas), np.log(table), index) + 1) / len(bar)


def in_place(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's settings with others in their place.

    If these name a class, it takes the place of the file's: the table of noise, the prediction, spacing and offset are
    kept, which all classes share; spaced sigmas (Karras') and whatever only the file's class has are not.

    Raises:
      ValueError: the file's scheduler has no table of noise that another could take.

    Example:
      >>> file = {"_class_name": "LCMScheduler", "beta_schedule": "linear", "use_karras_sigmas": True}
      >>> in_place(file, {"_class_name": "EulerDiscreteScheduler"})
      {'beta_schedule': 'linear', 'clip_sample': False, '_class_name': 'EulerDiscreteScheduler'}
    """
    name = settings.get("_class_name")
    if name is None:
        return {**raw, **settings}
    kept = {key: value for key, value in raw.items() if key in SHARED}
    if name != raw.get("_class_name"):
        if not {"beta_schedule", "trained_betas"} & {*kept, *settings}:
            raise ValueError(
                f"{name} cannot take the place of the scheduler's class {raw.get('_class_name')!r}: its file has no "
                "beta_schedule, the table of noise"
            )
        if raw.get("_class_name") not in CLIPPING:
            kept.setdefault("clip_sample", False)  # what DDIM does unless told not to, the file's class did not
    return {**kept, **settings}


def _is_number(raw: Mapping[str, Any], key: str, low: Any, high: Any, *kinds: type) -> bool:
    return key not in raw or (type(raw[key]) in (kinds or (int, float)) and low <= raw[key] <= high)


def _betas(raw: Mapping[str, Any]) -> Float[np.ndarray, " T"]:
    if raw.get("trained_betas") is not None:
        betas = raw["trained_betas"]
        if not isinstance(betas, list | tuple) or not betas or not all(_is_number({"": b}, "", 0, 1) for b in betas):
            raise ValueError("the scheduler's trained_betas are not a list of numbers between 0 and 1")
        return np.asarray(betas, np.float32)
    first, last = raw.get("beta_start", 1e-4), raw.get("beta_end", 0.02)
    steps, name = raw.get("num_train_timesteps", 1000), raw.get("beta_schedule", "linear")
    match name:
        case "linear":
            return _linspace(first, last, steps)
        case "scaled_linear":
            return _linspace(math.sqrt(first), math.sqrt(last), steps) ** 2
        case "squaredcos_cap_v2":
            bars = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
            return np.array([min(1 - b / a, 0.999) for a, b in itertools.pairwise(bars)], np.float32)
    raise ValueError(
        f"the scheduler's beta_schedule is {name!r}; implemented: linear, scaled_linear, squaredcos_cap_v2"
    )


def _linspace(first: float, last: float, steps: int) -> Float[np.ndarray, " T"]:
    # as torch: from both ends, in float32 with one rounding a value
    a, b = np.float32(first), np.float32(last)
    step, k = np.float64((b - a) / np.float32(max(steps - 1, 1))), np.arange(steps)
    return np.where(k < steps // 2, a + step * k, b - step * (steps - 1 - k)).astype(np.float32)


def _cumprod(betas: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def _zero_terminal(betas: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    root = np.sqrt(_cumprod(betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bar = root**2
    return np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
