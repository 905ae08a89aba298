"""FLUX's own single files: which network it is, its configuration from shapes, and where each parameter stands.

The files name blocks and embeddings otherwise than diffusers, fuse queries, keys and values (in FLUX.1's single blocks
the feed-forward's first product, too), and hold the last modulation as shift and scale, not as scale and shift. Shapes
say everything but how the rotary positions divide a head among their axes, in which all published models of a family
agree.

References:
  the modules in github.com/black-forest-labs/flux and github.com/black-forest-labs/flux2.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry

PREFIXES = ("model.diffusion_model.", "")
MARKER = "double_blocks."
ALL = ((0, None),)
EMBEDDERS = {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in", "text_embedder": "vector_in"}
TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}
FUSED = {  # in a double block: the tensor, and which third of it
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
}
ROWS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")  # of linear1 in FLUX.1's single blocks


class Rows(NamedTuple):
    """Where a parameter is: a key, and ranges of its tensor's rows, in order; None is its end."""

    key: str
    ranges: tuple[tuple[int, int | None], ...] = ALL

    def of(self, checkpoint: Checkpoint) -> Any:
        """The rows as an entry of a checkpoint, read when it is used."""
        whole = checkpoint.stored[self.key]
        if self.ranges == ALL or not whole.shape:
            return whole
        slices = [slice(*ends) for ends in self.ranges]
        rows = sum(len(range(whole.shape[0])[rows]) for rows in slices)
        return Entry((rows, *whole.shape[1:]), whole.dtype, lambda: _gathered(whole.read(), slices))


def network(file: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """The prefix of a FLUX transformer's keys in a file, and its config.json; None if the file holds none.

    Raises:
      CheckpointError: it has such blocks, but is neither FLUX.1 nor FLUX.2.
    """
    for prefix in PREFIXES:
        mine = file.part(prefix)
        if not any(key.startswith(MARKER) for key in mine):
            continue
        fused = "double_blocks.0.img_attn.qkv.weight" in mine
        if fused and "double_stream_modulation_img.lin.weight" in mine:
            return prefix, flux2_config(mine)
        if fused and "vector_in.in_layer.weight" in mine:
            return prefix, flux_config(mine)
        raise CheckpointError(
            f"{file.source} is a diffusion transformer with {prefix}{MARKER}*, but neither FLUX.1 (vector_in.*) nor "
            "FLUX.2 (double_stream_modulation_img.*); others, such as Chroma and HunyuanVideo, are not implemented"
        )
    return None


def flux_config(flux: Checkpoint) -> dict[str, Any]:
    """config.json of FLUX.1's transformer."""
    head = _head(flux)
    return _common(flux, head) | {
        "_class_name": "FluxTransformer2DModel",
        "pooled_projection_dim": _matrix(flux, "vector_in.in_layer.weight")[1],
        "axes_dims_rope": [head // 8, 7 * head // 16, 7 * head // 16],
    }


def flux2_config(flux: Checkpoint) -> dict[str, Any]:
    """config.json of FLUX.2's transformer."""
    head = _head(flux)
    width, hidden = _matrix(flux, "double_blocks.0.img_mlp.2.weight")
    return _common(flux, head) | {
        "_class_name": "Flux2Transformer2DModel",
        "timestep_guidance_channels": _matrix(flux, "time_in.in_layer.weight")[1],
        "mlp_ratio": hidden / max(width, 1),
        "axes_dims_rope": [head // 4] * 4,
    }


def sources(keys: Iterable[str], width: int) -> dict[str, Rows]:
    """The places of diffusers' keys of a FLUX transformer, whose tokens have `width` channels, without its prefix."""
    return {key: source(key, width) for key in keys}


def source(key: str, width: int) -> Rows:
    """`transformer_blocks.0.attn.to_k.weight` is the second third of `double_blocks.0.img_attn.qkv.weight`, and so on.

    Example:
      >>> source("single_transformer_blocks.3.attn.to_k.bias", width=8)
      Rows(key='single_blocks.3.linear1.bias', ranges=((8, 16),))
    """
    name, leaf = key.rsplit(".", 1)
    match name.split(".", 2):
        case ["transformer_blocks", i, part] if part in FUSED:
            place, third = FUSED[part]
            return Rows(f"double_blocks.{i}.{place}.{leaf}", (_rows(third, width, last=2),))
        case ["transformer_blocks", i, part]:
            return Rows(f"double_blocks.{i}.{DOUBLE[part]}.{'scale' if '.norm_' in part else leaf}")
        case ["single_transformer_blocks", i, part] if part in ROWS:
            return Rows(f"single_blocks.{i}.linear1.{leaf}", (_rows(ROWS.index(part), width, last=3),))
        case ["single_transformer_blocks", i, part]:
            return Rows(f"single_blocks.{i}.{SINGLE[part]}.{'scale' if '.norm_' in part else leaf}")
        case ["time_text_embed" | "time_guidance_embed", embedder, layer]:
            return Rows(f"{EMBEDDERS[embedder]}.{'in' if layer == 'linear_1' else 'out'}_layer.{leaf}")
        case ["norm_out", _]:
            return Rows(f"{TOP[name]}.{leaf}", ((width, None), (0, width)))
    return Rows(f"{TOP[name]}.{leaf}")


def _common(flux: Checkpoint, head: int) -> dict[str, Any]:
    (width, channels), (features, _) = (_matrix(flux, f"{name}.weight") for name in ("img_in", "final_layer.linear"))
    return {
        "in_channels": channels,
        "out_channels": None if features == channels else features,
        "num_layers": _count(flux, MARKER),
        "num_single_layers": _count(flux, "single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // max(head, 1),
        "joint_attention_dim": _matrix(flux, "txt_in.weight")[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in flux,
    }


def _head(flux: Checkpoint) -> int:
    key = "double_blocks.0.img_attn.norm.query_norm.scale"
    if key not in flux or len(flux.shape(key)) != 1:
        raise CheckpointError(f"{flux.source} lacks {key}, a vector that says how large a head of attention is")
    return flux.shape(key)[0]


def _matrix(flux: Checkpoint, key: str) -> tuple[int, int]:
    shape = flux.shape(key) if key in flux else ()
    if len(shape) != 2:
        raise CheckpointError(
            f"{flux.source}: {key} should be a matrix, but {'is ' + str(list(shape)) if shape else 'is missing'}"
        )
    return shape


def _count(flux: Checkpoint, start: str) -> int:
    return len({key.split(".")[1] for key in flux if key.startswith(start)})


def _rows(index: int, width: int, last: int) -> tuple[int, int | None]:
    # the last piece takes the rest, so that a tensor of too many rows has a part of another shape
    return index * width, None if index == last else (index + 1) * width


def _gathered(array: np.ndarray, slices: list[slice]) -> np.ndarray:
    pieces = [array[rows] for rows in slices]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
