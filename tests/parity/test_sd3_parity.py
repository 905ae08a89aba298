"""Stable Diffusion 3 and 3.5 against diffusers, float32: the transformer, its autoencoder, its files, its sampling."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
transformers = pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")

import torch_models as tm  # noqa: E402
from diffusers import AutoencoderKL, SD3Transformer2DModel  # noqa: E402
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers  # noqa: E402

from mmdjax import DDIM, DiffusionModel, cfg, from_model, guided_sample  # noqa: E402
from mmdjax.sd.files import convert, single_sd3  # noqa: E402
from mmdjax.sd.files.compvis import vae_key  # noqa: E402
from mmdjax.sd.files.places import open_file  # noqa: E402
from mmdjax.sd.flow import FlowScheduler  # noqa: E402
from mmdjax.sd.models import export, load_component, load_models, module_from_config  # noqa: E402

TOLERANCE = 1e-5  # float32 rounding through three blocks is 1e-6; the promise is 1e-4


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


def sd3(family):
    """A tiny transformer with every number drawn, those of its table of positions too."""
    model = tm.randomise(SD3Transformer2DModel(**tm.SD3[family]))
    with torch.no_grad():
        model.pos_embed.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
    return model


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def condition(seed, n, config):
    return {
        "context": normal(seed, n, 5, config["joint_attention_dim"]),
        "pooled": normal(seed + 1, n, config["pooled_projection_dim"]),
    }


def theirs(model, x, t, cond):
    with torch.no_grad():
        context, pooled = torch.from_numpy(cond["context"]), torch.from_numpy(cond["pooled"])
        y = model(tm.nchw(x), encoder_hidden_states=context, pooled_projections=pooled, timestep=torch.from_numpy(t))
    return tm.nhwc(y.sample)


@pytest.mark.parametrize("size", [(8, 8), (6, 14), (20, 2)])
@pytest.mark.parametrize("family", tm.SD3)
def test_transformer(tmp_path, family, size):
    model = sd3(family)
    model.save_pretrained(tmp_path)
    module, params, _ = load_component(tmp_path)
    t = np.array([0.0, 0.7, 500.25, 1000.0], np.float32)
    x, cond = normal(0, 4, *size, 16), condition(1, 4, tm.SD3[family])
    y = jax.jit(module.apply)({"params": params}, x, t, cond)
    assert tm.relative(y, theirs(model, x, t, cond)) < TOLERANCE


def test_bfloat16(tmp_path):
    model = sd3("medium35")
    model.save_pretrained(tmp_path)
    module, params, _ = load_component(tmp_path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    t, x, cond = np.array([700.0], np.float32), normal(0, 1, 8, 8, 16), condition(1, 1, tm.SD3["medium35"])
    y = jax.jit(module.apply)({"params": params}, x, t, cond)
    assert y.dtype == jnp.bfloat16
    assert tm.relative(y, theirs(model, x, t, cond)) < 0.05  # 8 bits through three blocks


def test_positions_of_init_are_those_of_diffusers():
    config = {"sample_size": 12, "patch_size": 2, "pos_embed_max_size": 10}
    model = SD3Transformer2DModel(**tm.SD3["medium"] | config)
    module = module_from_config(dict(model.config) | {"_class_name": "SD3Transformer2DModel"})
    params = module.init(jax.random.key(0), *(jax.tree.map(lambda a: jnp.zeros(a.shape), module.inputs())))["params"]
    # the sines of two libraries, in float64, rounded to float32
    np.testing.assert_allclose(params["pos_embed"]["pos_embed"], model.pos_embed.pos_embed.numpy(), atol=1e-7)


VAE = tm.KL | {
    "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip


def test_autoencoder_of_16_channels(tmp_path):
    model = tm.randomise(AutoencoderKL(**VAE))
    model.save_pretrained(tmp_path)
    module, params, _ = load_component(tmp_path)
    images, latents = normal(0, 2, 16, 24, 3), normal(1, 2, 8, 12, 16)
    with torch.no_grad():
        mean = model.encode(tm.nchw(images)).latent_dist.mean
        picture = model.decode(tm.nchw(latents) / 1.5305 + 0.0609).sample
    assert tm.relative(module.apply({"params": params}, images, method="encode")[0], tm.nhwc(mean)) < TOLERANCE
    scaled = module.apply({"params": params}, images, method="to_latents")
    assert tm.relative(scaled, tm.nhwc((mean - 0.0609) * 1.5305)) < TOLERANCE
    assert tm.relative(module.apply({"params": params}, latents, method="from_latents"), tm.nhwc(picture)) < TOLERANCE


# Files


def published(tensors, last):
    """A transformer's tensors in the published layout, from diffusers' names."""
    names, found = {}, {}
    for old, new in single_sd3.OUTSIDE.items():
        names |= {f"{new}.{leaf}": (f"{old}.{leaf}", None) for leaf in ("weight", "bias")}
    for i in range(last + 1):
        for side, inside in single_sd3.INSIDE.items():
            for old, new in inside.items():
                for third, one in enumerate(new if isinstance(new, tuple) else [new]):
                    for leaf in ("weight", "bias"):
                        place = f"joint_blocks.{i}.{side}.{old}.{leaf}"
                        names[f"transformer_blocks.{i}.{one}.{leaf}"] = (place, third if new != one else None)
    for key, value in tensors.items():
        if key == "pos_embed.pos_embed":
            found["pos_embed"] = value
            continue
        place, third = names[key]
        if "norm_out" in key or f"blocks.{last}.norm1_context" in key:
            scale, shift = np.split(value, 2)
            value = np.concatenate([shift, scale])
        if third is not None:
            whole = found.setdefault(place, np.zeros((3 * len(value), *value.shape[1:]), value.dtype))
            whole[third * len(value) : (third + 1) * len(value)] = value
        else:
            found[place] = value
    return found


def clip(kind):
    return tm.text_encoder({"clip_l": tm.CLIP_L, "clip_g": tm.CLIP_G}[kind], projection=True)


def t5():
    config = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return tm.randomise(transformers.T5EncoderModel(transformers.T5Config(**config)))


def state(model, prefix=""):
    tensors = {prefix + key: np.ascontiguousarray(value.numpy()) for key, value in model.state_dict().items()}
    return {key: value for key, value in tensors.items() if "embed_tokens" not in key}


def whole_file(family):
    """A published single file: transformer, autoencoder and the three text encoders."""
    model = sd3(family)
    last = tm.SD3[family]["num_layers"] - 1
    file = {f"model.diffusion_model.{key}": value for key, value in published(state(model), last).items()}
    vae = tm.randomise(AutoencoderKL(**VAE))
    levels = len(VAE["block_out_channels"])
    file |= {"first_stage_model." + vae_key(key, levels): value for key, value in state(vae).items()}
    for name, text in {"clip_l": clip("clip_l"), "clip_g": clip("clip_g"), "t5xxl": t5()}.items():
        file |= state(text, f"text_encoders.{name}.transformer.")
        file[f"text_encoders.{name}.logit_scale"] = np.ones((), np.float32)
    return model, vae, file


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("family", tm.SD3)
def test_published_layout_is_what_diffusers_reads(family):
    """The layout that the next test writes, held against diffusers' own conversion."""
    model = sd3(family)
    file = published(state(model), tm.SD3[family]["num_layers"] - 1)
    tensors = {key: torch.from_numpy(value.copy()) for key, value in file.items()}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    assert converted.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, converted[key]), key


