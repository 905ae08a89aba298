"""Qwen3, a language model, as the text encoder of FLUX.2 klein.

    h ← h + W_o softmax(q kᵀ/√d) v  of rms h,   then   h ← h + W_down (silu(W_gate x) W_up x),  x = rms h.

Queries and keys of each head are RMS-normalised, then turned by their place: the pair (x_i, x_{i + d/2}) at place p by
the angle p θ^{−2i/d}. Attention is causal, and fewer heads of keys and values serve neighbouring heads of queries.

The condition is not the last state but those after some layers in the middle, side by side; layers above the last of
them are neither loaded nor computed, and neither is the language model's head.

References:
  Qwen team 2025 (Qwen3); Su et al. 2021 (rotary positions); Ainslie et al. 2023 (grouped queries); Shazeer 2020
  (swiglu); Black Forest Labs 2025 (FLUX.2: layers 9, 18 and 27).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmdjax.sd.config import Config, check_size
from mmdjax.sd.networks.layers import Block, attend

UNPREFIXED = re.compile(r"(embed_tokens|layers|norm)\.")
NUMBER = re.compile(r"model\.layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Qwen3Config(Config):
    """The config.json of a Qwen3.

    `out_layers` is not in published files: the states that make up the condition, 0 being the embedded tokens and i the
    sum after i layers. A config.json may hold it.
    """

    CLASSES: ClassVar = ("Qwen3ForCausalLM", "Qwen3Model")
    OPEN: ClassVar = True
    FIXED: ClassVar = {"hidden_act": "silu", "use_sliding_window": False}

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    attention_bias: bool = False
    out_layers: tuple[int, ...] = (9, 18, 27)

    @classmethod
    def from_json(cls, raw):
        """See `Config.from_json`.

        Raises:
          ValueError: another model's file, rotary positions or layers that are not implemented, heads that do not fit
            each other, or `out_layers` that the model does not have.
        """
        raw = dict(raw)
        raw |= {"rope_theta": _rope_theta(raw)}
        if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
            raw["num_key_value_heads"] = raw.get("num_attention_heads", cls.num_attention_heads)
        other = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
        if other:
            raise ValueError(f"layer_types has {', '.join(map(repr, other))}; implemented: 'full_attention'")
        config = super().from_json(raw)
        check_size(config, config.num_hidden_layers)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        if not groups or heads % groups or config.head_dim % 2:
            raise ValueError(
                f"num_attention_heads is {heads}, num_key_value_heads {groups} and head_dim {config.head_dim}; the "
                "first must be a multiple of the second, and the last even"
            )
        if not config.out_layers or max(config.out_layers) > config.num_hidden_layers:
            raise ValueError(
                f"the states after layers {config.out_layers} make up the condition, but the model has "
                f'{config.num_hidden_layers} layers; give others as "out_layers" in config.json'
            )
        return config

    @property
    def depth(self) -> int:
        """How many layers are needed."""
        return max(self.out_layers)

    @property
    def width(self) -> int:
        """The width of the condition."""
        return len(self.out_layers) * self.hidden_size


class Qwen3Output(NamedTuple):
    """The output of the encoder for ids [n, l].

    Args:
      context: the chosen states side by side, [n, l, k d].
      hidden: the chosen states, each [n, l, d]; at least float32. The state after the model's very last layer is
        normalised, as in transformers.
    """

    context: Float[Array, "n l kd"]
    hidden: tuple[Float[Array, "n l d"], ...]


class Qwen3(Block):
    """Qwen3 up to the last layer that is needed: ids [n, l] -> `Qwen3Output`."""

    config: Qwen3Config

    def inputs(self):
        return (jax.ShapeDtypeStruct((1, 2), jnp.int32),)

    def checkpoint_key(self, key):
        cfg = self.config
        key = f"model.{key}" if UNPREFIXED.match(key) else key  # Qwen3Model leaves it out
        layer = NUMBER.match(key)
        unused = layer and cfg.depth <= int(layer[1]) < cfg.num_hidden_layers
        if unused or key == "lm_head.weight" or (key == "model.norm.weight" and cfg.depth < cfg.num_hidden_layers):
            return None
        return key

    @nn.compact
    def __call__(self, ids: Int[Array, "n l"], mask: Bool[Array, "n l"] | None = None) -> Qwen3Output:
        """The states of all tokens, those of the padding too; with a mask, only where it is True is attended to."""
        cfg, sums = self.config, jnp.promote_types(self.dtype, jnp.float32)
        h = self.embed("model.embed_tokens", cfg.vocab_size, cfg.hidden_size)(ids).astype(sums)
        hidden = [h]
        for i in range(cfg.depth):
            h = self.part(Layer, f"model.layers.{i}", cfg)(h, mask)
            hidden.append(h)
        if cfg.depth == cfg.num_hidden_layers:
            hidden[-1] = self.rms_norm("model.norm", cfg.rms_norm_eps)(h).astype(sums)
        chosen = tuple(hidden[i] for i in cfg.out_layers)
        return Qwen3Output(jnp.concatenate(chosen, axis=-1).astype(self.wide_dtype), chosen)


class Layer(Block):
    """Attention, then the feed-forward: [n, l, d] -> [n, l, d]."""

    config: Qwen3Config

    @nn.compact
    def __call__(self, h, mask):
        cfg = self.config
        n, length, width = h.shape
        x = self.rms_norm("input_layernorm", cfg.rms_norm_eps)(h)
        q = self._heads("q", x, cfg.num_attention_heads)
        k = self._heads("k", x, cfg.num_key_value_heads)
        q, k = (
            rotate(self.rms_norm(f"self_attn.{which}_norm", cfg.rms_norm_eps)(y), cfg.rope_theta)
            for which, y in (("q", q), ("k", k))
        )
        y = attend(q, k, self._heads("v", x, cfg.num_key_value_heads), causal=True, mask=mask)
        y = y.astype(self.dtype).reshape(n, length, -1)
        h = h + self.dense("self_attn.o_proj", width, bias=cfg.attention_bias)(y)
        x = self.rms_norm("post_attention_layernorm", cfg.rms_norm_eps)(h)
        gate, x = (
            self.dense(f"mlp.{which}_proj", cfg.intermediate_size, bias=False)(x).astype(self.wide_dtype)
            for which in ("gate", "up")
        )
        return h + self.wide_dense("mlp.down_proj", width)(nn.silu(gate) * x)

    def _heads(self, which, x, heads):
        y = self.dense(f"self_attn.{which}_proj", heads * self.config.head_dim, bias=self.config.attention_bias)(x)
        return y.reshape(*x.shape[:2], heads, self.config.head_dim)


def rotate(x: Float[Array, "n l h d"], theta: float) -> Float[Array, "n l h d"]:
    """Rotary positions: (x_i, x_{i + d/2}) turned by the angle p θ^{−2i/d} at place p.

    Example:
      >>> rotate(jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2).repeat(2, 1), 10_000.0)[0, :, 0].round(3).tolist()
      [[1.0, 0.0], [0.5400000214576721, 0.8410000205039978]]
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = (jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies)[:, None]
    a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    turned = (a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles))
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _rope_theta(raw: Mapping[str, Any]) -> Any:
    # transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
    if kind != "default":
        raise ValueError(f"rope_scaling is {rope!r}; implemented: none, which is 'default'")
    return rope.get("rope_theta", raw.get("rope_theta", Qwen3Config.rope_theta))
