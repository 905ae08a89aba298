"""The networks against what torch computed (tests/fixtures, recorded by tests/parity/record_fixtures.py), and their
parts.
"""

import functools
import json
import math
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import sd_tiny
from safetensors.numpy import load_file

from mmdjax import from_model
from mmdjax.schedules import DiscreteTime, ScaledLinear
from mmdjax.sd.files import convert
from mmdjax.sd.models import module_from_config
from mmdjax.sd.networks import layers, primitives
from mmdjax.sd.networks.clip import end_of_text

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-5  # relative, float32: rounding through some 50 layers is 1e-6


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


def recorded(name):
    """A network of ours with the recorded one's parameters, and the recorded arrays."""
    fixture = json.loads((FIXTURES / f"sd_{name}.json").read_text())
    arrays = {key: jnp.asarray(value) for key, value in load_file(FIXTURES / f"sd_{name}.safetensors").items()}
    return fixture, arrays


def apply(raw, *args, method=None, prefix="", **how):
    component = sd_tiny.component(raw, prefix=prefix, **how)
    return jax.jit(lambda p: component.module.apply({"params": p}, *args, method=method))(component.params)


def traced(module):
    """`abstract` of a module that may have been traced before."""
    convert._init.cache_clear()
    convert.abstract(module)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
    "name",
    ["unet_ldm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("unet_sd1", "unet_sd2", "unet_sdxl"))],
)
def test_unet(name):
    fixture, a = recorded(name)
    cond = a.get("context")
    if "pooled" in a:
        cond = {key: a[key] for key in ("context", "pooled", "time_ids")}
    assert relative(apply(fixture["config"], a["x"], a["t"], cond), a["output"]) < TOLERANCE


def test_vae():
    fixture, a = recorded("vae")
    mean, logvar = apply(fixture["config"], a["images"], method="encode")
    assert relative(mean, a["mean"]) < TOLERANCE
    assert relative(logvar, a["logvar"]) < TOLERANCE
    assert relative(apply(fixture["config"], a["z"], method="decode"), a["decoded"]) < TOLERANCE


@pytest.mark.slow
def test_vqvae():
    """Porting 15: the encoder's output is not quantised; the decoder quantises first."""
    fixture, a = recorded("vqvae")
    raw = fixture["config"]
    assert relative(apply(raw, a["images"], method="encode"), a["latents"]) < TOLERANCE
    assert relative(apply(raw, a["z"], method="decode"), a["decoded"]) < TOLERANCE
    codes = apply(raw, a["z"], method=lambda m, z: m.quantize(z))
    assert relative(codes, a["codes"]) < 1e-6
    assert relative(apply(raw, codes, False, method="decode"), a["decoded"]) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["clip_l", *(pytest.param(name, marks=pytest.mark.slow) for name in ("clip_h", "clip_g"))]
)
def test_text_encoder(name):
    fixture, a = recorded(name)
    out = apply(fixture["config"], a["ids"], prefix="" if name == "clip_g" else "text_model.")
    assert relative(out.last, a["last"]) < TOLERANCE
    for i, hidden in enumerate(out.hidden):
        assert relative(hidden, a[f"hidden{i}"]) < TOLERANCE
    assert f"hidden{len(out.hidden)}" not in a
    if name == "clip_g":
        assert relative(out.projected, a["projected"]) < TOLERANCE
    else:
        assert out.projected is None
        assert relative(out.pooled, a["pooled"]) < TOLERANCE


NETWORKS = sorted(
    path.stem.removeprefix("sd_") for path in FIXTURES.glob("sd_*.json") if '"shapes"' in path.read_text()
)


@pytest.mark.parametrize("name", NETWORKS)
def test_tree_is_torchs(name):
    fixture, _ = recorded(name)
    tree = convert.abstract(module_from_config(fixture["config"]))
    leaves = convert.flat(tree)
    ours = {key: list(convert.torch_shape(p[-1], leaves[p].shape)) for key, p in convert.keys(tree).items()}
    prefix = "text_model." if name in ("clip_l", "clip_h") else ""  # the hub's names; transformers 5 records it without
    assert ours == {prefix + key: shape for key, shape in fixture["shapes"].items()}


# --- parts, each where ports went wrong ---