@pytest.mark.parametrize("family", tm.SD3)
def test_single_file(tmp_path, family):
    model, vae, file = whole_file(family)
    model.save_pretrained(tmp_path / "transformer")
    vae.save_pretrained(tmp_path / "vae")
    folder = load_models(tmp_path)
    without_t5 = {key: value for key, value in file.items() if "t5xxl" not in key}
    save_file(without_t5, tmp_path / "model.safetensors")
    given = {"transformer": json.loads((tmp_path / "transformer/config.json").read_text())}
    found = load_models(tmp_path / "model.safetensors", configs=given)
    for name in ("transformer", "vae"):
        same(found[name].params, folder[name].params)
    text = found["text_encoder"].params
    same(text["text_projection"]["kernel"], np.eye(64, dtype=np.float32))
    second = state(clip("clip_g"))["text_projection.weight"]
    same(found["text_encoder_2"].params["text_projection"]["kernel"], second.T)
    assert found["text_encoder_2"].module.config.hidden_act == "gelu"
    assert found["vae"].module.config.shift_factor == 0.0609

    bare = {key.removeprefix("model.diffusion_model."): value for key, value in file.items() if "diffusion" in key}
    save_file(bare, tmp_path / "bare.safetensors")
    same(load_models(tmp_path / "bare.safetensors", configs=given)["transformer"].params, folder["transformer"].params)


