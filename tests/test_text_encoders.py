"""T5's encoder and Qwen3 against what transformers computed (tests/fixtures), their parts, and prompts without a pooled
state.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_tiny
from test_sd_models import recorded, relative

from mmdjax import IMQ, Particles
from mmdjax.checkpoint import Checkpoint
from mmdjax.sd.files import convert
from mmdjax.sd.models import export, load_component, module_from_config
from mmdjax.sd.networks.primitives import attend
from mmdjax.sd.networks.qwen3 import rotate
from mmdjax.sd.networks.t5 import distance_buckets
from mmdjax.sd.text.prompts import SAME, pooled, prompt_kernel, tokens

TOLERANCE = 1e-5  # relative, float32: rounding through two layers is 1e-6
T5, QWEN3 = (recorded(name)[0]["config"] for name in ("t5", "qwen3"))


def run(component, *args):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p: component.module.apply({"params": p}, *args))(component.params)


def test_t5():
    _, a = recorded("t5")
    out = run(sd_tiny.component(T5), a["ids"], a["mask"])
    assert relative(out.last, a["last"]) < TOLERANCE
    assert relative(out.hidden[1], a["hidden"]) < TOLERANCE
    assert len(out.hidden) == T5["num_layers"] + 1


def test_qwen3():
    _, a = recorded("qwen3")
    out = run(sd_tiny.component(QWEN3), a["ids"], a["mask"])
    np.testing.assert_array_equal(out.context, jnp.concatenate(out.hidden, axis=-1))
    for i, state in enumerate(out.hidden, start=1):
        assert relative(state, a[f"hidden{i}"]) < TOLERANCE


# --- parts ---


def test_attention_with_bias_mask_and_scale():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, heads, 3)) for heads in (4, 2, 2))
    mask, bias = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool), rng.standard_normal((1, 4, 5, 5))
    logits = 0.7 * np.einsum("nlhd,nmhd->nhlm", q, k[:, :, [0, 0, 1, 1]]) + bias
    seen = mask[:, None, None] & np.tri(5, dtype=bool)
    weights = np.exp(logits) * seen
    expected = np.einsum("nhlm,nmhd->nlhd", weights / weights.sum(-1, keepdims=True), v[:, :, [0, 0, 1, 1]])
    args = (jnp.asarray(a, jnp.float32) for a in (q, k, v, bias))
    f = jax.jit(lambda q, k, v, bias: attend(q, k, v, causal=True, mask=jnp.asarray(mask), bias=bias, scale=0.7))
    y = f(*args)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_buckets_of_distances():
    """By Raffel et al.: single distances up to 7, then as the logarithm, one for 128 and beyond; later keys apart."""
    buckets = distance_buckets(300, 32, 128)
    np.testing.assert_array_equal(buckets[:8, 0], range(8))  # the key before the query
    np.testing.assert_array_equal(buckets[[8, 16, 32, 64, 128, 299], 0], [8, 10, 12, 14, 15, 15])
    np.testing.assert_array_equal(buckets.T[np.triu_indices(300, 1)] + 16, buckets[np.triu_indices(300, 1)])
    assert (np.diff(buckets[:, 0]) >= 0).all()
    assert set(buckets.ravel()) == set(range(32)) - {16}  # no key after the query at distance 0


def test_rotary_positions_are_relative():
    """qᵀk of turned vectors depends on the distance of their places alone."""
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    turn = jax.jit(lambda row: rotate(jnp.broadcast_to(row, (1, 40, 1, 8)), 100.0)[0, :, 0])
    q, k = map(np.asarray, map(turn, x))
    products = q @ k.T
    np.testing.assert_allclose(products[:-7, :-7], products[7:, 7:], atol=1e-4)
    np.testing.assert_allclose(products[0, 0], x[0] @ x[1], rtol=1e-5)
    assert np.ptp(products[0]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("raw", [T5, QWEN3], ids=["t5", "qwen3"])
def test_states_beyond_half_precision(raw, dtype):
    """Sums and products of some 10⁶, as in T5's largest: float16 ends at 65,504, the output stays near float32's."""
    loud = sd_tiny.component(raw, dtype=dtype)
    out_of = ("DenseReluDense.wo", "mlp.down_proj")
    into = ("DenseReluDense.wi_0", "DenseReluDense.wi_1", "mlp.gate_proj", "mlp.up_proj")
    gains = {**dict.fromkeys(out_of, 30.0), **dict.fromkeys(into, 100.0)}
    leaves = convert.flat(loud.params)
    scaled = {p: x * next((g for n, g in gains.items() if n in ".".join(p)), 1.0) for p, x in leaves.items()}
    params = convert.unflatten_dict(scaled)
    ids = jnp.arange(3, 12)[None]
    half = run(loud._replace(params=params), ids)
    full = run(loud._replace(module=module_from_config(raw), params=params), ids)
    assert max(jnp.abs(state).max() for state in full.hidden) > 65_504
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert relative(a, b) < (0.01 if dtype == jnp.float16 else 0.1)


# --- files ---


def test_exported_as_transformers_names_files(tmp_path):
    """model.safetensors and not diffusion_pytorch_model.safetensors; loaded again, the same bits."""
    for name, raw in {"text_encoder": QWEN3, "text_encoder_2": T5}.items():
        export(tmp_path, {name: sd_tiny.component(raw)})
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["config.json", "model.safetensors"]
        again, drawn = load_component(tmp_path / name), sd_tiny.component(raw)
        jax.tree.map(np.testing.assert_array_equal, again.params, drawn.params)
        assert again.module == drawn.module


@pytest.mark.parametrize(
    ("raw", "given", "used"),
    [
        (T5, "encoder.embed_tokens.weight", "shared.weight"),
        (T5, "decoder.block.0.layer.1.EncDecAttention.q.weight", None),
        (T5, "lm_head.weight", None),
        (T5, "encoder.block.9.layer_norm.weight", "encoder.block.9.layer_norm.weight"),  # and then it is unused
        (QWEN3, "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        (QWEN3, "norm.weight", "model.norm.weight"),
        (QWEN3, "lm_head.weight", None),
        (QWEN3 | {"out_layers": [1]}, "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        (QWEN3 | {"out_layers": [1]}, "model.layers.1.mlp.up_proj.weight", None),
        (QWEN3 | {"out_layers": [1]}, "model.norm.weight", None),
        (QWEN3 | {"out_layers": [1]}, "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
    ],
)
def test_what_a_checkpoint_calls_it(raw, given, used):
    module = module_from_config(raw)
    found = convert.canonical(Checkpoint({given: None}, "file"), module)  # pyright: ignore[reportArgumentType]
    assert list(found) == ([] if used is None else [used])


@pytest.mark.parametrize("given", [("shared.weight", "encoder.embed_tokens.weight")] * 2)
def test_of_two_names_the_networks_own(given):
    found = convert.canonical(Checkpoint({key: key for key in given}, "file"), module_from_config(T5))  # pyright: ignore
    assert found.stored == {"shared.weight": "shared.weight"}


@pytest.mark.parametrize(
    ("raw", "change", "text"),
    [
        (T5, {"architectures": ["UMT5EncoderModel"]}, "config.json is of 'UMT5EncoderModel', which is not implemented"),
        (
            T5,
            {"feed_forward_proj": "gated-silu"},
            "feed_forward_proj is 'gated-silu'; implemented: ('relu', 'gated-gelu')",
        ),
        (T5, {"dense_act_fn": "silu"}, "dense_act_fn is 'silu'; implemented with 'gated-gelu': 'gelu_new'"),
        (T5, {"is_decoder": True}, "is_decoder = True (implemented: False)"),
        (
            T5,
            {"relative_attention_max_distance": 8},
            "give at least 4 buckets, and a distance beyond a quarter of them",
        ),
        (T5, {"num_layers": 10**6}, "T5EncoderConfig describes a network of 1 levels and 1,000,000 blocks"),
        (
            QWEN3,
            {"architectures": ["Qwen2ForCausalLM"]},
            "config.json is of 'Qwen2ForCausalLM', which is not implemented",
        ),
        (QWEN3, {"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "implemented: none, which is 'default'"),
        (QWEN3, {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling is {'type': 'linear'}"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 2}, "layer_types has 'sliding_attention'; implemented"),
        (QWEN3, {"hidden_act": "gelu"}, "hidden_act = 'gelu' (implemented: 'silu')"),
        (QWEN3, {"num_key_value_heads": 3}, "the first must be a multiple of the second"),
        (QWEN3, {"out_layers": [9, 18, 27]}, "(9, 18, 27) make up the condition, but the model has 2 layers"),
    ],
)
def test_other_configs_are_refused(raw, change, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        module_from_config(raw | change)


def test_configs_of_two_versions_of_transformers():
    new, old = QWEN3 | {"num_key_value_heads": None}, json.loads(json.dumps(QWEN3))
    old |= {"rope_theta": old.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "num_key_value_heads": 4}
    assert module_from_config(new) == module_from_config(old)
    assert module_from_config(old).config.rope_theta == 1e6
    assert module_from_config({"architectures": ["Qwen3ForCausalLM"]}).config.out_layers == (9, 18, 27)


# --- prompts without a pooled state ---


def prompts(length, seed=1):
    """Three prompts of 2, 4 and 4 tokens; the first token's state is the same in all, and as large as Qwen3's."""
    states = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)
    states[:, 0] = 1000 * np.arange(6)
    context = np.random.default_rng(seed).standard_normal((3, length, 6)).astype(np.float32)
    mask = np.arange(length) < np.array([[2], [4], [4]])
    context[:, :4] = np.where(mask[:, :4, None], states, context[:, :4])
    return {"context": jnp.asarray(context), "mask": jnp.asarray(mask)}


compared = jax.jit(lambda cond: (pooled(cond), tokens(cond)))


def test_prompts_without_a_pooled_state_ignore_padding():
    (short, by_token), (long, by_token_long) = (compared(prompts(*how)) for how in ((4,), (9, 2)))
    np.testing.assert_allclose(long, short, atol=1e-6)
    np.testing.assert_allclose(by_token_long[:, :4], by_token, atol=1e-6)
    assert not np.asarray(by_token_long)[:, 4:].any()
    np.testing.assert_allclose(np.linalg.norm(short, axis=-1), 1, rtol=1e-6)


def test_a_token_that_all_prompts_share_does_not_hide_the_others():
    a, _ = map(np.asarray, compared(prompts(4)))
    assert min(np.linalg.norm(a[i] - a[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 10 * SAME


@pytest.mark.slow
def test_kernel_of_prompts_without_a_pooled_state():
    """The default kernel's own bandwidth of the prompts: one prompt pulls itself, others hardly."""
    x = jnp.arange(3.0)[:, None] / 1000
    grams = []
    for length in (4, 9):
        points = Particles(x, prompts(length))
        grams.append(prompt_kernel(IMQ(100.0)).fit(points)(points, points))
    np.testing.assert_allclose(grams[1], grams[0], atol=1e-5)
    np.testing.assert_allclose(np.diag(grams[0]), 1, rtol=1e-3)
    assert (grams[0][~np.eye(3, dtype=bool)] < 0.1).all()


def test_a_pooled_state_is_taken_where_there_is_one():
    a, _ = compared(prompts(4) | {"pooled": jnp.eye(3) * 5})
    np.testing.assert_allclose(a, jnp.eye(3), rtol=1e-6)