def test_group_norm_does_not_cancel():
    """Porting 10: mean 100, standard deviation .01; E[x²] − E[x]² in float32 loses it all."""
    x = 100 + 0.01 * np.random.default_rng(0).standard_normal((1, 8, 8, 32)).astype(np.float32)
    groups = x.astype(np.float64).reshape(1, 64, 4, 8)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)

    class Norm(layers.Block):
        @nn.compact
        def __call__(self, x):
            return self.group_norm("norm", 4, 1e-6)(x)

    y, _ = Norm().init_with_output(jax.random.key(0), jnp.asarray(x))
    assert relative(y, expected) < 1e-3  # the mean's own rounding, 100 · 2⁻²⁴ of .01


@pytest.mark.parametrize(("flip", "first"), [(True, np.cos), (False, np.sin)])
@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_embedding(flip, first, shift):
    """Porting 8: cosines first, shift 0, in float32, at t = 0, 1, 999."""
    t = np.array([0, 1, 999])
    angles = t[:, None] * np.exp(-np.log(10000) * np.arange(8) / (8 - shift))
    second = np.sin if flip else np.cos
    expected = np.concatenate([first(angles), second(angles)], 1)
    y = layers.timestep_embedding(jnp.asarray(t, jnp.int32), 16, flip=flip, shift=shift)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, atol=1e-4)  # 999 · 2⁻²⁴ radians, and the frequency's rounding
    half = layers.timestep_embedding(jnp.asarray(t, jnp.bfloat16), 17, flip=flip, shift=shift)
    assert half.shape == (3, 17)
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_large_attention_logits_in_half_precision(dtype):
    """Porting 9: q·k of 10⁵ is beyond float16; the logits are float32 whatever q is."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 6, 2, 64)) * s, dtype) for s in (200, 200, 1))
    exact = primitives.attend(*(a.astype(jnp.float32) for a in (q, k, v)))
    for upcast in (False, True):
        y = primitives.attend(q, k, v, upcast=upcast).astype(jnp.float32)
        assert np.isfinite(y).all()
        assert relative(y, exact) < 0.02  # one value of eight bits


@pytest.mark.parametrize("upcast", [True, False])
def test_upcast_attention(monkeypatch, upcast):
    """Porting 9: with `upcast_attention` every product is of float32, and none is cuDNN's, which would be half."""
    seen, product = set(), jax.nn.dot_product_attention

    def see(q, k, v, *, implementation=None, **how):
        seen.add((q.dtype.name, k.dtype.name, v.dtype.name, implementation))
        return product(q, k, v, **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", see)
    raw = sd_tiny.UNET | {"attention_head_dim": 4, "upcast_attention": upcast}
    traced(module_from_config(raw, dtype=jnp.bfloat16, flash=True))
    assert seen == {("float32",) * 3 + (None,) if upcast else ("bfloat16",) * 3 + ("cudnn",)}


FORMS = {"cpu": primitives._by_head, "elsewhere": primitives._all_heads}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [1, 100, 500, 3000])
@pytest.mark.parametrize("length", [12, *(pytest.param(length, marks=pytest.mark.slow) for length in (7, 64))])
def test_attention_in_blocks(form, length, limit):
    """Neither the form nor blocks of queries change the value or the gradient, dividing the length or not."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 3, 8)), jnp.float32) for n in (length, 5, 5))

    def square(attend):
        return jax.jit(jax.value_and_grad(lambda q, k, v: (attend(q, k, v) ** 2).sum(), (0, 1, 2)))(q, k, v)

    whole, blocks = square(jax.nn.dot_product_attention), square(functools.partial(FORMS[form], limit=limit))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, blocks)


@pytest.mark.parametrize("form", FORMS)
def test_masked_keys_are_no_keys(form):
    """With a mask of the first keys the others might as well be absent, NaN-free where a sample has none."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 3, 8)), jnp.float32) for n in (12, 5, 5))
    mask = jnp.arange(5) < jnp.array([[3], [0]])

    @jax.jit
    def both(q, k, v):
        masked, pull = jax.vjp(lambda q: FORMS[form](q, k, v, 20, mask), q)
        return masked, jax.nn.dot_product_attention(q, k[:, :3], v[:, :3]), *pull(masked)

    masked, fewer, slope = both(q, k, v)
    np.testing.assert_allclose(masked[0], fewer[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masked[1], jnp.broadcast_to(v[1].mean(0), (12, 3, 8)), rtol=1e-5, atol=1e-6)
    assert np.isfinite(slope).all()


def test_flash_has_no_mask(monkeypatch):
    """cuDNN takes no mask of keys here: with one, attention goes on as on other platforms."""
    seen, product = [], jax.nn.dot_product_attention

    def see(*args, implementation=None, **how):
        seen.append(implementation)
        return product(*args, **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", see)
    q, mask = jax.ShapeDtypeStruct((1, 6, 2, 8), jnp.bfloat16), jax.ShapeDtypeStruct((1, 6), bool)
    for causal in (False, True):
        jax.eval_shape(lambda q, m, c=causal: primitives.attend(q, q, q, mask=m, causal=c, flash=True), q, mask)
    assert set(seen) == {None}
    jax.eval_shape(lambda q: primitives.attend(q, q, q, flash=True), q)
    assert seen[-1] == "cudnn"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_under_jit_keeps_the_dtype(dtype):
    """Inside `jit` both platforms' forms are traced, and must agree."""
    q = jnp.ones((1, 6, 2, 8), dtype)
    assert jax.jit(lambda q: primitives.attend(q, q, q))(q).dtype == dtype


@pytest.mark.parametrize("form", FORMS)
def test_attention_in_blocks_bounds_memory(form):
    """No array of the computation, forwards or back, is larger than the limit: it is 64 times that in one block."""
    q = jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32)

    def largest(limit):
        run = jax.grad(lambda q: FORMS[form](q, q, q, limit).sum())
        shapes = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(run)(q)))
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest(2**19) == 2**19
    assert largest(2**30) >= 2**24


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, (1, 1)), (3, 2, (0, 1)), (3, 2, (1, 1)), (1, 1, (0, 0))]
)
def test_convolution_in_its_forms(size, stride, padding):
    """Of few positions and of many, with its gradients, against XLA's."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((size, size, 5, 4)), jnp.float32)
    how = {"dimension_numbers": jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))}

    for height in (7, 70):
        x = jnp.asarray(rng.standard_normal((2, height, 8, 5)), jnp.float32)

        def both(f, x=x):
            square = lambda x, kernel: (f(x, kernel, (stride, stride), [padding] * 2, **how) ** 2).sum()
            return jax.jit(jax.value_and_grad(square, (0, 1)))(x, kernel)

        expected = both(jax.lax.conv_general_dilated)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), both(primitives.convolve), expected
        )


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (9, 11), (7, 10)])
def test_upsample_is_nearest(size):
    x = np.arange(4 * 5, dtype=np.float32).reshape(1, 4, 5, 1)
    rows, columns = np.arange(size[0]) * 4 // size[0], np.arange(size[1]) * 5 // size[1]
    np.testing.assert_array_equal(layers.upsample(jnp.asarray(x), size), x[:, rows][:, :, columns])
    np.testing.assert_array_equal(layers.upsample(jnp.asarray(x), (8, 10)), x.repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_heads_of_the_published_models(family):
    """Porting 4: attention_head_dim in these configs is a number of heads."""
    channels = [320, 640, 1280, 1280]
    given, heads = {
        "sd1": (8, (8, 8, 8, 8)),
        "sd2": ([5, 10, 20, 20], (5, 10, 20, 20)),
        "sdxl": ([5, 10, 20], (5, 10, 20)),
    }[family]
    levels = len(heads)
    raw = sd_tiny.UNET | {
        "block_out_channels": channels[:levels],
        "down_block_types": ["CrossAttnDownBlock2D"] * levels,
        "up_block_types": ["CrossAttnUpBlock2D"] * levels,
        "attention_head_dim": given,
    }
    assert module_from_config(raw).config.heads == heads
    uncond = {"_class_name": "UNet2DModel", "attention_head_dim": 32}
    assert module_from_config(uncond).config.heads == (7, 14, 21, 28)  # there it is a size


@pytest.mark.slow
def test_heads_matter():
    """Porting 4: a wrong split has valid shapes and wrong values."""
    fixture, a = recorded("unet_sd1")
    y = apply(fixture["config"] | {"attention_head_dim": 4}, a["x"], a["t"], a["context"])
    assert relative(y, a["output"]) > 1e-2


@pytest.mark.parametrize("linear", [False, True])
def test_projections_of_the_transformer(linear):
    """Porting 6: proj_in and proj_out are convolutions in Stable Diffusion 1, linear in 2 and SDXL."""
    tree = convert.abstract(module_from_config(sd_tiny.UNET | {"use_linear_projection": linear}))
    block = tree["down_blocks.0.attentions.0"]
    for name in ("proj_in", "proj_out"):
        assert block[name]["kernel"].shape == ((32, 32) if linear else (1, 1, 32, 32))


def test_every_norms_eps():
    """Porting 1 and 3: 1e-5 in the U-Net, but 1e-6 in a transformer's group norm; 1e-6 in autoencoders; LayerNorms
    1e-5.
    """

    def epsilons(raw):
        module, found = module_from_config(raw), {}

        def see(call, args, kwargs, context):
            if isinstance(context.module, nn.GroupNorm | nn.LayerNorm):
                found["/".join(context.module.path)] = context.module.epsilon
                assert not context.module.use_fast_variance
            return call(*args, **kwargs)

        with nn.intercept_methods(see):
            traced(module)
        return found

    unet = epsilons(sd_tiny.UNET)
    assert unet.pop("down_blocks.0.attentions.0/norm") == 1e-6
    assert {eps for path, eps in unet.items() if path.endswith("/norm")} == {1e-6}
    assert {eps for path, eps in unet.items() if not path.endswith("/norm")} == {1e-5}
    assert set(epsilons(sd_tiny.VAE).values()) == set(epsilons(sd_tiny.VQ).values()) == {1e-6}
    assert set(epsilons(sd_tiny.TEXT).values()) == {1e-5}
    assert set(epsilons(sd_tiny.TEXT | {"layer_norm_eps": 1e-3}).values()) == {1e-3}


@pytest.mark.parametrize(
    ("raw", "scale"),
    [
        pytest.param(sd_tiny.VAE, 0.18215, marks=pytest.mark.slow),
        pytest.param(sd_tiny.VAE | {"scaling_factor": 0.13025}, 0.13025, marks=pytest.mark.slow),
        (sd_tiny.VQ, 1.0),
    ],
)
def test_scale_of_latents_is_applied_once(raw, scale):
    """Porting 13: scaling_factor from the config, on the posterior's mean, and undone by decoding."""
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)), jnp.float32)

    def all_of_it(module, images):
        encoded = module.encode(images)
        z = encoded[0] if isinstance(encoded, tuple) else encoded
        latents = module.to_latents(images)
        return z, latents, module.from_latents(latents), module.decode(z)

    z, latents, there, back = apply(raw, images, method=all_of_it)
    np.testing.assert_allclose(latents, scale * z, rtol=1e-5)
    np.testing.assert_allclose(there, back, atol=1e-4)