@pytest.mark.parametrize("family", tm.SD3)
def test_single_file_says_what_it_is(tmp_path, family):
    """The configurations from shapes alone. Without norms of queries nothing says the heads: the published ones'."""
    model, vae, file = whole_file(family)
    save_file(file, tmp_path / "model.safetensors")
    found = single_sd3.parts(open_file(tmp_path / "model.safetensors"))
    ours, expected = found["transformer"].config, dict(model.config)
    assert ours.pop("sample_size") == 128
    if expected["qk_norm"] is None:
        assert (ours.pop("attention_head_dim"), ours.pop("num_attention_heads")) == (64, 1)
    assert ours.pop("dual_attention_layers") == list(expected["dual_attention_layers"])
    assert ours.items() <= (expected | {"_class_name": "SD3Transformer2DModel"}).items()
    expected = {key: list(v) if isinstance(v, tuple) else v for key, v in vae.config.items()}
    assert found["vae"].config.items() <= (expected | {"_class_name": "AutoencoderKL"}).items()
    said = t5().config.to_dict()
    assert found["text_encoder_3"].config.items() <= (said | {"architectures": ["T5EncoderModel"]}).items()
    assert found["text_encoder_3"].tensors.keys() == state(t5()).keys()


def test_single_file_as_diffusers_loads_it(tmp_path):
    model, vae, file = whole_file("medium35")
    for name, part in {"transformer": model, "vae": vae}.items():
        part.save_pretrained(tmp_path / name)
    save_file(file, tmp_path / "model.safetensors")
    for name, part in {"transformer": model, "vae": vae}.items():
        again = type(part).from_single_file(str(tmp_path / "model.safetensors"), config=str(tmp_path), subfolder=name)
        for key, value in part.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.parametrize("family", tm.SD3)
def test_export_is_the_file_that_was_read(tmp_path, family):
    sd3(family).save_pretrained(tmp_path / "transformer")
    export(tmp_path / "again", load_models(tmp_path))
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


# Sampling


def test_eight_steps_of_the_real_pipeline(tmp_path):
    """Classifier-free guidance with a negative prompt, on a picture that is no square; from one noise."""
    model, scheduler = sd3("medium35"), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    model.save_pretrained(tmp_path)
    module, params, _ = load_component(tmp_path)
    prompts, negative, noise = (
        condition(0, 2, tm.SD3["medium35"]),
        condition(5, 1, tm.SD3["medium35"]),
        normal(9, 2, 8, 12, 16),
    )
    pipeline = diffusers.StableDiffusion3Pipeline(model, scheduler, tm.randomise(AutoencoderKL(**VAE)), *[None] * 6)
    pipeline.set_progress_bar_config(disable=True)
    given = {"": prompts, "negative_": {key: np.repeat(value, 2, 0) for key, value in negative.items()}}
    embeds = {f"{who}prompt_embeds": torch.from_numpy(cond["context"]) for who, cond in given.items()}
    embeds |= {f"{who}pooled_prompt_embeds": torch.from_numpy(cond["pooled"]) for who, cond in given.items()}
    expected = pipeline(
        **embeds, latents=tm.nchw(noise), height=16, width=24, num_inference_steps=8, guidance_scale=4.5,
        output_type="latent",
    ).images  # fmt: skip
    ours = FlowScheduler(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
    denoiser = cfg(from_model(module.apply, ours.prediction, ours.time), 4.5, {k: v[0] for k, v in negative.items()})
    samples = guided_sample(
        {"params": params}, jax.random.key(0), None, model=DiffusionModel(denoiser, ours.schedule(), (8, 12, 16)),
        num_samples=2, cond=prompts, sampler=DDIM(eta=0.0), times=ours.times(8), x_init=noise,
    )  # fmt: skip
    # eight steps of the network, each amplified by the guidance
    assert tm.relative(samples.x, tm.nhwc(expected)) < 1e-4


# Full size

MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
RMS = {"qk_norm": "rms_norm"}
FULL = {  # with the number of parameters in millions, the table of positions among them: 2, 2.5 and 8.1 thousand
    "medium": (MEDIUM, 2085.0),
    "medium35": (MEDIUM | RMS | {"dual_attention_layers": (*range(13),), "pos_embed_max_size": 384}, 2469.7),
    "large35": (MEDIUM | RMS | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}, 8146.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_tree_of_full_size(name):
    config, millions = FULL[name]
    with torch.device("meta"):
        model = SD3Transformer2DModel(**config)
    module = module_from_config(dict(model.config) | {"_class_name": "SD3Transformer2DModel"})
    tree = convert.abstract(module)
    leaves = convert.flat(tree)
    ours = {key: convert.torch_shape(path[-1], leaves[path].shape) for key, path in convert.keys(tree).items()}
    assert ours == {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert round(sum(leaf.size for leaf in leaves.values()) / 1e6, 1) == millions
