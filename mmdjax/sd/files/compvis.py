"""The names of single-file checkpoints: CompVis's for U-Nets and autoencoders, OpenCLIP's for text encoders.

For each key in diffusers' naming, the key in the single file and the piece of that tensor: some tensors hold query, key
and value in one. The rules use the module's configuration, so that they hold for every size.

References:
  the modules of github.com/CompVis/latent-diffusion (openaimodel.py, model.py) and github.com/mlfoundations/open_clip.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mmdjax.checkpoint import Checkpoint, Entry
from mmdjax.sd.files import single_flux
from mmdjax.sd.networks.clip import CLIPText
from mmdjax.sd.networks.transformers.flux import FluxNetwork
from mmdjax.sd.networks.unet import UNet2D, UNet2DCondition

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
OPENCLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPENCLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


class Source(NamedTuple):
    """Where a parameter is: a key, and a piece of its tensor: all, a third, one of three by head, the transpose, or its
    halves swapped.
    """

    key: str
    piece: str = "all"
    third: int = 0
    heads: int = 1

    def of(self, checkpoint: Checkpoint) -> Any:
        """The piece as an entry of a checkpoint, read when it is used."""
        whole = checkpoint.stored[self.key]
        if self.piece == "all":
            return whole
        if self.piece == "transposed":
            return Entry(whole.shape[::-1], whole.dtype, lambda: whole.read().T)
        if self.piece == "swapped":
            return Entry(whole.shape, whole.dtype, lambda: np.roll(whole.read(), whole.shape[0] // 2, axis=0))
        rows = whole.shape[0] // 3
        return Entry((rows, *whole.shape[1:]), whole.dtype, lambda: self._third(whole.read()))

    def _third(self, array: np.ndarray) -> np.ndarray:
        # rows are laid out [head][q, k, v][channel], heads outermost; with one head that is plain thirds
        by_head = array.reshape(self.heads, 3, -1, *array.shape[1:])
        return by_head[:, self.third].reshape(-1, *array.shape[1:])


def translate(checkpoint: Checkpoint, sources: Mapping[str, Source | single_flux.Rows]) -> Checkpoint:
    """A single file's tensors under diffusers' names. Those that have none keep theirs, and are reported as unused."""
    used = {source.key for source in sources.values()}
    found = {key: source.of(checkpoint) for key, source in sources.items() if source.key in checkpoint}
    return Checkpoint(found | {k: v for k, v in checkpoint.stored.items() if k not in used}, checkpoint.source)


def sources(module: Any, keys: Iterable[str], *, openclip: bool = False) -> Mapping[str, Source | single_flux.Rows]:
    """The places of diffusers' keys of a module in the module's part of a single file (without its prefix)."""
    cfg = module.config
    if isinstance(module, CLIPText):
        return {key: openclip_source(key) if openclip else Source(key) for key in keys}
    if isinstance(module, UNet2D | UNet2DCondition):
        return {key: unet_source(key, cfg) for key in keys}
    if isinstance(module, FluxNetwork):
        return single_flux.sources(keys, cfg.width)
    return {key: Source(vae_key(key, len(cfg.block_out_channels))) for key in keys}


def unet_source(key: str, cfg: Any) -> Source:
    """`down_blocks.0.resnets.1.conv1.weight` is `input_blocks.2.0.in_layers.2.weight`, and so on."""
    per_level = cfg.layers_per_block + 1  # with the downsampler, or the block more on the way up
    place, rest = "", []
    match key.split("."):
        case ["conv_in", *rest]:
            place = "input_blocks.0.0"
        case ["conv_norm_out", *rest]:
            place = "out.0"
        case ["conv_out", *rest]:
            place = "out.2"
        case ["time_embedding" | "add_embedding" as which, linear, *rest]:
            place = f"{'time_embed' if which == 'time_embedding' else 'label_emb.0'}.{0 if linear == 'linear_1' else 2}"
        case ["down_blocks", i, "downsamplers", _, _, *rest]:
            place = f"input_blocks.{(int(i) + 1) * per_level}.0.op"
        case ["up_blocks", i, "upsamplers", _, _, *rest]:
            place = f"output_blocks.{(int(i) + 1) * per_level - 1}.{1 + ('Attn' in cfg.up_block_types[int(i)])}.conv"
        case ["mid_block", "resnets", j, *rest]:
            place = f"middle_block.{2 * int(j)}"
        case ["mid_block", "attentions", _, *rest]:
            place = "middle_block.1"
        case ["down_blocks", i, kind, j, *rest]:
            place = f"input_blocks.{1 + int(i) * per_level + int(j)}.{int(kind == 'attentions')}"
        case ["up_blocks", i, kind, j, *rest]:
            place = f"output_blocks.{int(i) * per_level + int(j)}.{int(kind == 'attentions')}"
    match rest:
        case [part, leaf] if part in UNET_RESNET and "resnets" in key:
            return Source(f"{place}.{UNET_RESNET[part]}.{leaf}")
        case ["to_q" | "to_k" | "to_v" as part, leaf]:
            return Source(f"{place}.qkv.{leaf}", "third", "qkv".index(part[-1]), cfg.heads[_level(key, cfg)])
        case ["group_norm" | "to_out", *_, leaf]:
            return Source(f"{place}.{'norm' if 'group_norm' in key else 'proj_out'}.{leaf}")
    return Source(".".join([place, *rest]))


def vae_key(key: str, levels: int) -> str:
    """`decoder.up_blocks.0.resnets.1.conv1.weight` is `decoder.up.<last>.block.1.conv1.weight`, and so on."""
    match key.replace("conv_shortcut", "nin_shortcut").split("."):
        case [coder, "down_blocks", i, "resnets", j, *rest]:
            return ".".join([coder, "down", i, "block", j, *rest])
        case [coder, "down_blocks", i, "downsamplers", _, *rest]:
            return ".".join([coder, "down", i, "downsample", *rest])
        case [coder, "up_blocks", i, "resnets", j, *rest]:
            return ".".join([coder, "up", str(levels - 1 - int(i)), "block", j, *rest])
        case [coder, "up_blocks", i, "upsamplers", _, *rest]:
            return ".".join([coder, "up", str(levels - 1 - int(i)), "upsample", *rest])
        case [coder, "mid_block", "resnets", j, *rest]:
            return ".".join([coder, "mid", f"block_{int(j) + 1}", *rest])
        case [coder, "mid_block", "attentions", _, part, *_, leaf]:
            return ".".join([coder, "mid", "attn_1", VAE_ATTENTION[part], leaf])
        case [coder, "conv_norm_out", leaf]:
            return f"{coder}.norm_out.{leaf}"
    return key


def openclip_source(key: str) -> Source:
    """`text_model.encoder.layers.0.self_attn.k_proj.weight` is the second third of
    `…resblocks.0.attn.in_proj_weight`.
    """
    if key in OPENCLIP:
        return Source(OPENCLIP[key])
    if key == "text_projection.weight":
        return Source("text_projection", "transposed")
    i, part, *inner, leaf = key.removeprefix("text_model.encoder.layers.").split(".")
    place = f"transformer.resblocks.{i}"
    match part, *inner:
        case "self_attn", "out_proj":
            return Source(f"{place}.attn.out_proj.{leaf}")
        case "self_attn", name:
            return Source(f"{place}.attn.in_proj_{leaf}", "third", "qkv".index(name[0]))
    return Source(f"{place}.{OPENCLIP_LAYER['.'.join([part, *inner])]}.{leaf}")


def ema_key(key: str) -> str:
    """CompVis's key of the moving average of `model.<key>`, which has no dots."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def _level(key: str, cfg: Any) -> int:
    match key.split("."):
        case ["down_blocks", i, *_]:
            return int(i)
        case ["up_blocks", i, *_]:
            return len(cfg.block_out_channels) - 1 - int(i)
    return len(cfg.block_out_channels) - 1
