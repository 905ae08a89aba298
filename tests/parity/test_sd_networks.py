"""Our models against diffusers and transformers, float32, on checkpoints that they wrote themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")

import torch_models as tm  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel  # noqa: E402

from mmdjax.sd.models import load_component  # noqa: E402

TOLERANCE = 1e-5  # float32 rounding through some 50 layers is 1e-6; the promise is 1e-4


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


def ours(model, tmp_path):
    """A function of our module's arguments, on the checkpoint that `model` writes."""
    model.save_pretrained(tmp_path)
    module, params, _ = load_component(tmp_path)

    def call(*args, method=None):
        return jax.jit(lambda params: module.apply({"params": params}, *args, method=method))(params)

    return call


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tensor(x):
    return torch.from_numpy(np.array(x))


def ids(config, rows=3, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 97, (rows, config["max_position_embeddings"]))
    tokens[:, 0] = 98
    for row, length in zip(tokens, (3, 7, 11), strict=True):
        row[length:] = 99  # padded with eos, as CLIP-L is
    return tokens


UNETS = {"sd1": tm.SD1_UNET, "sd2": tm.SD2_UNET, "sdxl": tm.SDXL_UNET}


@pytest.mark.parametrize("family", UNETS)
def test_unet_condition(tmp_path, family):
    config = UNETS[family]
    theirs = tm.randomise(UNet2DConditionModel(**config))
    call = ours(theirs, tmp_path)
    t, x, context = np.array([0, 1, 999]), normal(0, 3, 8, 8, 4), normal(1, 3, 5, config["cross_attention_dim"])
    cond, added = context, None
    if family == "sdxl":
        pooled, time_ids = normal(2, 3, 16), jnp.array([[512.0, 640, 0, 8, 1024, 1024]] * 3)
        cond = {"context": context, "pooled": pooled, "time_ids": time_ids}
        added = {"text_embeds": tensor(pooled), "time_ids": tensor(time_ids)}
    with torch.no_grad():
        expected = theirs(tm.nchw(x), tensor(t), tensor(context), added_cond_kwargs=added).sample
    y = call(x, jnp.asarray(t), cond)
    assert tm.relative(y, tm.nhwc(expected)) < TOLERANCE


@pytest.mark.parametrize("change", [{}, {"downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False}])
def test_unet_unconditional(tmp_path, change):
    theirs = tm.randomise(UNet2DModel(**tm.LDM_UNET | change))
    call = ours(theirs, tmp_path)
    x, t = normal(0, 3, 8, 8, 3), np.array([0, 1, 999])
    with torch.no_grad():
        expected = theirs(tm.nchw(x), tensor(t)).sample
    y = call(x, jnp.asarray(t))
    assert tm.relative(y, tm.nhwc(expected)) < TOLERANCE


@pytest.mark.parametrize("size", [(9, 11), (6, 10)])
def test_unet_of_odd_sizes(tmp_path, size):
    theirs = tm.randomise(UNet2DConditionModel(**tm.SD1_UNET))
    call = ours(theirs, tmp_path)
    x, context = normal(0, 1, *size, 4), normal(1, 1, 5, 24)
    with torch.no_grad():
        expected = theirs(tm.nchw(x), 7, tensor(context)).sample
    assert tm.relative(call(x, jnp.array([7.0]), context), tm.nhwc(expected)) < TOLERANCE


def test_autoencoder_kl(tmp_path):
    theirs = tm.randomise(AutoencoderKL(**tm.KL))
    call = ours(theirs, tmp_path)
    images, z = normal(0, 2, 16, 24, 3), normal(1, 2, 8, 12, 4)
    with torch.no_grad():
        posterior = theirs.encode(tm.nchw(images)).latent_dist
        picture = theirs.decode(tm.nchw(z)).sample
    mean, logvar = call(images, method="encode")
    assert tm.relative(mean, tm.nhwc(posterior.mean)) < TOLERANCE
    assert tm.relative(logvar, tm.nhwc(posterior.logvar)) < TOLERANCE
    assert tm.relative(call(z, method="decode"), tm.nhwc(picture)) < TOLERANCE


@pytest.mark.parametrize("vq_embed_dim", [None, 5])
def test_vq_model(tmp_path, vq_embed_dim):
    theirs = tm.randomise(VQModel(**tm.VQ | {"vq_embed_dim": vq_embed_dim}))
    call = ours(theirs, tmp_path)
    images, z = normal(0, 2, 16, 16, 3), normal(1, 2, 8, 8, vq_embed_dim or 3)
    with torch.no_grad():
        latents = theirs.encode(tm.nchw(images)).latents
        picture, plain = theirs.decode(tm.nchw(z)).sample, theirs.decode(tm.nchw(z), force_not_quantize=True).sample
        codes = theirs.quantize(tm.nchw(z))[0]
    assert tm.relative(call(images, method="encode"), tm.nhwc(latents)) < TOLERANCE
    assert tm.relative(call(z, method=lambda m, z: m.quantize(z)), tm.nhwc(codes)) < 1e-6
    assert tm.relative(call(z, method="decode"), tm.nhwc(picture)) < TOLERANCE
    assert tm.relative(call(z, False, method="decode"), tm.nhwc(plain)) < TOLERANCE


TEXTS = {"clip-l": (tm.CLIP_L, False), "clip-h": (tm.CLIP_H, False), "clip-g": (tm.CLIP_H, True)}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_encoder(tmp_path, kind):
    config, projection = TEXTS[kind]
    theirs = tm.text_encoder(config, projection)
    call = ours(theirs, tmp_path)
    tokens = ids(config)
    with torch.no_grad():
        expected = theirs(tensor(tokens).long(), output_hidden_states=True)
    out = call(jnp.asarray(tokens))
    assert tm.relative(out.last, expected.last_hidden_state) < TOLERANCE
    assert len(out.hidden) == len(expected.hidden_states) == config["num_hidden_layers"] + 1
    for a, b in zip(out.hidden, expected.hidden_states, strict=True):
        assert tm.relative(a, b) < TOLERANCE
    if projection:
        assert tm.relative(out.projected, expected.text_embeds) < TOLERANCE
    else:
        assert out.projected is None
        assert tm.relative(out.pooled, expected.pooler_output) < TOLERANCE


@pytest.mark.parametrize("eos", [2, 99])
def test_pooling_with_added_tokens(tmp_path, eos):
    """Porting 18: with eos_token_id 2 the largest id is pooled, which an added token after eos changes."""
    config = tm.CLIP_L | {"eos_token_id": eos, "vocab_size": 104}
    theirs = tm.text_encoder(config)
    call = ours(theirs, tmp_path)
    tokens = ids(config)
    tokens[:, 2] = 103
    with torch.no_grad():
        expected = theirs(tensor(tokens).long()).pooler_output
    assert tm.relative(call(jnp.asarray(tokens)).pooled, expected) < TOLERANCE