@pytest.mark.slow
def test_force_upcast():
    """Porting 14: activations beyond 65,504 are NaN in float16; with force_upcast decoding is float32."""
    z = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 4)), jnp.float16)

    def decode(force_upcast, dtype):
        raw = sd_tiny.VAE | {"force_upcast": force_upcast}
        module, params, _ = sd_tiny.component(raw, dtype=dtype)
        big = jax.tree_util.tree_map_with_path(
            lambda path, x: x * 1e6 if "conv_in" in jax.tree_util.keystr(path) else x, params
        )
        return jax.jit(lambda params: module.apply({"params": params}, z, method="decode"))(big)

    assert not np.isfinite(decode(False, jnp.float16)).all()
    upcast = decode(True, jnp.float16)
    assert np.isfinite(upcast).all()
    assert relative(upcast, decode(True, jnp.float32)) < TOLERANCE
    assert decode(True, jnp.bfloat16).dtype == jnp.bfloat16  # which has the range


def test_nearest_code():
    """Porting 15: of codes at one distance the first; differences far smaller than the codes are seen."""
    module, params, _ = sd_tiny.component(sd_tiny.VQ)
    codes = np.full((16, 3), 50.0, np.float32)
    codes[3], codes[5] = [1, 0, 0], [-1, 0, 0]
    codes[7], codes[8] = [1000, 0, 0], [1000.001, 0, 0]
    params = params | {"quantize": {"embedding": {"embedding": jnp.asarray(codes)}}}
    z = jnp.asarray([[[[0, 0, 0], [-0.1, 0, 0], [1000.0009, 0, 0], [1000.0001, 0, 0]]]], jnp.float32)

    def quantize(z):
        return module.apply({"params": params}, z, method=lambda m, z: m.quantize(z))

    np.testing.assert_array_equal(quantize(z)[0, 0], codes[[3, 5, 8, 7]])
    np.testing.assert_array_equal(jax.grad(lambda z: quantize(z).sum())(z), jnp.ones_like(z))


