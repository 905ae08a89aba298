"""DiT, SiT and PixArt: what diffusers computed (tests/fixtures), the published files, and what is refused."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_tiny
from safetensors.numpy import save_file
from test_sd_models import apply, recorded, relative

from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry
from mmdjax.distributed import SMALL
from mmdjax.sd.files import convert, published
from mmdjax.sd.models import load_models, module_from_config
from mmdjax.sd.networks.transformers.blocks import sincos_positions

TOLERANCE = 1e-5  # relative, float32: rounding is 1e-6
DIT = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 1,
    "sample_size": 4,
    "num_embeds_ada_norm": 3,
}
PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 6,
    "num_layers": 1,
    "sample_size": 4,
    "cross_attention_dim": 12,
    "caption_channels": 5,
    "use_additional_conditions": True,
}
X, T, CONTEXT = jnp.ones((2, 4, 8, 4)), jnp.array([0.0, 999.0]), jnp.ones((2, 3, 5))
CONDITIONS = {"dit": (DIT, jnp.array([0, 3])), "pixart": (PIXART, {"context": CONTEXT, "mask": jnp.ones((2, 3))})}


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


def traced(raw, *args, **how):
    """What the network returns, as a shape and dtype."""
    module = module_from_config(raw, **how)
    return jax.eval_shape(lambda p: module.apply({"params": p}, *args), convert.abstract(module))


# --- against what torch computed ---


def test_dit():
    fixture, a = recorded("dit")
    assert relative(apply(fixture["config"], a["x"], a["t"], a["labels"]), a["output"]) < TOLERANCE


def test_pixart():
    fixture, a = recorded("pixart")
    cond = {key: a[key] for key in ("context", "mask")}
    assert relative(apply(fixture["config"], a["x"], a["t"], cond), a["output"]) < TOLERANCE


def test_positions_span_the_trained_grid():
    """A grid of twice the size has the trained one's positions at every other place; so has one of scale 2."""
    grids = {"trained": {}, "same": {"base": 4}, "finer": {"base": 4, "height": 8}, "wider": {"scale": 2.0, "width": 8}}

    @jax.jit
    def made():
        return {name: sincos_positions(**{"height": 4, "width": 4, "dim": 16} | grid) for name, grid in grids.items()}

    trained, same, finer, wider = (np.asarray(made()[name]) for name in grids)
    np.testing.assert_array_equal(same, trained)
    np.testing.assert_array_equal(finer.reshape(8, 4, 16)[::2], trained.reshape(4, 4, 16))
    np.testing.assert_array_equal(wider.reshape(4, 8, 16)[:, ::2, :8], trained.reshape(4, 4, 16)[..., :8])


# --- settings and conditions ---


@pytest.mark.slow
@pytest.mark.parametrize("name", CONDITIONS)
def test_dtypes_are_separate(name):
    raw, cond = CONDITIONS[name]
    module = module_from_config(raw, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(convert.abstract(module))} == {"float32"}
    assert traced(raw, X, T, cond, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_labels_are_checked():
    module = module_from_config(DIT)
    for labels, text in {
        (0, 4): "labels has 4; give 0 to 2, or 3 for no class",
        (-1, 5): "labels has -1, 5; give",
        (1,): r"labels are int32 of shape \(1,\); give integers \[2\]",
        (0.0, 1.0): "labels are float32 of shape",
    }.items():
        with pytest.raises(ValueError, match=text):
            module.apply({"params": {}}, X, T, jnp.array(labels))


@pytest.mark.slow
def test_without_labels_there_is_no_class():
    module, params, _ = sd_tiny.component(DIT)
    call = jax.jit(lambda labels: [module.apply({"params": params}, X, T, given) for given in (None, labels)])
    none, last = call(jnp.array([3, 3]))
    assert relative(none, last) < TOLERANCE
    assert np.isnan(call(jnp.array([3, 4]))[1][1]).all()  # out of range where it cannot be checked


def test_conditions_are_checked():
    for cond, text in (
        (CONTEXT, r'this model is conditioned on a mapping of "context" \[n, l, d\] and "mask"'),
        ({"mask": CONTEXT}, "this model is conditioned on a mapping"),
        ({"context": jnp.ones((2, 3, 4))}, "the context has width 4; this model takes 5"),
        ({"context": CONTEXT, "mask": jnp.ones((2, 4))}, r"the mask has shape \(2, 4\) but the context \(2, 3, 5\)"),
    ):
        with pytest.raises(ValueError, match=text):
            traced(PIXART, X, T, cond)


@pytest.mark.parametrize("name", CONDITIONS)
def test_whole_patches(name):
    raw, cond = CONDITIONS[name]
    with pytest.raises(ValueError, match="the picture is 4 × 7; give a multiple of the patch, 2"):
        traced(raw, X[:, :, :7], T, cond)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (DIT | {"out_channels": 5}, "out_channels is 5 for in_channels 4; implemented: the same number, or twice it"),
        (DIT | {"norm_type": "ada_norm"}, "norm_type = 'ada_norm' .implemented: 'ada_norm_zero'"),
        (DIT | {"num_layers": 5000}, "DiTConfig describes a network of 1 levels and 5,000 blocks"),
        (PIXART | {"cross_attention_dim": 5}, "prompts are projected to the width 12 but cross_attention_dim is 5"),
        (PIXART | {"attention_head_dim": 4, "cross_attention_dim": 8}, "the width 8 does not split in three"),
        (DIT | {"_class_name": "Transformer2DModel"}, "config.json is of 'Transformer2DModel', which is not impl"),
    ],
)
def test_settings_are_checked(raw, text):
    with pytest.raises(ValueError, match=text):
        module_from_config(raw)


