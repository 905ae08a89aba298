"""FLUX's transformers, FLUX.2's autoencoder and FLUX's single files against diffusers, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")

import torch_models as tm  # noqa: E402
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel, FluxTransformer2DModel  # noqa: E402
from diffusers.loaders import single_file_utils  # noqa: E402
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline  # noqa: E402

from mmdjax.checkpoint import Checkpoint, Entry  # noqa: E402
from mmdjax.sd.files import convert, single_flux  # noqa: E402
from mmdjax.sd.models import load_component, load_models, module_from_config  # noqa: E402

TOLERANCE = 1e-5  # float32 rounding through four blocks is 1e-6
GUIDED = 1e-4  # guidance 7 turns waves by 7,000 radians, which float32 rounds to 5e-4: each library's in its own way
T = np.float32([1e-3, 0.31, 1.0])
GUIDANCE = np.float32([1.0, 3.5, 7.0])


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ours(model, tmp_path, *args, method=None, **how):
    """What our module computes on the checkpoint that `model` writes."""
    model.save_pretrained(tmp_path)
    module, params, _ = load_component(tmp_path, **how)
    return jax.jit(lambda params: module.apply({"params": params}, *args, method=method))(params)


@pytest.mark.parametrize("size", [(4, 6), (10, 2)])
@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
def test_flux(tmp_path, guided, size):
    model = tm.randomise(FluxTransformer2DModel(**tm.FLUX | {"guidance_embeds": guided}))
    guidance = GUIDANCE if guided else None
    x, context, pooled = normal(0, 3, *size, 4), normal(1, 3, 7, 24), normal(2, 3, 12)
    y = ours(model, tmp_path, x, T, {"context": context, "pooled": pooled}, guidance)
    assert tm.relative(y, tm.flux(model, x, T, context, pooled, guidance)) < (GUIDED if guided else TOLERANCE)


@pytest.mark.parametrize("size", [(4, 6), (5, 1)])
@pytest.mark.parametrize("guided", [True, False], ids=["dev", "klein"])
def test_flux2(tmp_path, guided, size):
    model = tm.randomise(Flux2Transformer2DModel(**tm.FLUX2 | {"guidance_embeds": guided}))
    guidance = GUIDANCE if guided else None
    x, context = normal(0, 3, *size, 16), normal(1, 3, 7, 24)
    y = ours(model, tmp_path, x, T, context, guidance)
    assert tm.relative(y, tm.flux2(model, x, T, context, guidance)) < (GUIDED if guided else TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [{"mlp_ratio": 2.5, "rope_theta": 500, "eps": 1e-3}, {"out_channels": 8, "timestep_guidance_channels": 64}],
)
def test_settings_of_flux2(tmp_path, change):
    model = tm.randomise(Flux2Transformer2DModel(**tm.FLUX2 | change))
    x, context = normal(0, 3, 4, 6, 16), normal(1, 3, 7, 24)
    y = ours(model, tmp_path, x, T, {"context": context})
    assert tm.relative(y, tm.flux2(model, x, T, context)) < TOLERANCE


def test_flux_of_more_channels(tmp_path):
    """FLUX.1's control and fill models take more channels than they predict."""
    model = tm.randomise(FluxTransformer2DModel(**tm.FLUX | {"in_channels": 32, "out_channels": 16}))
    x, context, pooled = normal(0, 3, 4, 6, 8), normal(1, 3, 7, 24), normal(2, 3, 12)
    y = ours(model, tmp_path, x, T, {"context": context, "pooled": pooled}, GUIDANCE)
    assert tm.relative(y, tm.flux(model, x, T, context, pooled, GUIDANCE)) < GUIDED


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(tmp_path, dtype):
    """Within the rounding of 8 bits, through four blocks."""
    model = tm.randomise(Flux2Transformer2DModel(**tm.FLUX2))
    x, context = normal(0, 3, 4, 6, 16), normal(1, 3, 7, 24)
    y = ours(model, tmp_path, x, T, context, dtype=dtype, param_dtype=dtype)
    assert y.dtype == dtype
    assert tm.relative(y, tm.flux2(model, x, T, context)) < 0.05


