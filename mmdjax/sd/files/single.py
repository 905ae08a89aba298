"""What is in a single-file checkpoint: its networks and their configurations, from keys and shapes alone.

Shapes say everything but three things. The heads of attention: Stable Diffusion 1 (convolutions around its
transformers) has 8 everywhere; 2 and SDXL (linear maps there) and CLIP have heads of 64 channels, the unconditional
models of 32. The scale of the latents: the file's `scale_factor` if it has one, else .18215, or .13025 for SDXL, or 1
for quantised latents. The prediction: Stable Diffusion 2's base model (noise) and its 768 model (velocity) have the
same shapes, so the caller must say which it is.

References:
  the configurations in github.com/CompVis/latent-diffusion, github.com/Stability-AI/stablediffusion and
  generative-models.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mmdjax.checkpoint import Checkpoint, CheckpointError
from mmdjax.sd.files import single_flux
from mmdjax.sd.files.convert import kind, refuse_foreign
from mmdjax.sd.files.differences import unused_lines
from mmdjax.sd.files.spellings import EDM, EDM_NAME

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
TEXTS = (  # component, prefix, whether the names are OpenCLIP's
    ("text_encoder", "cond_stage_model.transformer.", False),
    ("text_encoder", "cond_stage_model.model.", True),
    ("text_encoder", "conditioner.embedders.0.transformer.", False),
    ("text_encoder_2", "conditioner.embedders.1.model.", True),
    ("text_encoder_2", "conditioner.embedders.0.model.", True),  # the only one of SDXL's refiner
)
# Beside the networks: schedules that the configs repeat, the training's losses and tools, the moving average, and marks
# that `mmdjax.sd.files.spellings` reads.
IGNORED = re.compile(
    r"^(betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|lvlb_weights|scale_factor|global_step"
    r"|denoiser\.\w+|model_ema\..+|first_stage_model\.(loss|model_ema)\..+|cond_stage_model\.(model\.)?logit_scale"
    r"|conditioner\.embedders\.\d\.(model\.|transformer\.)?logit_scale|embedding_manager\..+|v_pred|ztsnr)$"
)
OTHERS = (  # networks of other models than those here
    (EDM, EDM_NAME),
    (re.compile(r"^depth_model\."), "a depth model: Stable Diffusion 2's for depth has a network for it"),
    (re.compile(r"^(embedder|noise_augmentor)\."), "unCLIP, which is conditioned on pictures"),
    (re.compile(r"^low_scale_model\."), "an upscaler, which is conditioned on small pictures"),
    (re.compile(r"\.(time_stack|temporal_transformer|time_mixer)\."), "a video model"),
)


DROPPED = re.compile(r"^loss\.|^model_ema\.|(^|\.)logit_scale$|^attn_mask$")
RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
DIFFUSERS = re.compile(r"^(unet\.)?(down_blocks|mid_block|up_blocks|(en|de)coder\.(down|up|mid)_blocks?)\.")


class Part(NamedTuple):
    """A network in a single file.

    Args:
      prefix: where its keys begin.
      config: its configuration.
      openclip: whether its names are OpenCLIP's.
      tensors: under diffusers' names, if its layout was read already; None: those of the prefix, in CompVis's names.
    """

    prefix: str
    config: dict[str, Any]
    openclip: bool = False
    tensors: Checkpoint | None = None


def parts(
    file: Checkpoint,
    configs: Mapping[str, Mapping] | None = None,
    permits: Callable[[str], bool] = lambda key: False,
) -> dict[str, Part]:
    """The networks in a single file by component ("unet" or "transformer", "vae" or "vqvae", and text encoders).

    Args:
      configs: parsed config.json of components, in place of what the shapes say.
      permits: whether a key may go unused.
    Raises:
      CheckpointError: no U-Net and no autoencoder in CompVis's naming; or keys that belong to no network.
    """
    found = {}
    if f"{UNET}input_blocks.0.0.weight" in file:
        found["unet"] = Part(UNET, unet_config(file.part(UNET)))
    if flux := single_flux.network(file):
        found["transformer"] = Part(*flux)
    if f"{VAE}encoder.conv_in.weight" in file:
        quantised = f"{VAE}quantize.embedding.weight" in file
        sdxl = f"{UNET}label_emb.0.0.weight" in file
        scale = 1.0 if quantised else 0.13025 if sdxl else 0.18215
        if "scale_factor" in file:
            scale = float(file["scale_factor"])
        found["vqvae" if quantised else "vae"] = Part(VAE, vae_config(file.part(VAE), scale))
    for name, prefix, openclip in TEXTS:
        marker = "token_embedding.weight" if openclip else "text_model.embeddings.token_embedding.weight"
        if prefix + marker in file:
            config = openclip_config if openclip else clip_config
            found[name] = Part(prefix, config(file.part(prefix), second=name == "text_encoder_2"), openclip)
    if not found:
        _refuse(file)
    return checked(file, found, configs, permits)


def checked(
    file: Checkpoint,
    found: Mapping[str, Part],
    configs: Mapping[str, Mapping] | None,
    permits: Callable[[str], bool],
    ignored: re.Pattern = IGNORED,
) -> dict[str, Part]:
    """The networks with the caller's configurations.

    Raises:
      CheckpointError: keys that belong to no network and are not to be ignored.
    """
    known = tuple(part.prefix for part in found.values())
    stray = [k for k in file if not (k.startswith(known) or ignored.match(k) or permits(k))]
    if stray:
        lines = unused_lines(stray, {key: tuple(file.shape(key)) for key in file}, _reason)
        raise CheckpointError("\n".join([f"{file.source}: {len(stray)} keys unused", *lines]))
    given: Mapping[str, Any] = configs or {}
    return {name: part._replace(config={**given.get(name, part.config)}) for name, part in found.items()}


def _reason(key: str) -> str | None:
    """What a key is part of, if not of the networks here."""
    return next((name for pattern, name in OTHERS if pattern.search(key)), kind(key))


def _refuse(file: Checkpoint) -> None:
    """Raise CheckpointError for a file without any network that is known, with the reason."""
    refuse_foreign(file)
    if any(key.startswith(EMA) for key in file):
        reason = (
            "holds only a moving average (model_ema.*), whose names do not say what network it is: take the file that "
            "also has the network itself (model.diffusion_model.*), and load it with ema=True"
        )
    elif any(DIFFUSERS.match(key) for key in file):
        reason = (
            "holds a network in the naming of diffusers, and no config.json that says which: put it in a folder with "
            "its config.json, as diffusion_pytorch_model.safetensors (a text encoder's: model.safetensors)"
        )
    else:
        reason = "holds no U-Net, autoencoder or text encoder in the naming of single-file checkpoints"
    raise CheckpointError(f"{file.source} {reason}")


def used(part: Part, config: Any, file: Checkpoint) -> Checkpoint:
    """A part's tensors under their names in it, without those that its network does not use.

    Stable Diffusion 2 is conditioned on OpenCLIP's layer before the last, so its text encoder has one layer less than
    OpenCLIP's, which the file may hold whole, and no projection.
    """
    mine = file.part(part.prefix)

    def drops(key: str) -> bool:
        layer = RESBLOCK.match(key)
        if part.openclip and (key == "text_projection" or layer is not None):
            return int(layer[1]) >= config.num_hidden_layers if layer else not config.with_projection
        return DROPPED.search(key) is not None

    return Checkpoint({k: v for k, v in mine.stored.items() if not drops(k)}, file.source)


def unet_config(unet: Checkpoint) -> dict[str, Any]:
    """config.json of a U-Net, from the tensors under `model.diffusion_model.`."""
    levels: list[list[int]] = [[]]  # channels of each block at each level
    attends, k = [False], 1
    while f"input_blocks.{k}.0.op.weight" in unet or f"input_blocks.{k}.0.in_layers.2.weight" in unet:
        if f"input_blocks.{k}.0.op.weight" in unet:
            levels.append([])
            attends.append(False)
        else:
            levels[-1].append(unet.shape(f"input_blocks.{k}.0.in_layers.2.weight")[0])
            attends[-1] |= f"input_blocks.{k}.1.norm.weight" in unet
        k += 1
    channels = [blocks[-1] for blocks in levels]
    contexts = [key for key in unet if key.endswith(".transformer_blocks.0.attn2.to_k.weight")]
    transformer = bool(contexts)
    prefix = "CrossAttn" if transformer else "Attn"
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel" if transformer else "UNet2DModel",
        "in_channels": unet.shape("input_blocks.0.0.weight")[1],
        "out_channels": unet.shape("out.2.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "down_block_types": [f"{prefix}DownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": [f"{prefix}UpBlock2D" if attend else "UpBlock2D" for attend in attends[::-1]],
    }
    if "middle_block.1.norm.weight" not in unet:
        config["mid_block_type"] = "UNetMidBlock2D" if "middle_block.0.in_layers.2.weight" in unet else None
    if not transformer:
        return config | {"attention_head_dim": 32}
    linear = len(unet.shape(re.sub(r"transformer_blocks\..*", "proj_in.weight", contexts[0]))) == 2
    added = _depths(unet, len(channels), len(levels[0]))
    text_time = "label_emb.0.0.weight" in unet
    if text_time:
        added |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": unet.shape("label_emb.0.0.weight")[1],
        }
    return config | added | {
        "cross_attention_dim": unet.shape(contexts[0])[1],
        "attention_head_dim": [c // 64 for c in channels] if linear else 8,
        "use_linear_projection": linear,
        "upcast_attention": linear and not text_time,  # Stable Diffusion 2 overflows in half precision without
    }  # fmt: skip


def vae_config(vae: Checkpoint, scale: float) -> dict[str, Any]:
    """config.json of an autoencoder, from the tensors under `first_stage_model.`."""
    levels = count(vae, "encoder.down.{}.block.0.conv1.weight")
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "in_channels": vae.shape("encoder.conv_in.weight")[1],
        "out_channels": vae.shape("decoder.conv_out.weight")[0],
        "block_out_channels": [vae.shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": count(vae, "encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": vae.shape("decoder.conv_in.weight")[1],
        "scaling_factor": scale,
    }
    if "quantize.embedding.weight" in vae:
        num, size = vae.shape("quantize.embedding.weight")
        config |= {"_class_name": "VQModel", "num_vq_embeddings": num, "vq_embed_dim": size}
    return config


def clip_config(text: Checkpoint, second: bool = False) -> dict[str, Any]:
    """config.json of CLIP-L's text encoder."""
    embeddings = "text_model.embeddings.{}_embedding.weight"
    vocabulary, width = text.shape(embeddings.format("token"))
    return {
        "architectures": ["CLIPTextModel"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": text.shape(embeddings.format("position"))[0],
        "num_hidden_layers": count(text, "text_model.encoder.layers.{}.mlp.fc1.weight"),
        "intermediate_size": text.shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_attention_heads": width // 64,
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,  # the last of the vocabulary, by its being the largest
    }


def openclip_config(text: Checkpoint, second: bool) -> dict[str, Any]:
    """config.json of an OpenCLIP text encoder: SDXL's second has its projection, Stable Diffusion 2's the first 23 of
    OpenCLIP-H's 24 layers. A file that was written from a folder of diffusers has just those.
    """
    vocabulary, width = text.shape("token_embedding.weight")
    layers = count(text, "transformer.resblocks.{}.mlp.c_fc.weight")
    return {
        "architectures": ["CLIPTextModelWithProjection" if second else "CLIPTextModel"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": text.shape("positional_embedding")[0],
        "num_hidden_layers": 23 if layers == 24 and not second else layers,
        "intermediate_size": text.shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
        "num_attention_heads": width // 64,
        "hidden_act": "gelu",
        "eos_token_id": 2,
        **({"projection_dim": text.shape("text_projection")[1]} if second else {}),
    }


def _depths(unet: Checkpoint, levels: int, layers: int) -> dict[str, Any]:
    """The numbers of transformer blocks: one for each level, or for each attention where they differ."""

    def counts(way: str, first: int, number: int) -> list[int]:
        places = (f"{way}_blocks.{first + j}.1.transformer_blocks.{{}}.norm1.weight" for j in range(number))
        return [count(unet, place) for place in places]

    down = [counts("input", 1 + i * (layers + 1), layers) for i in range(levels)]
    up = [counts("output", i * (layers + 1), layers + 1) for i in range(levels)]
    middle = count(unet, "middle_block.1.transformer_blocks.{}.norm1.weight")
    # a level that does not attend takes 1, a number that nothing reads; the middle has the last level's
    each = [max(depths) or 1 for depths in down]
    each[-1] = middle or each[-1]
    regular = all({*depths} <= {0, n} for n, depths in zip([*each, *each[::-1]], [*down, *up], strict=True))
    if regular:
        return {"transformer_layers_per_block": each}
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}


def count(tensors: Checkpoint, pattern: str) -> int:
    """How many of pattern.format(0), pattern.format(1), … there are."""
    n = 0
    while pattern.format(n) in tensors:
        n += 1
    return n
