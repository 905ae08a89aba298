"""The single-file layout of Stable Diffusion 3 and 3.5: its networks, configurations and names, from keys and shapes.

    model.diffusion_model.  the transformer: x_embedder, joint_blocks.*, final_layer; or these names without a prefix
    first_stage_model.      the autoencoder, in CompVis's names
    text_encoders.          clip_l, clip_g and t5xxl, each under "transformer." in transformers' names

Heads have 64 channels, and the training size is that of the published models. The two numbers that scale latents are
nowhere in the file; they are those of all published ones.

References:
  the modules of github.com/Stability-AI/sd3.5 (mmditx.py).
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from mmdjax.checkpoint import Checkpoint, Entry
from mmdjax.sd.files.compvis import Source
from mmdjax.sd.files.single import UNET, VAE, Part, checked, clip_config, count, vae_config

MARKER = "joint_blocks.0.x_block.attn.qkv.weight"
TEXTS = {name: f"text_encoders.{part}.transformer." for name, part in (
    ("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl"),
)}  # fmt: skip
IGNORED = re.compile(r"text_encoders\.\w+\.(transformer\.)?logit_scale|model_sampling\.\w+")
OUTSIDE = {  # of the blocks
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
INSIDE = {
    "x_block": {
        "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.ln_q": "attn.norm_q",
        "attn.ln_k": "attn.norm_k",
        "attn.proj": "attn.to_out.0",
        "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "attn2.ln_q": "attn2.norm_q",
        "attn2.ln_k": "attn2.norm_k",
        "attn2.proj": "attn2.to_out.0",
        "adaLN_modulation.1": "norm1.linear",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    },
    "context_block": {
        "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn.ln_q": "attn.norm_added_q",
        "attn.ln_k": "attn.norm_added_k",
        "attn.proj": "attn.to_add_out",
        "adaLN_modulation.1": "norm1_context.linear",
        "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
    },
}


def found_in(file: Checkpoint) -> bool:
    """Whether a single file is of this layout."""
    return UNET + MARKER in file or MARKER in file


def parts(
    file: Checkpoint,
    configs: Mapping[str, Mapping] | None = None,
    permits: Callable[[str], bool] = lambda key: False,
) -> dict[str, Part]:
    """The networks by component ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3").

    Args:
      configs: parsed config.json of components, in place of what the shapes say.
    Raises:
      CheckpointError: keys that belong to no network.
    """
    prefix = UNET if UNET + MARKER in file else ""
    whole = file.part(prefix)
    if not prefix:  # beside other parts
        others = (VAE, "text_encoders.")
        whole = Checkpoint({k: v for k, v in whole.stored.items() if not k.startswith(others)}, file.source)
    found = {"transformer": Part(prefix, transformer_config(whole), tensors=renamed(whole))}
    if f"{VAE}encoder.conv_in.weight" in file:
        found["vae"] = Part(VAE, autoencoder_config(file.part(VAE)))
    for name, start in TEXTS.items():
        text = file.part(start)
        if name == "text_encoder_3" and "shared.weight" in text:
            tied = "encoder.embed_tokens.weight"  # the table once more
            tensors = Checkpoint({k: v for k, v in text.stored.items() if k != tied}, file.source)
            found[name] = Part(start, t5_config(text), tensors=tensors)
        elif "text_model.embeddings.token_embedding.weight" in text:
            found[name] = Part(start, text_config(text, name), tensors=text_tensors(text, name))
    return checked(file, found, configs, permits, IGNORED)


def transformer_config(tensors: Checkpoint) -> dict[str, Any]:
    """config.json of the transformer, from its tensors."""
    width, channels, patch, _ = tensors.shape("x_embedder.proj.weight")
    layers = count(tensors, "joint_blocks.{}.x_block.attn.qkv.weight")
    scale = "joint_blocks.0.x_block.attn.ln_q.weight"
    head = tensors.shape(scale)[0] if scale in tensors else 64
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": tensors.shape("final_layer.linear.weight")[0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": tensors.shape("context_embedder.weight")[1],
        "caption_projection_dim": tensors.shape("context_embedder.weight")[0],
        "pooled_projection_dim": tensors.shape("y_embedder.mlp.0.weight")[1],
        "pos_embed_max_size": math.isqrt(tensors.shape("pos_embed")[1]),
        "dual_attention_layers": [
            i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in tensors
        ],
        "qk_norm": "rms_norm" if scale in tensors else None,
    }  # fmt: skip


def autoencoder_config(vae: Checkpoint) -> dict[str, Any]:
    """config.json of the autoencoder with 16 channels."""
    return vae_config(vae, 1.5305) | {
        "shift_factor": 0.0609,
        "use_quant_conv": "quant_conv.weight" in vae,
        "use_post_quant_conv": "post_quant_conv.weight" in vae,
    }


def text_config(text: Checkpoint, name: str) -> dict[str, Any]:
    """config.json of CLIP-L or bigG: both are used with their projection."""
    config = clip_config(text)
    second = name == "text_encoder_2"
    width = text.shape("text_projection.weight")[0] if second else config["hidden_size"]
    act = {"hidden_act": "gelu"} if second else {}
    return config | act | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": width}


def text_tensors(text: Checkpoint, name: str) -> Checkpoint:
    """The tensors of CLIP-L or bigG. SD 3 uses CLIP-L's pooled state as it is, so its projection is the identity.

    Some files hold CLIP's own projection, which was trained with pictures and is not used.
    """
    found = {key: value for key, value in text.stored.items() if key != "logit_scale"}
    if name == "text_encoder":
        table = text.stored["text_model.embeddings.token_embedding.weight"]
        width, dtype = table.shape[1], table.dtype
        found["text_projection.weight"] = Entry((width, width), dtype, lambda: np.eye(width, dtype=dtype))
    return Checkpoint(found, text.source)


def t5_config(text: Checkpoint) -> dict[str, Any]:
    """config.json of the T5 encoder (v1.1: gated, gelu)."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    vocabulary, width = text.shape("shared.weight")
    buckets, heads = text.shape(f"{attention}.relative_attention_bias.weight")
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": text.shape(f"{attention}.q.weight")[0] // heads,
        "d_ff": text.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": count(text, "encoder.block.{}.layer.0.SelfAttention.q.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    }