def test_remat_changes_no_gradient(tmp_path):
    config = tm.FLUX2 | {"num_layers": 1, "num_single_layers": 1}
    tm.randomise(Flux2Transformer2DModel(**config)).save_pretrained(tmp_path)
    x, context = normal(0, 3, 4, 6, 16), normal(1, 3, 7, 24)

    def gradient(remat):
        module, params, _ = load_component(tmp_path, remat=remat)
        loss = lambda params: (module.apply({"params": params}, x, T, context) ** 2).sum()
        assert ("remat" in str(jax.make_jaxpr(loss)(params))) == remat
        return jax.jit(jax.grad(loss))(params)

    plain, again = gradient(False), gradient(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max()), plain, again)


VAES = {
    "flux2": tm.KL_FLUX2,
    "small decoder": tm.KL_FLUX2 | {"decoder_block_out_channels": (32, 32), "batch_norm_eps": 0.1},
    "no quant convs": tm.KL_FLUX2 | {"use_quant_conv": False, "use_post_quant_conv": False},
}


@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_autoencoder(tmp_path, config):
    model = tm.randomise_statistics(tm.randomise(AutoencoderKLFlux2(**config)))
    images, latents = normal(0, 2, 16, 24, 3), normal(1, 2, 4, 6, 16)
    mean = model.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
    with torch.no_grad():  # the pipelines' lines around the autoencoder
        z = Flux2KleinPipeline._patchify_latents(model.encode(tm.nchw(images)).latent_dist.mode())
        encoded = (z - mean) / deviation
        z = Flux2KleinPipeline._unpatchify_latents(tm.nchw(latents) * deviation + mean)
        decoded = model.decode(z).sample
    assert tm.relative(ours(model, tmp_path, images, method="to_latents"), tm.nhwc(encoded)) < TOLERANCE
    assert tm.relative(ours(model, tmp_path, latents, method="from_latents"), tm.nhwc(decoded)) < TOLERANCE
    config = load_component(tmp_path).module.config
    assert encoded.shape[1] == config.latent_channels
    assert images.shape[1] == encoded.shape[2] * config.downscale


FULL = {  # with the exact number of parameters of the published models
    "flux-dev": (FluxTransformer2DModel, {"guidance_embeds": True}, 11_901_408_320),
    "flux-schnell": (FluxTransformer2DModel, {}, 11_891_178_560),
    "klein-4b": (
        Flux2Transformer2DModel,
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        3_875_544_576,
    ),
    "vae": (AutoencoderKLFlux2, {}, None),
}


@pytest.mark.parametrize("name", FULL)
def test_tree_of_full_size(name):
    cls, config, parameters = FULL[name]
    with torch.device("meta"):
        theirs = cls(**config)
    module = module_from_config(dict(theirs.config) | {"_class_name": cls.__name__})
    tree = convert.abstract(module)
    leaves = convert.flat(tree)
    sizes = {key: convert.torch_shape(path[-1], leaves[path].shape) for key, path in convert.keys(tree).items()}
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    expected.pop("bn.num_batches_tracked", None)
    assert sizes == expected
    assert parameters in (None, sum(leaf.size for leaf in leaves.values()))


# Single files, in the layout of the published ones


def linear(name, outputs, inputs, bias):
    shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | ({f"{name}.bias": (outputs,)} if bias else {})


def published(second, width, *, channels, context, pooled, head, hidden, depth=2, guidance=False, inner=None):
    """A file of FLUX.1, or of FLUX.2 if `second`, with the names of its own repository.

    `inner` is the number of columns of all matrices that act on tokens, in place of the width or `hidden`.
    """
    bias, c, u = not second, inner or width, inner or hidden
    up = 2 * hidden if second else hidden  # swiglu has two halves
    shapes = linear("img_in", width, channels, bias) | linear("txt_in", width, context, bias)
    inputs = {"time_in": 256} | ({} if second else {"vector_in": pooled}) | ({"guidance_in": 256} if guidance else {})
    for name, size in inputs.items():
        shapes |= linear(f"{name}.in_layer", width, size, bias) | linear(f"{name}.out_layer", width, c, bias)
    if second:
        for name, times in {"double_stream_modulation_img": 6, "double_stream_modulation_txt": 6}.items():
            shapes |= linear(f"{name}.lin", times * width, c, bias)
        shapes |= linear("single_stream_modulation.lin", 3 * width, c, bias)
    for i in range(depth):
        for stream in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
            shapes |= {} if second else linear(f"{stream}_mod.lin", 6 * width, c, bias)
            shapes |= linear(f"{stream}_attn.qkv", 3 * width, c, bias) | linear(f"{stream}_attn.proj", width, c, bias)
            shapes |= {f"{stream}_attn.norm.{which}_norm.scale": (head,) for which in ("query", "key")}
            shapes |= linear(f"{stream}_mlp.0", up, c, bias) | linear(f"{stream}_mlp.2", width, u, bias)
        block = f"single_blocks.{i}"
        shapes |= {} if second else linear(f"{block}.modulation.lin", 3 * width, c, bias)
        shapes |= linear(f"{block}.linear1", 3 * width + up, c, bias)
        shapes |= linear(f"{block}.linear2", width, c + u, bias)
        shapes |= {f"{block}.norm.{which}_norm.scale": (head,) for which in ("query", "key")}
    shapes |= linear("final_layer.linear", channels, c, bias)
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * width, c, bias)
    return {key: normal(i, *shape) for i, (key, shape) in enumerate(shapes.items())}