def test_causal_mask_only():
    """Porting 19: a token changes nothing before it; padding is attended to like any token."""
    ids = jnp.asarray([[1, 2, 3, 4, 49, 49, 49, 49]])
    last = apply(sd_tiny.TEXT, ids).last
    changed = apply(sd_tiny.TEXT, ids.at[0, 3].set(7)).last
    np.testing.assert_array_equal(changed[:, :3], last[:, :3])
    assert (jnp.abs(changed[:, 3:] - last[:, 3:]).max(-1) > 1e-3).all()
    padded = apply(sd_tiny.TEXT, ids.at[0, 6].set(0)).last
    assert (jnp.abs(padded[:, 6:] - last[:, 6:]).max(-1) > 1e-3).all()


def test_which_layer():
    """Porting 17: hidden[-2] has no norm; the last is the norm of hidden[-1]."""
    ids = jnp.asarray([[1, 2, 3, 4, 49, 49, 49, 49]])
    out = apply(sd_tiny.TEXT, ids)
    shorter = apply(sd_tiny.TEXT | {"num_hidden_layers": 1}, ids)
    np.testing.assert_allclose(out.hidden[-2], shorter.hidden[-1], rtol=1e-6)
    assert relative(out.hidden[-1], out.last) > 0.1


def test_clip_skip():
    """As diffusers counts it: 1 gives the states before the last layer, normed; the projection is of all layers."""
    raw = sd_tiny.TEXT | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 16}
    made = [sd_tiny.component(raw | change) for change in ({}, {"clip_skip": 1}, {"num_hidden_layers": 1})]
    ids = jnp.asarray([[1, 2, 3, 4, 49, 49, 49, 49]])
    every = jax.jit(lambda params: [c.module.apply({"params": p}, ids) for c, p in zip(made, params, strict=True)])
    whole, skipped, shorter = every([component.params for component in made])
    for ours, expected in (
        (skipped.last, shorter.last),
        (skipped.pooled, shorter.pooled),
        (skipped.hidden[-2], whole.hidden[-3]),
        (skipped.projected, whole.projected),
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert relative(skipped.last, whole.last) > 0.1


@pytest.mark.parametrize(("eos", "places"), [(2, [4, 1]), (49, [2, 0]), (48, [3, 1])])
def test_end_of_text(eos, places):
    """Porting 18: eos_token_id 2 means the largest id; else the first eos; without one, the first position."""
    ids = jnp.asarray([[1, 2, 49, 48, 60, 49], [3, 48, 5, 6, 7, 8]])
    np.testing.assert_array_equal(end_of_text(ids, eos), places)


def test_activations_differ():
    """Porting 16 and 2: quick_gelu, the erf gelu and the tanh one are three functions."""
    ids = jnp.asarray([[1, 2, 3, 49]])
    a, b = (apply(sd_tiny.TEXT | {"hidden_act": act}, ids).last for act in ("quick_gelu", "gelu"))
    assert relative(a, b) > 1e-3


ONE_LEVEL = sd_tiny.UNET | {
    "block_out_channels": [32],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}
PLAIN_VAE = sd_tiny.VAE | {"force_upcast": False}
INPUTS = {
    "unet": (ONE_LEVEL, (jnp.ones((2, 4, 4, 4)), jnp.array([998.0, 1000.0]), jnp.ones((2, 2, 16))), None),
    "vae": (PLAIN_VAE, (jnp.ones((1, 4, 4, 4)),), "decode"),
    "text": (sd_tiny.TEXT, (jnp.asarray([[1, 2, 49]]),), lambda m, ids: m(ids).last),
}


@functools.cache
def in_dtype(name, dtype):
    raw, args, method = INPUTS[name]
    return apply(raw, *args, method=method, **({} if dtype is None else {"dtype": dtype}))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("unet", jnp.bfloat16),
        ("vae", jnp.float16),
        ("text", jnp.float16),
        *(pytest.param(name, d, marks=SLOW) for name in INPUTS for d in (jnp.float32, jnp.bfloat16, jnp.float16)),
    ],
)
def test_parameters_and_computation_have_their_own_dtypes(name, dtype):
    raw, args, method = INPUTS[name]
    module = module_from_config(raw, dtype=dtype)
    params = convert.abstract(module)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    drawn = convert.abstract(module_from_config(raw, param_dtype=dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(drawn)} == {jnp.dtype(dtype)}
    assert jax.eval_shape(lambda p: module.apply({"params": p}, *args, method=method), params).dtype == dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("vae", jnp.float16), ("text", jnp.bfloat16), ("text", jnp.float16)),
        *(pytest.param("unet", dtype, marks=SLOW) for dtype in (jnp.bfloat16, jnp.float16)),
        pytest.param("vae", jnp.bfloat16, marks=SLOW),
        *(pytest.param(name, jnp.float32, marks=SLOW) for name in INPUTS),
    ],
)
def test_dtypes_are_separate(name, dtype):
    """Parameters in float32, computation in another dtype: half precision stays near float32."""
    y = in_dtype(name, dtype)
    assert y.dtype == dtype
    if name == "unet":  # porting 8: in bfloat16 the two times would be one
        assert (y[0] != y[1]).any()
    assert relative(y.astype(jnp.float32), in_dtype(name, None)) < (1e-6 if dtype == jnp.float32 else 0.1)