def renamed(tensors: Checkpoint) -> Checkpoint:
    """The transformer's tensors under diffusers' names. Others keep theirs, and are reported as unused."""
    return Checkpoint(dict(_renamed(tensors)), tensors.source)


def _renamed(tensors: Checkpoint) -> Iterator[tuple[str, Any]]:
    for key, stored in tensors.stored.items():
        place, _, leaf = key.rpartition(".")
        match key.split("."):
            case ["pos_embed"]:
                yield "pos_embed.pos_embed", stored
            case ["joint_blocks", i, side, *inner, _] if ".".join(inner) in INSIDE.get(side, ()):
                new = INSIDE[side][".".join(inner)]
                if isinstance(new, tuple):  # queries, keys and values in one
                    for third, name in enumerate(new):
                        yield f"transformer_blocks.{i}.{name}.{leaf}", Source(key, "third", third).of(tensors)
                    continue
                # the last block's context has no feed-forward, and so no gate
                last = f"joint_blocks.{i}.context_block.mlp.fc1.weight" not in tensors
                swapped = last and new == "norm1_context.linear"
                yield f"transformer_blocks.{i}.{new}.{leaf}", _whole(key, swapped).of(tensors)
            case _ if place in OUTSIDE:
                new = OUTSIDE[place]
                yield f"{new}.{leaf}", _whole(key, new == "norm_out.linear").of(tensors)
            case _:
                yield key, stored


def _whole(key: str, swapped: bool) -> Source:
    # layers without a gate have shift and scale here, scale and shift in diffusers
    return Source(key, "swapped" if swapped else "all")


def sources(keys: Collection[str]) -> dict[str, Source]:
    """The places of diffusers' keys of the transformer in such a file: the inverse of `renamed`.

    Example:
      >>> sources(["transformer_blocks.3.attn.to_k.bias"])
      {'transformer_blocks.3.attn.to_k.bias': Source(key='joint_blocks.3.x_block.attn.qkv.bias', piece='third', third=1,
      heads=1)}
    """
    outside = {new: old for old, new in OUTSIDE.items()}
    inside = {}
    for side, names in INSIDE.items():
        for old, new in names.items():
            several = new if isinstance(new, tuple) else (new,)
            inside |= {name: (f"{side}.{old}", None if new is name else i) for i, name in enumerate(several)}
    found = {}
    for key in keys:
        name, _, leaf = key.rpartition(".")
        match name.split(".", 2):
            case ["transformer_blocks", i, part] if part in inside:
                place, third = inside[part]
                old = f"joint_blocks.{i}.{place}.{leaf}"
                last = f"transformer_blocks.{i}.ff_context.net.0.proj.weight" not in keys
                swapped = last and part == "norm1_context.linear"
                found[key] = _whole(old, swapped) if third is None else Source(old, "third", third)
            case _ if name in outside:
                found[key] = _whole(f"{outside[name]}.{leaf}", name == "norm_out.linear")
    return found
