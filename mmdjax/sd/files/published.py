"""DiT and SiT as their authors published them: single files whose names and configurations are not diffusers'.

Shapes say everything but two things. The heads: the published models have heads of 64 channels, those of width 1152
(XL) heads of 72. And which of the two a file is: DiT and SiT have the same tensors, so the caller must say. The
positions in a file are not parameters but the sines and cosines that `sincos_positions` makes; their number gives the
size of the training's latents.

References:
  github.com/facebookresearch/DiT and github.com/willisma/SiT, models.py and train.py.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdjax.checkpoint import Checkpoint, CheckpointError
from mmdjax.sd.files.compvis import Source
from mmdjax.sd.networks.transformers.blocks import sincos_positions

MARKS = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight")
POSITIONS = "pos_embed"
CLASSES = ("DiT", "SiT")
XL = 1152  # the width whose heads have 72 channels
RENAMED = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "emb.class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def is_published(file: Checkpoint) -> bool:
    """Whether a single file is a DiT or a SiT in its authors' naming."""
    return all(mark in file for mark in MARKS)


def translate(file: Checkpoint, given: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Checkpoint]:
    """A published file as config.json of `DiT` or `SiT` and the tensors under our names.

    Args:
      given: settings in place of those that the shapes say; "_class_name" must be among them, "DiT" or "SiT".
    Raises:
      CheckpointError: positions that are not those of a square grid, or are missing.
      ValueError: no class is given, or a width whose heads are not known.
    """
    config = _config(file, given or {})
    _check_positions(file, config)
    return config, Checkpoint(_renamed(file), file.source, file.metadata)


def _renamed(file: Checkpoint) -> dict[str, Any]:
    # a key without a rule keeps its name, and is reported as unused
    found = {}
    for key, stored in file.stored.items():
        name, _, leaf = key.rpartition(".")
        block = BLOCK.fullmatch(name)
        if key == POSITIONS:
            continue
        if block is None:
            found[f"{RENAMED.get(name, name)}.{leaf}".removeprefix(".")] = stored
        elif block[2] == "attn.qkv":
            for third, part in enumerate(("to_q", "to_k", "to_v")):
                found[f"transformer_blocks.{block[1]}.attn1.{part}.{leaf}"] = Source(key, "third", third).of(file)
        else:
            found[f"transformer_blocks.{block[1]}.{IN_BLOCK.get(block[2], block[2])}.{leaf}"] = stored
    return found


def _config(file: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("_class_name") not in CLASSES:
        raise ValueError(
            f"{file.source}: DiT, a model of noise, and SiT, a model of velocity, have the same tensors; give "
            'load(..., configs={"transformer": {"_class_name": "DiT"}}) or {"_class_name": "SiT"}'
            + (f", not {given['_class_name']!r}" if "_class_name" in given else "")
        )
    width, channels, patch, _ = _shape(file, "x_embedder.proj.weight", 4)
    heads = given.get("num_attention_heads", 16 if width == XL else width // 64)
    if not isinstance(heads, int) or heads < 1 or width % heads or ("num_attention_heads" not in given and width % 64):
        raise ValueError(
            f"{file.source} is {width} wide, and {heads} heads do not divide it; give their number: "
            'load(..., configs={"transformer": {"_class_name": ..., "num_attention_heads": ...}})'
        )
    out, _ = _shape(file, "final_layer.linear.weight", 2)
    rows, _ = _shape(file, "y_embedder.embedding_table.weight", 2)
    blocks = {int(match[1]) for match in map(BLOCK.fullmatch, file) if match}
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": out // max(patch, 1) ** 2,
        "num_layers": 1 + max(blocks),
        "patch_size": patch,
        "num_embeds_ada_norm": rows - 1,  # the last is the null class
    }
    if POSITIONS in file:
        config["sample_size"] = patch * math.isqrt(_shape(file, POSITIONS, 3)[1])
    return config | dict(given)


def _shape(file: Checkpoint, key: str, axes: int) -> tuple[int, ...]:
    if key not in file or len(file.shape(key)) != axes:
        shape = f"has shape {list(file.shape(key))}" if key in file else "is missing"
        raise CheckpointError(f"{file.source} is no whole DiT or SiT: {key} {shape}")
    return file.shape(key)


def _check_positions(file: Checkpoint, config: Mapping[str, Any]) -> None:
    if "sample_size" not in config:
        raise CheckpointError(
            f"{file.source} lacks {POSITIONS}, which says for what size it was trained; give the side of its latents: "
            'load(..., configs={"transformer": {"_class_name": ..., "sample_size": ...}})'
        )
    if POSITIONS not in file:
        return
    _, length, width = file.shape(POSITIONS)
    side = math.isqrt(length)
    # .01: the moving average of a constant drifts by rounding
    if side**2 != length or not np.allclose(
        file[POSITIONS][0].astype(np.float32), sincos_positions(side, side, width), atol=0.01
    ):
        raise CheckpointError(
            f"{file.source}: {POSITIONS} of shape {list(file.shape(POSITIONS))} are not the sines and cosines of a "
            "square grid; other positions are not implemented"
        )
