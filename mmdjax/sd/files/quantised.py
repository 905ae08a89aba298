"""Weights in 8 bits with a scale, as they are shared on the web: read as value × scale, tensor by tensor.

A tensor `layer.weight` in 8-bit floats or integers comes with its scale beside it: one number (`layer.scale_weight` or
`layer.weight_scale`), one for each row, or one for each block of 128 × 128 (`layer.weight_scale_inv`, which multiplies
too). In float32 the product is right to rounding; `param_dtype` casts it further. What else lies beside them, scales of
activations and marks, is left out: it is for arithmetic in 8 bits, which is not done here. 8-bit floats without scales
are what they are.

Weights that are packed, several to a byte or with zero points, are refused by the name of their format.

References:
  Micikevicius et al. 2022 (the 8-bit floats); DeepSeek-AI 2024, section 3.3 (scales of blocks).
"""

import math
import re

import numpy as np

from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
BLOCK = 128
# Beside scaled weights: scales of activations, and marks of the tools that wrote them.
MARKS = re.compile(r"(^|\.)(scale_input|input_scale|comfy_quant|scaled_fp8)$")
PACKED = (  # by what only they have
    (re.compile(r"\.(absmax|quant_map|nested_absmax)$|\.quant_state\.bitsandbytes__|\.SCB$"), "bitsandbytes"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ, AWQ or SVDQuant"),
    (re.compile(r"\.weight_scale_2$|\.weight_packed$"), "4 bits"),
)


def scaled(file: Checkpoint) -> Checkpoint:
    """The file's tensors, those with a scale multiplied by it when they are read.

    Raises:
      CheckpointError: a scale whose shape fits no weight, or a file of a format that is not read; by name.

    Example:
      >>> from mmdjax.checkpoint import Entry
      >>> stored = {"a.weight": Entry((2,), np.float32, lambda: np.ones(2, np.float32)),
      ...           "a.scale_weight": Entry((), np.float32, lambda: np.float32(3))}
      >>> found = scaled(Checkpoint(stored, "model"))
      >>> {key: value.tolist() for key, value in found.items()}
      {'a.weight': [3.0, 3.0]}
    """
    for pattern, name in PACKED:
        first = next((key for key in file if pattern.search(key)), None)
        if first is not None:
            raise CheckpointError(
                f"{file.source} is quantised by {name} ({first}), which is not read; take the model in float32, 16 "
                "bits or 8-bit floats"
            )
    found, scales = {}, {}
    for key, stored in file.stored.items():
        layer, _, leaf = key.rpartition(".")
        weight = f"{layer}.weight" if layer else "weight"
        if leaf in SCALES and weight in file:
            scales[weight] = key
        elif not MARKS.search(key):
            found[key] = stored
    for weight, scale in scales.items():
        found[weight] = _product(file, weight, scale)
    return Checkpoint(found, file.source, file.metadata)


def _product(file: Checkpoint, weight: str, scale: str) -> Entry:
    stored, factor = file.stored[weight], file.stored[scale]
    shape, size = tuple(stored.shape), math.prod(factor.shape)
    blocks = tuple(-(-side // BLOCK) for side in shape)
    by_row = bool(shape) and size == shape[0] and factor.shape[:1] == shape[:1]
    fits = size == 1 or by_row or (len(shape) == 2 and tuple(factor.shape) == blocks)
    if not fits or np.dtype(stored.dtype).kind == "u":
        raise CheckpointError(
            f"{file.source}: {scale} of shape {list(factor.shape)} scales no {weight} of shape {list(shape)} in "
            f"{np.dtype(stored.dtype).name}; known: one number, one for each row, or one for each block of "
            f"{BLOCK} × {BLOCK}, for floats and int8"
        )

    def read() -> np.ndarray:
        value, by = stored.read().astype(np.float32), factor.read().astype(np.float32)
        if size == 1:
            return value * by.reshape(())
        if by_row:
            return value * by.reshape(-1, *(1,) * (len(shape) - 1))
        return value * by.repeat(BLOCK, 0)[: shape[0]].repeat(BLOCK, 1)[:, : shape[1]]

    return Entry(shape, np.dtype(np.float32), read)