def converted(name, file, prefix):
    function = getattr(single_file_utils, f"convert_{name}_transformer_checkpoint_to_diffusers")
    found = function({prefix + key: torch.from_numpy(value) for key, value in file.items()})
    return {key: value.numpy() for key, value in found.items()}


@pytest.mark.parametrize("guidance", [True, False])
def test_names_of_flux(guidance):
    """At the published width, which diffusers' function has built in; with matrices of two columns, to be small."""
    sizes = {"channels": 2, "context": 2, "pooled": 2, "head": 128, "hidden": 4 * 3072, "inner": 2}
    file = published(False, 3072, **sizes, guidance=guidance)
    theirs = converted("flux", file, "model.diffusion_model.")
    stored = {key: Entry(value.shape, value.dtype, lambda value=value: value) for key, value in file.items()}
    checkpoint = Checkpoint(stored, "x.safetensors")
    places = single_flux.sources(theirs, 3072)
    assert {place.key for place in places.values()} == set(file)
    for key, place in places.items():
        entry = place.of(checkpoint)
        np.testing.assert_array_equal(entry.read(), theirs[key], err_msg=key)
        assert entry.shape == theirs[key].shape


def same_as_torch(params, theirs):
    """Our parameters are those of a dict in diffusers' names, all of them, bit for bit."""
    entries = convert.params_to_torch(params)
    assert entries.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(entries[key].read(), value, err_msg=key)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_single_file_of_flux2(tmp_path, prefix):
    sizes = {"channels": 16, "context": 24, "pooled": None, "head": 32, "hidden": 3 * 64}
    file = published(True, 64, **sizes)
    save_file({prefix + key: value for key, value in file.items()}, tmp_path / "flux.safetensors")
    (name, component), *others = load_models(tmp_path / "flux.safetensors").items()
    assert (name, others) == ("transformer", [])
    theirs = converted("flux2", file, "")
    same_as_torch(component.params, theirs)
    model = Flux2Transformer2DModel(**{key: value for key, value in component.config.items() if key[0] != "_"})
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in theirs.items()})
    assert (
        component.module.config
        == module_from_config(dict(model.config) | {"_class_name": "Flux2Transformer2DModel"}).config
    )
    x, context = normal(0, 3, 4, 6, 16), normal(1, 3, 7, 24)
    y = jax.jit(component.module.apply)({"params": component.params}, x, T, context)
    assert tm.relative(y, tm.flux2(model, x, T, context)) < TOLERANCE


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_single_file_of_flux(tmp_path, guidance):
    """The file with the parameters of a tiny model of diffusers against that model's own folder."""
    model = tm.randomise(FluxTransformer2DModel(**tm.FLUX | {"guidance_embeds": guidance}))
    model.save_pretrained(tmp_path / "transformer")
    file = published(False, 64, channels=16, context=24, pooled=12, head=32, hidden=4 * 64, guidance=guidance)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    for key, place in single_flux.sources(state, 64).items():
        value, first = state[key], 0
        for start, end in place.ranges:
            rows = file[place.key][start:end]
            rows[...] = value[first : first + len(rows)]
            first += len(rows)
        assert first == len(value)
    save_file(file, tmp_path / "flux.safetensors")
    (found,) = load_models(tmp_path / "flux.safetensors").values()
    folder = load_models(tmp_path)["transformer"]
    assert found.module == folder.module
    jax.tree.map(np.testing.assert_array_equal, found.params, folder.params)
