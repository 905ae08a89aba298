"""T5's encoder, versions 1.0 and 1.1: the text encoder of PixArt, and one of those of Stable Diffusion 3 and FLUX.1.

    h_0 = token,   h ← h + W_o softmax(q kᵀ + b) v  of rms h,   then  h ← h + W_o f(rms h),   y = rms h_L.

There are no positions: b depends on the distance of key and query alone, is learnt by head, and is the same in all
layers. Distances are kept apart one by one up to a quarter of the buckets, then ever more coarsely, and not at all
beyond `relative_attention_max_distance`. The logits are not divided by √d. f(x) is relu(W_i x) in version 1.0 and
gelu(W_i0 x) W_i1 x in 1.1.

The sum h and what f multiplies outgrow float16, so they are float32 where the module computes in half precision.

References:
  Raffel et al. 2020, section 2.1 (T5); Shazeer 2020 (gated feed-forward); Zhang & Sennrich 2019 (RMS norm).
"""

import dataclasses
import math
import re
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmdjax.sd.config import Config, check_size
from mmdjax.sd.networks.layers import Block, attend

FEED_FORWARDS = {"relu": (nn.relu, False), "gated-gelu": (lambda x: nn.gelu(x, approximate=True), True)}
GATED = {"relu": "relu", "gated-gelu": "gelu_new"}  # what a config calls the function between
DECODER = re.compile(r"(decoder\.|lm_head\.)")


@dataclasses.dataclass(frozen=True)
class T5EncoderConfig(Config):
    """The config.json of a T5 encoder, or of a whole T5, whose decoder is left out."""

    CLASSES: ClassVar = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model")
    OPEN: ClassVar = True
    FIXED: ClassVar = {"is_decoder": False}

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @classmethod
    def from_json(cls, raw):
        """See `Config.from_json`.

        Raises:
          ValueError: another model's file, a feed-forward that is not implemented, or buckets that cannot be filled.
        """
        config = super().from_json(raw)
        check_size(config, config.num_layers)
        kind = config.feed_forward_proj
        if kind not in FEED_FORWARDS:
            raise ValueError(f"feed_forward_proj is {kind!r}; implemented: {tuple(FEED_FORWARDS)}")
        if raw.get("dense_act_fn", GATED[kind]) != GATED[kind]:
            raise ValueError(f"dense_act_fn is {raw['dense_act_fn']!r}; implemented with {kind!r}: {GATED[kind]!r}")
        exact = config.relative_attention_num_buckets // 4
        if exact < 1 or config.relative_attention_max_distance <= exact:
            raise ValueError(
                f"relative_attention_num_buckets is {config.relative_attention_num_buckets} and "
                f"relative_attention_max_distance {config.relative_attention_max_distance}; give at least 4 buckets, "
                "and a distance beyond a quarter of them"
            )
        return config

    @property
    def hidden_size(self) -> int:
        """The width of the states."""
        return self.d_model


class T5Output(NamedTuple):
    """The output of the encoder for ids [n, l].

    Args:
      last: y = rms h_L, [n, l, d].
      hidden: h_0 … h_L before the final norm, each [n, l, d]; at least float32.
    """

    last: Float[Array, "n l d"]
    hidden: tuple[Float[Array, "n l d"], ...]


class T5Encoder(Block):
    """T5's encoder: ids [n, l] -> `T5Output`.

    A checkpoint may hold the table of tokens as `shared`, as `encoder.embed_tokens`, or as both, which are the same.
    """

    config: T5EncoderConfig

    def inputs(self):
        return (jax.ShapeDtypeStruct((1, 2), jnp.int32),)

    def checkpoint_key(self, key):
        if DECODER.match(key):
            return None
        return "shared.weight" if key == "encoder.embed_tokens.weight" else key

    @nn.compact
    def __call__(self, ids: Int[Array, "n l"], mask: Bool[Array, "n l"] | None = None) -> T5Output:
        """The states of all tokens; with a mask, only those where it is True are attended to."""
        cfg, sums = self.config, jnp.promote_types(self.dtype, jnp.float32)
        buckets = distance_buckets(
            ids.shape[1], cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance
        )
        table = nn.Embed(
            cfg.relative_attention_num_buckets,
            cfg.num_heads,
            dtype=sums,
            param_dtype=self.param_dtype,
            name="encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        )
        bias = jnp.moveaxis(table(buckets), -1, 0)[None]
        h = self.embed("shared", cfg.vocab_size, cfg.d_model)(ids).astype(sums)
        hidden = [h]
        for i in range(cfg.num_layers):
            h = self.part(Layer, f"encoder.block.{i}", cfg)(h, bias, mask)
            hidden.append(h)
        return T5Output(self.rms_norm("encoder.final_layer_norm", cfg.layer_norm_epsilon)(h), tuple(hidden))


class Layer(Block):
    """Attention with a bias, then the feed-forward: [n, l, d] -> [n, l, d]."""

    config: T5EncoderConfig

    @nn.compact
    def __call__(self, h, bias, mask):
        cfg = self.config
        n, length, width = h.shape
        x = self.rms_norm("layer.0.layer_norm", cfg.layer_norm_epsilon)(h)
        q, k, v = (
            self.dense(f"layer.0.SelfAttention.{which}", cfg.num_heads * cfg.d_kv, bias=False)(x).reshape(
                n, length, cfg.num_heads, cfg.d_kv
            )
            for which in "qkv"
        )
        y = attend(q, k, v, bias=bias, mask=mask, scale=1.0).astype(self.dtype).reshape(n, length, -1)
        h = h + self.dense("layer.0.SelfAttention.o", width, bias=False)(y)
        x = self.rms_norm("layer.1.layer_norm", cfg.layer_norm_epsilon)(h)
        act, gated = FEED_FORWARDS[cfg.feed_forward_proj]
        name = "layer.1.DenseReluDense"
        if gated:
            gate, x = (self.dense(f"{name}.wi_{i}", cfg.d_ff, bias=False)(x).astype(self.wide_dtype) for i in range(2))
            x = act(gate) * x
        else:
            x = act(self.dense(f"{name}.wi", cfg.d_ff, bias=False)(x))
        return h + self.wide_dense(f"{name}.wo", width)(x)


def distance_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "l l"]:
    """The bucket of key minus query for all pairs of places, [query, key].

    Half of the buckets are for keys after the query. Of each half, half are for single distances, and the rest are of
    equal width in log distance, up to `max_distance`.

    Example:
      >>> distance_buckets(4, 8, 16)[0].tolist()
      [0, 5, 6, 6]
    """
    half, exact = num_buckets // 2, num_buckets // 4
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # float32, as where the models were trained: a rounding decides at the edges
    far = np.log(np.maximum(distance, exact).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    coarse = np.minimum(exact + (far * (half - exact)).astype(np.int32), half - 1)
    return np.where(distance < exact, distance, coarse) + np.where(offset > 0, half, 0)
