"""What a sampling call is given: the checks that come before anything is traced."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax._points.particles import Particles
from mmdjax.denoisers import DiffusionModel
from mmdjax.guidance import check_guidance, check_kind
from mmdjax.guidance.avoid import Avoid, check_avoid
from mmdjax.memory import Memory
from mmdjax.samplers import as_sampler
from mmdjax.schedules import uniform_times
from mmdjax.tree import is_concrete, is_traced, shown


def check_key(key: Any) -> None:
    """Raise TypeError unless this is a typed PRNG key."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        seed = key if isinstance(key, int) else "seed"
        raise TypeError(f"key is {shown(key)}, which is not a typed key; make one with jax.random.key({seed})")


def check_call(
    key: Any,
    refs: Particles | None,
    model: Any,
    num_samples: Any,
    cond: Any,
    guidance: Any,
    sampler: Any,
    x_init: Any,
    avoid: Avoid | None = None,
) -> None:
    """Raise the TypeError or ValueError of `guided_sample` for arguments that do not fit each other."""
    check_key(key)
    if key.shape != ():
        raise ValueError(f"key has shape {key.shape}; give one key, and jax.vmap over several")
    if not isinstance(model, DiffusionModel):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model is {what}; give DiffusionModel(denoiser, schedule, shape)")
    as_sampler(sampler)
    check_count("num_samples", num_samples)
    if isinstance(cond, list | tuple | dict) and cond and not jax.tree.leaves(cond):
        raise TypeError(f"cond is {shown(cond)}, which holds no arrays; give None for no conditions")
    check_rows(cond, num_samples)
    expected = (num_samples, *model.shape)
    if x_init is not None and np.shape(x_init) != expected:
        raise ValueError(f"x_init has shape {np.shape(x_init)}; num_samples and model.shape ask for {expected}")
    if x_init is not None and not jnp.issubdtype(jnp.result_type(x_init), jnp.floating):
        raise TypeError(
            f"x_init has dtype {jnp.result_type(x_init)}; give noisy floats, scaled as the model's training data was: "
            "mmdjax.schedules.diffuse makes them from pictures"
        )
    check_kind(guidance)
    if avoid is not None:
        check_avoid(avoid, guidance, cond, model.shape, refs)
    if refs is None:
        return
    if not hasattr(refs.x, "shape"):
        raise TypeError(
            f"refs is a {type(refs.x).__name__}; give one array [m, ...], such as jnp.stack(refs), or Particles"
        )
    check_guidance(guidance, refs, cond)
    if np.shape(refs.x)[1:] != model.shape:
        raise ValueError(
            f"refs have shape {np.shape(refs.x)} but the model makes samples of shape {model.shape}; "
            f"give [m, {', '.join(map(str, model.shape))}]"
        )


def check_rows(cond: Any, num_samples: int) -> None:
    """Raise ValueError unless the conditions have one row for each sample."""
    for leaf in jax.tree.leaves(cond):
        if np.shape(leaf)[:1] != (num_samples,):
            raise ValueError(f"cond has shape {np.shape(leaf)}; it needs one row for each of the {num_samples} samples")


def check_count(name: str, number: Any) -> None:
    """Raise ValueError unless this is a concrete integer of at least 1."""
    if is_traced(number):
        raise ValueError(f"{name} is traced but decides shapes; give an integer, and name it in jit's static_argnames")
    try:
        whole = not isinstance(number, bool) and operator.index(number) >= 1
    except TypeError:
        whole = False
    if not whole:
        raise ValueError(f"{name} is {number!r}; give an integer of at least 1")


def as_times(times: Any, num_steps: Any) -> Any:
    """The time grid: times, checked, or uniform ones of num_steps."""
    if times is None:
        check_count("num_steps", num_steps)
        return uniform_times(int(num_steps))
    if np.ndim(times) != 1 or np.shape(times)[0] < 2:
        raise ValueError(f"times has shape {np.shape(times)}; give decreasing t, [num_steps + 1], or num_steps alone")
    if is_concrete(times):
        values = np.asarray(times)
        if not ((np.diff(values) < 0).all() and values[0] <= 1 and values[-1] >= 0):
            raise ValueError(f"times must decrease within [0, 1], 1 being the noisiest; they are {values}")
    return times


def as_memory(memory: Any, model: DiffusionModel, cond: Any) -> Memory | None:
    """A new memory from a capacity; the memory of an earlier call, checked against the model; None from None."""
    if memory is None:
        return None
    if isinstance(memory, (int, np.integer)) and not isinstance(memory, bool):
        return Memory.empty(int(memory), model.shape, cond)
    if not isinstance(memory, Memory):
        what = type(memory).__name__ if isinstance(memory, list | tuple) else shown(memory)
        raise TypeError(f"memory is {what}; give None, a capacity, or samples.memory of an earlier call")
    held = memory.particles
    if held.x.shape[1:] != model.shape:
        raise ValueError(f"memory holds samples of shape {held.x.shape[1:]} but the model makes {model.shape}")
    shapes = [jax.tree.map(lambda leaf: np.shape(leaf)[1:], tree) for tree in (held.cond, cond)]
    if jax.tree.structure(held.cond) != jax.tree.structure(cond) or shapes[0] != shapes[1]:
        raise ValueError(f"memory.cond has samples of shape {shapes[0]} but cond has {shapes[1]}; start a new memory")
    return memory
