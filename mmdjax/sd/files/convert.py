"""Between PyTorch's checkpoints and Flax's parameters.

Conversion is a rule, not a table. The modules are named by the checkpoint's own paths, so a parameter's path joined by
dots is its key, up to the leaf,

    kernel, scale, embedding ↔ weight        others keep their names,

and only kernels change their layout: [out, in, h, w] ↔ [h, w, in, out], [out, in] ↔ [in, out]. The keys and shapes must
be those of the module's `init` (by `jax.eval_shape`, which takes no memory); an error tells all differences, see
`differences.py`. Spellings that mean the same are read as such: older names, and a prefix before all names.
"""

import fnmatch
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry
from mmdjax.sd.files.differences import differences
from mmdjax.sd.networks.clip import CLIPText

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# Spellings of older files, and buffers that are no parameters.
RENAMED = (
    (re.compile(r"(attentions\.\d+)\.query\."), r"\1.to_q."),
    (re.compile(r"(attentions\.\d+)\.key\."), r"\1.to_k."),
    (re.compile(r"(attentions\.\d+)\.value\."), r"\1.to_v."),
    (re.compile(r"(attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
)
COMPILED = re.compile(r"(^|\.)_orig_mod\.")  # torch.compile writes it before the names in what it compiled
DROPPED = re.compile(r"(^|\.)embeddings\.position_ids$|(^|\.)bn\.num_batches_tracked$")
LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")
# Other things that come in the same file formats, by what only they have: first those that change no weights.
FOREIGN = (
    (
        re.compile(r"^(control_model\.|controlnet_|input_hint_block|lora_controlnet$)"),
        "a ControlNet, which needs a model of its own",
    ),
    (
        re.compile(r"^(image_proj|ip_adapter)\.|\.to_[kv]_ip\."),
        "an IP-Adapter, which needs an image encoder; it is not implemented",
    ),
    (
        re.compile(r"^(string_to_param|emb_params|clip_[lg]$)"),
        "a textual inversion: an embedding, not a model; give it beside its model, "
        "load(model, textual_inversion={token: file}) or --textual-inversion TOKEN=FILE",
    ),
    (
        re.compile(r"(^|[._])lora[._]|\.(hada|lokr)_|\.lora_(A|B|up|down)"),
        "a LoRA: a change to a model; give it beside its model, load(model, lora={file: 1.0}) or --lora FILE=1",
    ),
)


def abstract(module: nn.Module, param_dtype: Any = None) -> dict:
    """The parameter tree of a module, as shapes and dtypes.

    Args:
      param_dtype: of all leaves; by default the module's.
    """
    try:
        init = _init(module)
    except Exception as error:  # a configuration can be no network's in any way
        raise ValueError(f"the configuration describes no {type(module).__name__} that works: {error}") from error
    dtype = param_dtype or module.param_dtype  # pyright: ignore[reportAttributeAccessIssue]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), init)


@functools.lru_cache(maxsize=64)
def _init(module: nn.Module) -> Any:
    # equal modules have equal trees; tracing one takes half a second, and loading asks twice
    return jax.eval_shape(module.init, jax.random.key(0), *module.inputs())["params"]  # pyright: ignore[reportAttributeAccessIssue]


def keys(tree: Mapping) -> dict[str, tuple[str, ...]]:
    """PyTorch's key of each parameter, and its path in the tree."""
    return {torch_key(path): path for path in flat(tree)}


def torch_key(path: tuple[str, ...]) -> str:
    """PyTorch's key of the parameter at a path."""
    return ".".join((*path[:-1], LEAVES.get(path[-1], path[-1])))


def flat(tree: Mapping) -> dict[tuple[str, ...], Any]:
    """The leaves of a tree by path."""
    return dict(flatten_dict(tree))  # pyright: ignore[reportArgumentType, reportReturnType]


def to_flax(leaf: str, array: np.ndarray) -> np.ndarray:
    """PyTorch's layout to Flax's, a view; `leaf` is the parameter's name."""
    if leaf != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def to_torch(leaf: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_flax`."""
    if leaf != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch's layout of a parameter of this shape."""
    return to_torch(leaf, np.broadcast_to(np.empty(()), shape)).shape


def to_device(array: np.ndarray) -> jax.Array:
    """A copy on the default device.

    A transposed view is copied once, where `jnp.array` makes two copies. Contiguous memory is copied by `jnp.array`: on
    the CPU JAX would else share it with the file.
    """
    return jnp.array(array) if array.flags.c_contiguous else jax.device_put(array)


def shape_of(array: np.ndarray) -> jax.ShapeDtypeStruct:
    """A `put` that keeps only the shape and type of each array."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def cast(array: np.ndarray, dtype: Any, what: str) -> np.ndarray:
    """The array in another dtype. None leaves it, but takes 8-bit floats, which nothing computes with, to bfloat16.

    Raises:
      CheckpointError: it holds values that the dtype cannot, which would become infinite or NaN; `what` is its name.
    """
    if dtype is None and array.dtype.name.startswith("float8"):
        return array.astype(jnp.bfloat16)  # which holds every one of them
    if dtype is None or array.dtype == dtype:
        return array
    if array.dtype.kind == "V":  # bfloat16 and the like, whose casts report no overflow
        array = array.astype(np.float32)
    largest = float(jnp.finfo(dtype).max)
    try:
        with np.errstate(over="raise"):
            if jnp.dtype(dtype).itemsize == 1 and np.abs(array).max(initial=0) > largest:  # nor do casts to 8 bits
                raise FloatingPointError
            return array.astype(dtype, copy=False)
    except FloatingPointError as error:
        name = jnp.dtype(dtype).name
        raise CheckpointError(
            f"{what} holds values beyond {name}'s largest, {largest:,.0f}; give param_dtype=jnp.bfloat16, which has a "
            "larger range, or None"
        ) from error


def params_from_torch(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    param_dtype: Any = None,
    put: Callable[[np.ndarray], Any] = to_device,
    permits: Callable[[str], bool] = lambda key: False,
    edit: Callable[[Checkpoint], Checkpoint] = lambda found: found,
) -> dict:
    """The parameters of a module from a checkpoint in diffusers' naming, tensor by tensor.

    Args:
      checkpoint: every tensor must be used, and every parameter found.
      param_dtype: cast parameters to this dtype; None: as stored.
      put: a function for each array, which is a view of the file: `to_device`, a copy, or a `jax.device_put` to a
        sharding. With `shape_of` none is read.
      permits: whether a key may go unused.
      edit: what to change in the checkpoint once its names are the module's.
    Raises:
      CheckpointError: keys missing, unused or of another shape, all in one message; weights in integers; values that
        `param_dtype` cannot hold.
    """
    tree = abstract(module)
    wanted, leaves = keys(tree), flat(tree)
    shapes = {key: torch_shape(path[-1], leaves[path].shape) for key, path in wanted.items()}
    found = edit(unprefixed(canonical(checkpoint, module), shapes))
    check(found, shapes, f"{checkpoint.source} as {type(module).__name__}", permits)
    integers = [key for key in wanted if np.dtype(found.stored[key].dtype).kind in "iub"]
    if integers:
        name = np.dtype(found.stored[integers[0]].dtype).name
        raise CheckpointError(
            f"{checkpoint.source}: {len(integers)} weights are integers, such as {integers[0]} ({name}), quantised in "
            "a way that is not read; take the model in float32, 16 bits or 8-bit floats"
        )
    params = {}
    for key, path in wanted.items():
        if put is shape_of:
            array = np.broadcast_to(np.empty((), param_dtype or found.stored[key].dtype), shapes[key])
            params[path] = put(to_flax(path[-1], array))
            continue
        array = to_flax(path[-1], found[key].reshape(shapes[key]))
        params[path] = put(cast(array, param_dtype, f"{checkpoint.source}: {key}"))
    return unflatten_dict(params)


def params_to_torch(params: Mapping) -> dict[str, Entry]:
    """Parameters as entries to be written in diffusers' naming and layout: the inverse of `params_from_torch`, bit for
    bit.
    """

    def entry(path, leaf):
        return Entry(torch_shape(path[-1], leaf.shape), leaf.dtype, lambda: to_torch(path[-1], np.asarray(leaf)))

    leaves = flat(params)
    return {key: entry(path, leaves[path]) for key, path in keys(params).items()}


def canonical(checkpoint: Checkpoint, module: nn.Module) -> Checkpoint:
    """The checkpoint under the module's names: old names replaced; buffers and what it does not use left out, such as
    a text encoder's projection, or its last layers ("clip skip").
    """
    text = module.config if isinstance(module, CLIPText) else None
    found = {}
    for old, stored in checkpoint.stored.items():
        key = COMPILED.sub(r"\1", old)
        if DROPPED.search(key):
            continue
        for pattern, new in RENAMED:
            key = pattern.sub(new, key)
        key = module.checkpoint_key(key)  # pyright: ignore[reportAttributeAccessIssue]
        if key is None or (text is not None and _beyond(key, text)):
            continue
        if key == old or key not in found:  # of two names of one tensor, the module's own
            found[key] = stored
    return Checkpoint(found, checkpoint.source, checkpoint.metadata)


def _beyond(key: str, text: Any) -> bool:
    layer = LAYER.match(key)
    if key == "text_projection.weight":
        return not text.with_projection
    return key == "logit_scale" or (layer is not None and int(layer[1]) >= text.num_hidden_layers)


def unprefixed(found: Checkpoint, wanted: Collection[str]) -> Checkpoint:
    """The checkpoint without what stands before all of the wanted names, such as "module." or "unet."."""
    first = next(iter(wanted), "")
    before = [key.removesuffix(first) for key in found if key.endswith("." + first)]
    if first in found or len(before) != 1 or not all(before[0] + key in found for key in wanted):
        return found
    short = {key.removeprefix(before[0]): stored for key, stored in found.stored.items()}
    return Checkpoint(short, found.source, found.metadata)


def check(
    found: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    what: str,
    permits: Callable[[str], bool] = lambda key: False,
) -> None:
    """Raise one CheckpointError that tells all keys missing, unused (unless permitted) or of another shape."""
    there = {key: tuple(found.shape(key)) for key in found}
    lines = differences(there, shapes, _same, permits, kind)
    if lines:
        if shapes.keys() - found.keys():
            refuse_foreign(found)
        raise CheckpointError("\n".join([f"{what}: {lines[0]}", *lines[1:]]))


def refuse_foreign(found: Checkpoint, *, changes: bool = False) -> None:
    """Raise CheckpointError if the keys are those of a LoRA, a ControlNet or the like.

    Args:
      changes: whether the file may be a LoRA, with the names of any network.
    """
    for _, name in FOREIGN[:3] if changes else FOREIGN:
        if any(kind(key) == name for key in found):
            raise CheckpointError(f"{found.source} is {name}")


def kind(key: str) -> str | None:
    """What a key is part of, if not of the networks here: a LoRA, a ControlNet or the like."""
    return next((name for pattern, name in FOREIGN if pattern.search(key)), None)


def permitted(patterns: str | Sequence[str]) -> Callable[[str], bool]:
    """Whether a key is like one of the patterns, in which "*" stands for anything and "?" for one sign.

    Example:
      >>> permits = permitted(["extra.*", "step"])
      >>> [permits(key) for key in ("extra.a.b", "step", "steps")]
      [True, True, False]
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return lambda key: any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _same(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    # CompVis files hold linear maps as convolutions of size 1
    return found == wanted or (len(wanted) == 2 and found == wanted + (1,) * (len(found) - 2))