def test_class_of_old_folders():
    """Before diffusers parted the classes, norm_type said which of them a folder holds."""
    for raw in (DIT, PIXART):
        norm_type = "ada_norm_zero" if raw is DIT else "ada_norm_single"
        assert module_from_config(raw) == module_from_config(
            raw | {"_class_name": "Transformer2DModel", "norm_type": norm_type}
        )


# --- the published files ---


def entry(shape, value=None):
    return Entry(shape, np.dtype("float32"), lambda: np.zeros(shape, np.float32) if value is None else value)


def file(width, depth, patch, side=4, channels=4, **other):
    """The shapes of a published file; nothing but the positions takes memory."""
    shapes = {
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
        "final_layer.linear.weight": (2 * channels * patch**2, width),
        "final_layer.linear.bias": (2 * channels * patch**2,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for i in range(depth):
        for name, (rows, columns) in {
            "attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4), "adaLN_modulation.1": (6, 1)
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{i}.{name}.bias"] = (rows * width,)
    positions = np.asarray(sincos_positions(side, side, width))[None]
    stored = {key: entry(shape) for key, shape in shapes.items()} | {"pos_embed": entry(positions.shape, positions)}
    return Checkpoint(stored | other, "x.pt")


SIZES = {"S": (384, 2, 6), "B": (768, 3, 12), "L": (1024, 1, 16), "XL": (1152, 1, 16)}


@pytest.mark.parametrize(
    ("size", "kind", "patch"), [("S", "DiT", 2), ("B", "SiT", 4), ("L", "DiT", 8), ("XL", "SiT", 2)]
)
def test_config_of_a_published_file(size, kind, patch):
    width, depth, heads = SIZES[size]
    raw, renamed = published.translate(file(width, depth, patch), {"_class_name": kind})
    config = module_from_config(raw).config
    assert (type(module_from_config(raw)).__name__, config.width, config.num_layers) == (kind, width, depth)
    assert (config.num_attention_heads, config.patch_size, config.sample_size) == (heads, patch, 4 * patch)
    assert (config.in_channels, config.out_channels, config.num_classes) == (4, 8, 1000)
    if size != "S":
        return
    tree = convert.abstract(module_from_config(raw))
    shapes = {key: convert.torch_shape(p[-1], convert.flat(tree)[p].shape) for key, p in convert.keys(tree).items()}
    assert {key: renamed.shape(key) for key in renamed} == shapes


def test_published_file_loads(tmp_path):
    """Query, key and value are the thirds of one tensor; a number of heads may be given."""
    rng = np.random.default_rng(0)
    tensors = {key: rng.standard_normal(file(8, 1, 2).shape(key)).astype(np.float32) for key in file(8, 1, 2)}
    tensors["pos_embed"] = np.asarray(sincos_positions(4, 4, 8))[None]
    save_file(tensors, tmp_path / "x.safetensors")
    load = functools.partial(load_models, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors: DiT, a model of noise, and SiT, .*\"DiT\".*\"SiT\""):
        load()
    with pytest.raises(ValueError, match="not 'UNet2DModel'"):
        load(configs={"transformer": {"_class_name": "UNet2DModel"}})
    with pytest.raises(ValueError, match=r"x.safetensors is 8 wide, and 0 heads do not divide it; give their number"):
        load(configs={"transformer": {"_class_name": "SiT"}})
    settings = {"_class_name": "SiT", "num_attention_heads": 2}
    with pytest.raises(CheckpointError, match=r'x.safetensors holds no averaged weights under "ema"'):
        load(ema=True, configs={"transformer": settings})
    (component,) = load(configs={"transformer": settings}).values()
    attention = component.params["transformer_blocks.0"]["attn1"]
    for third, part in enumerate(("to_q", "to_k", "to_v")):
        rows = slice(8 * third, 8 * third + 8)
        np.testing.assert_array_equal(attention[part]["kernel"], tensors["blocks.0.attn.qkv.weight"][rows].T)
        np.testing.assert_array_equal(attention[part]["bias"], tensors["blocks.0.attn.qkv.bias"][rows])
    tensors["blocks.0.attn.q_norm.weight"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unused.*\n  unused: transformer_blocks.0.attn.q_norm.weight"):
        load(configs={"transformer": settings})


def test_unsound_published_files():
    given = {"_class_name": "DiT", "num_attention_heads": 1}
    for other, text in (
        (
            {"pos_embed": entry((1, 16, 8))},
            r"pos_embed of shape \[1, 16, 8\] are not the sines and cosines of a square",
        ),
        ({"pos_embed": entry((1, 15, 8))}, "are not the sines and cosines"),
        ({"pos_embed": entry((16, 8))}, r"x.pt is no whole DiT or SiT: pos_embed has shape \[16, 8\]"),
        ({"x_embedder.proj.weight": entry((8, 4))}, "x_embedder.proj.weight has shape"),
    ):
        with pytest.raises(CheckpointError, match=text):
            published.translate(file(8, 1, 2, **other), given)
    lacking = Checkpoint({k: v for k, v in file(8, 1, 2).stored.items() if k != "pos_embed"}, "x.pt")
    with pytest.raises(CheckpointError, match=r"x.pt lacks pos_embed, which says for what size it was trained; give"):
        published.translate(lacking, given)
    raw, _ = published.translate(lacking, given | {"sample_size": 12})
    assert raw["sample_size"] == 12


# --- in full size, and gradients ---

FULL = {  # as published, without positions, which are no parameters; DiT as its repository counts it has 294,912 more
    "DiT-XL/2": ({"_class_name": "DiT", "out_channels": 8}, 674_834_720),
    "SiT-XL/2": ({"_class_name": "SiT", "out_channels": 8}, 674_834_720),
    "PixArt-Σ-XL/2": (
        {"_class_name": "PixArtTransformer2DModel", "caption_channels": 4096, "use_additional_conditions": False},
        610_856_096,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size(name):
    """The number of parameters, and that eight devices hold an eighth each: only small arrays stay whole."""
    raw, count = FULL[name]
    leaves = jax.tree.leaves(convert.abstract(module_from_config(raw)))
    assert sum(leaf.size for leaf in leaves) == count
    assert all(any(side % 8 == 0 for side in leaf.shape) for leaf in leaves if leaf.size >= SMALL)
    assert sum(leaf.size for leaf in leaves if leaf.size < SMALL) < 0.002 * count


@pytest.mark.slow
def test_starts_at_zero():
    """adaLN-Zero and a last map of zeros: before training the output is zero, and every block is the identity."""
    for raw, cond in CONDITIONS.values():
        module = module_from_config(raw)
        y, _ = jax.jit(lambda key, module=module, cond=cond: module.init_with_output(key, X, T, cond))(
            jax.random.key(0)
        )
        assert (y == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONDITIONS)
def test_remat_changes_no_gradient(name):
    raw, cond = CONDITIONS[name]

    def gradient(remat):
        module, params, _ = sd_tiny.component(raw, remat=remat)
        return jax.jit(jax.grad(lambda x: (module.apply({"params": params}, x, T, cond) ** 2).sum()))(X)

    one, other = gradient(False), gradient(True)
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * np.abs(one).max())
    kept = str(jax.make_jaxpr(lambda p: module_from_config(raw, remat=True).apply({"params": p}, X, T, cond))(
        sd_tiny.component(raw).params
    ))  # fmt: skip
    assert kept.count("name=checkpoint") >= 1 or "remat" in kept


def test_full_size_is_counted_by_hand():
    """XL/2 from its formula: 28 blocks of 18 w² + 15 w, and the rest."""
    w, c, p = 1152, 4, 2
    block = 18 * w * w + 15 * w
    rest = (c * p * p + 1) * w + (257 * w + (w + 1) * w) + 1001 * w + 2 * (w + 1) * w + (w + 1) * 2 * c * p * p
    assert 28 * block + rest == FULL["DiT-XL/2"][1]
    assert math.isclose(FULL["DiT-XL/2"][1] / 1e6, 675, rel_tol=1e-3)