@pytest.mark.slow
def test_unet_is_a_denoiser():
    """`from_model(unet.apply)` compares by value, so that two equal modules compile once."""
    module, params, _ = sd_tiny.component(ONE_LEVEL)
    denoiser = from_model(lambda p, x, t, cond: module.apply({"params": p}, x, t, cond), time=DiscreteTime(1000))
    x, context = jnp.ones((2, 8, 8, 4)), jnp.ones((2, 3, 16))
    level = ScaledLinear()(jnp.asarray(0.5))
    x0 = jax.jit(denoiser)(params, x, level, context)
    eps = apply(ONE_LEVEL, x, jnp.full(2, 499.0), context)
    np.testing.assert_allclose(x0, (x - level.sigma * eps) / level.alpha, rtol=1e-4, atol=1e-4)
    equal = module_from_config(ONE_LEVEL)
    assert equal == module
    assert hash(equal) == hash(module)


def squared(raw, remat):
    """x -> the sum of squares of what this U-Net makes of it."""
    module, params, _ = sd_tiny.component(raw, remat=remat)
    inputs = jnp.arange(2.0), jnp.ones((2, 3, 16))
    return lambda x: (module.apply({"params": params}, x, *inputs) ** 2).sum()


@pytest.mark.slow
def test_remat_keeps_what_goes_into_the_blocks():
    def kept(remat):
        """The bytes of what the forward pass leaves behind, without the parameters: those are constants of it."""
        f, x = squared(sd_tiny.UNET, remat), jnp.ones((2, 16, 16, 4))
        program = jax.make_jaxpr(lambda x: jax.tree.leaves(jax.vjp(f, x)[1]))(x).jaxpr
        left = {v for v in program.outvars if not isinstance(v, jax.extend.core.Literal)} - {*program.constvars}
        return sum(v.aval.size * v.aval.dtype.itemsize for v in left)

    memory, less = kept(False), kept(True)
    assert 0 < less < 0.2 * memory, (less, memory)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    one, other = (jax.jit(jax.grad(squared(sd_tiny.UNET, remat)))(jnp.ones((2, 4, 4, 4))) for remat in (False, True))
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * np.abs(one).max())


def test_wrong_conditions_are_named():
    module, params, _ = sd_tiny.component(sd_tiny.UNET)
    x, t = jnp.ones((1, 4, 4, 4)), jnp.ones(1)
    with pytest.raises(ValueError, match="the context has width 8; this U-Net takes 16"):
        module.apply({"params": params}, x, t, jnp.ones((1, 3, 8)))
    with pytest.raises(ValueError, match=r"this U-Net is conditioned on the context alone, \[n, l, d\]"):
        module.apply({"params": params}, x, t, {"context": jnp.ones((1, 3, 16))})
