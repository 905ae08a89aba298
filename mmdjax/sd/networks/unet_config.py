"""The configurations of the U-Nets: config.json of `mmdjax.sd.networks.unet`'s networks."""

import dataclasses
from typing import Any, ClassVar

from mmdjax.sd.config import Config, check_size, per_level

COMMON = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "mid_block_scale_factor": 1,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(Config):
    """Stable Diffusion's unet/config.json."""

    CLASSES: ClassVar = ("UNet2DConditionModel",)
    FIXED: ClassVar = COMMON | {
        "addition_embed_type_num_heads": 64,  # read by other kinds of added condition only
        "attention_type": "default",
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
    }

    sample_size: Any = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"  # distilled models have a smaller one, or none
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8  # a number of heads, whatever it is called
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool | None = False  # SDXL's file has null

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads at each level. They are in `attention_head_dim`, a misnomer that the format keeps for old files."""
        return per_level(self.num_attention_heads or self.attention_head_dim, len(self.block_out_channels))

    @property
    def depths(self) -> tuple:
        """Transformer blocks at each level that attends, a number or one for each attention."""
        return per_level(self.transformer_layers_per_block, len(self.block_out_channels))

    @property
    def depths_up(self) -> tuple:
        """Likewise on the way up."""
        return self.reverse_transformer_layers_per_block or self.depths[::-1]

    def depth(self, place: str) -> int:
        """Transformer blocks in `down_blocks.1.attentions.0` and the like."""
        match place.split("."):
            case ["down_blocks", i, _, j]:
                depth = self.depths[int(i)]
            case ["up_blocks", i, _, j]:
                depth = self.depths_up[int(i)]
            case _:
                depth, j = self.depths[-1], 0
        return depth[int(j)] if isinstance(depth, tuple) else depth

    @property
    def middle(self) -> int:
        """Residual blocks at the lowest resolution: two with attention between, one alone, or none."""
        return {"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1, None: 0}[self.mid_block_type]

    def __post_init__(self):
        check_blocks(self, {"DownBlock2D", "CrossAttnDownBlock2D"}, {"UpBlock2D", "CrossAttnUpBlock2D"})
        check_middle(self, ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None))
        nested = any(isinstance(depth, tuple) for depth in self.depths)
        if nested and self.reverse_transformer_layers_per_block is None:
            raise ValueError(
                "transformer_layers_per_block has a number for each attention; then the way up needs its own, "
                "reverse_transformer_layers_per_block"
            )
        for more, depths in enumerate((self.depths, self.depths_up)):
            lengths = {len(depth) for depth in depths if isinstance(depth, tuple)} - {self.layers_per_block + more}
            if lengths or len(depths) != len(self.block_out_channels):
                raise ValueError(
                    f"transformer_layers_per_block or its reverse is {depths}; it takes a number for each level, or "
                    f"{self.layers_per_block + more} numbers for each attention of a level"
                )
        sizes = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if self.addition_embed_type == "text_time" and None in sizes:
            raise ValueError("an SDXL U-Net needs addition_time_embed_dim and projection_class_embeddings_input_dim")
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(
                f'addition_embed_type is {self.addition_embed_type!r}; implemented: None and "text_time" (SDXL)'
            )


@dataclasses.dataclass(frozen=True)
class UNet2DConfig(Config):
    """An unconditional U-Net's config.json."""

    CLASSES: ClassVar = ("UNet2DModel",)
    FIXED: ClassVar = COMMON | {
        "add_attention": True,
        "attn_norm_num_groups": None,
        "downsample_type": "conv",
        "upsample_type": "conv",
    }

    sample_size: Any = None
    in_channels: int = 3
    out_channels: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    downsample_padding: int = 1
    attention_head_dim: int | None = 8  # here it is the size of a head; None: one head
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    mid_block_type: str | None = "UNetMidBlock2D"
    num_train_timesteps: int | None = None

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads at each level."""
        return tuple(channels // (self.attention_head_dim or channels) for channels in self.block_out_channels)

    @property
    def middle(self) -> int:
        """Residual blocks at the lowest resolution: two with attention between, or none."""
        return 0 if self.mid_block_type is None else 2

    def __post_init__(self):
        check_blocks(self, {"DownBlock2D", "AttnDownBlock2D"}, {"UpBlock2D", "AttnUpBlock2D"})
        check_middle(self, ("UNetMidBlock2D", None))


def check_middle(cfg: Any, known: tuple[str | None, ...]) -> None:
    """Raise ValueError for a block at the lowest resolution that is not implemented."""
    if cfg.mid_block_type not in known:
        raise ValueError(f"mid_block_type is {cfg.mid_block_type!r}; implemented: {', '.join(map(repr, known))}")


def check_blocks(cfg: Any, down: set[str], up: set[str]) -> None:
    """Raise ValueError for a block that is not implemented, other numbers of blocks than levels, or heads that do not
    divide the channels.
    """
    unknown = sorted({*cfg.down_block_types} - down | {*cfg.up_block_types} - up)
    if unknown:
        raise ValueError(f"blocks {unknown} are not implemented; implemented: {sorted(down | up)}")
    flat = [n for depth in getattr(cfg, "depths", ()) for n in (depth if isinstance(depth, tuple) else (depth,))]
    depth = max(flat, default=1)
    height = len(cfg.block_out_channels)
    check_size(cfg, 2 * height * (cfg.layers_per_block + 1) * (1 + depth), height)
    levels = {height, len(cfg.down_block_types), len(cfg.up_block_types), len(cfg.heads)}
    if len(levels) > 1:
        raise ValueError(
            f"block_out_channels, down_block_types, up_block_types and heads differ in length: {sorted(levels)}"
        )
    for channels, heads in zip(cfg.block_out_channels, cfg.heads, strict=True):
        if heads < 1 or channels % heads:
            raise ValueError(f"{channels} channels cannot be split in {heads} heads")
    if not isinstance(cfg.layers_per_block, int):
        raise ValueError(f"layers_per_block is {cfg.layers_per_block!r}; one number for all levels is implemented")
