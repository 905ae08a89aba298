"""DiT, SiT and PixArt against diffusers and against the published formulas, float32."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")

import sd_tiny  # noqa: E402
import torch_models as tm  # noqa: E402
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, Transformer2DModel  # noqa: E402
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu  # noqa: E402

from mmdjax.sd.models import export, load_component, load_models  # noqa: E402

TOLERANCE = 1e-5  # float32 rounding is 1e-6; the promise is 1e-4
TIMES = np.array([0, 1, 999])


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tensor(x):
    return torch.from_numpy(np.array(x))


def called(component, *args, method=None):
    module, params, _ = component
    return jax.jit(lambda params: module.apply({"params": params}, *args, method=method))(params)


def tokens_out(model, layer, *args, **kwargs):
    """What a linear layer of the model gives, for sizes at which diffusers folds the picture wrongly."""
    seen = []
    handle = getattr(model, layer).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(*args, **kwargs)
    handle.remove()
    return seen[0].numpy()


def folded(tokens, patch, height, width, channels):
    """Pictures of patches [n, l, patch² k], the first channels of them."""
    x = tokens.reshape(len(tokens), height // patch, width // patch, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(tokens), height, width, -1)[..., :channels]


# --- DiT ---


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"out_channels": None, "attention_bias": False, "norm_eps": 1e-2, "upcast_attention": True},
        {"patch_size": 4, "in_channels": 3, "out_channels": 6},
    ],
)
def test_dit(tmp_path, change):
    """At the training's size, at another square one, and at two that are not square."""
    theirs = tm.randomise(DiTTransformer2DModel(**tm.DIT | change))
    theirs.save_pretrained(tmp_path)
    ours = load_component(tmp_path)
    channels, patch, labels = theirs.config.in_channels, theirs.config.patch_size, np.array([0, 6, 7])
    for height, width in ((8, 8), (12, 12), (4, 16), (16, 4)):
        x = normal(height, 3, height, width, channels)
        out = tokens_out(theirs, "proj_out_2", tm.nchw(x), timestep=tensor(TIMES), class_labels=tensor(labels))
        y = called(ours, x, jnp.asarray(TIMES), jnp.asarray(labels))
        assert tm.relative(y, folded(out, patch, height, width, channels)) < TOLERANCE
        if height == width:
            with torch.no_grad():
                whole = theirs(tm.nchw(x), timestep=tensor(TIMES), class_labels=tensor(labels)).sample
            assert tm.relative(y, tm.nhwc(whole)[..., :channels]) < TOLERANCE


def test_class_of_old_folders(tmp_path):
    """facebook/DiT-XL-2-256 and PixArt's folders name the class that diffusers had before it parted them."""
    for norm_type, config, cls in (
        ("ada_norm_zero", tm.DIT, DiTTransformer2DModel),
        ("ada_norm_single", tm.PIXART, PixArtTransformer2DModel),
    ):
        old = {"norm_type": norm_type, "activation_fn": "gelu-approximate", "patch_size": 2, "in_channels": 4}
        old |= {"norm_elementwise_affine": False, "attention_bias": True}
        theirs = tm.randomise(Transformer2DModel(**config | old))
        theirs.save_pretrained(tmp_path / norm_type)
        assert type(load_component(tmp_path / norm_type).module).__name__ == cls.__name__.replace(
            "Transformer2DModel", ""
        )


# --- the published files ---


class Published:
    """The published network, written from the papers' formulas, on tensors of the published names."""

    def __init__(self, state, heads):
        self.state, self.heads = state, heads

    def linear(self, name, x):
        return torch.nn.functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def block(self, name, x, c):
        n, length, width = x.shape
        shift, scale, gate, shift2, scale2, gate2 = self.linear(f"{name}.adaLN_modulation.1", silu(c)).chunk(6, 1)
        h = layer_norm(x, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        qkv = self.linear(f"{name}.attn.qkv", h).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(n, length, width)
        x = x + gate[:, None] * self.linear(f"{name}.attn.proj", h)
        h = layer_norm(x, (width,), eps=1e-6) * (1 + scale2[:, None]) + shift2[:, None]
        h = self.linear(f"{name}.mlp.fc2", gelu(self.linear(f"{name}.mlp.fc1", h), approximate="tanh"))
        return x + gate2[:, None] * h

    def __call__(self, x, t, labels):
        kernel = self.state["x_embedder.proj.weight"]
        h = torch.nn.functional.conv2d(x, kernel, self.state["x_embedder.proj.bias"], stride=kernel.shape[-1])
        h = h.flatten(2).transpose(1, 2) + self.state["pos_embed"]
        angles = t[:, None].float() * torch.exp(-np.log(10_000) * torch.arange(128) / 128)
        time = self.linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1).float())
        c = self.linear("t_embedder.mlp.2", silu(time)) + self.state["y_embedder.embedding_table.weight"][labels]
        for i in range(sum("attn.qkv.weight" in key for key in self.state)):
            h = self.block(f"blocks.{i}", h, c)
        shift, scale = self.linear("final_layer.adaLN_modulation.1", silu(c)).chunk(2, 1)
        h = layer_norm(h, h.shape[2:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        return self.linear("final_layer.linear", h).numpy()


def positions(side, width):
    """The published positions of a square grid."""
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side))).reshape(2, -1, 1)
    angles = grid / 10_000 ** (np.arange(width // 4) / (width // 4))
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=2)
    return torch.from_numpy(np.concatenate([*waves], axis=1)[None]).float()


def published(width=128, classes=5, patch=2, side=4, depth=2, channels=4):
    """Random tensors of a published file."""
    shapes = {
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.2.weight": (width, width),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "final_layer.linear.weight": (patch**2 * 2 * channels, width),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
    }
    for i in range(depth):
        for name, (rows, columns) in {
            "attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4), "adaLN_modulation.1": (6, 1)
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}.weight"] = (rows * width, columns * width)
    shapes |= {key.replace("weight", "bias"): shape[:1] for key, shape in shapes.items() if "table" not in key}
    state = {key: torch.from_numpy(sd_tiny.draw(key, shape)) for key, shape in shapes.items()}
    return {"pos_embed": positions(side, width)} | state


@pytest.mark.parametrize("group", [None, "model", "ema", "training"])
@pytest.mark.parametrize("kind", ["DiT", "SiT"])
def test_published_file(tmp_path, kind, group):
    """128 channels are two heads of 64; a training's checkpoint holds the average, the last step and its arguments."""
    state = published()
    tree = state if group is None else {group: state}
    if group == "training":
        last = {key: value + 1 for key, value in state.items()}
        tree = {"model": last, "ema": state, "opt": {"state": {}, "lr": 1e-4}, "args": argparse.Namespace(seed=0)}
    torch.save(tree, tmp_path / "x.pt")
    how = {"ema": True} if group in ("ema", "training") else {}
    component = load_models(tmp_path / "x.pt", configs={"transformer": {"_class_name": kind}}, **how)["transformer"]
    assert type(component.module).__name__ == kind
    assert component.module.config.sample_size == 8
    assert component.module.config.num_attention_heads == 2
    x, labels = normal(0, 3, 8, 8, 4), np.array([0, 4, 5])
    t = TIMES if kind == "DiT" else np.array([0.0, 0.3, 1.0], np.float32)
    expected = folded(Published(state, 2)(tm.nchw(x), tensor(t), tensor(labels)), 2, 8, 8, 4)
    assert tm.relative(called(component, x, jnp.asarray(t), jnp.asarray(labels)), expected) < TOLERANCE
    if kind == "SiT":
        flow = called(component, x, jnp.asarray(1 - t), jnp.asarray(labels), method="flow")
        assert tm.relative(flow, -expected) < TOLERANCE


TO_PUBLISHED = {
    "pos_embed.proj": "x_embedder.proj",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}


def test_diffusers_weights_in_published_names(tmp_path):
    """The file is the network of diffusers, once what diffusers changed in the embedding of time is put back."""
    theirs = tm.randomise(DiTTransformer2DModel(**tm.DIT | {"norm_eps": 1e-6}))
    mine = theirs.state_dict()
    for key in mine:  # the published blocks share the tables
        if ".norm1.emb." in key:
            mine[key] = mine[key.replace("blocks.1.", "blocks.0.")]
    theirs.load_state_dict(mine)
    state = {"pos_embed": positions(4, 24)}
    for key, value in mine.items():
        name, _, leaf = key.rpartition(".")
        if name in TO_PUBLISHED:
            state[f"{TO_PUBLISHED[name]}.{leaf}"] = value
    for i in range(2):
        block, old = f"blocks.{i}", f"transformer_blocks.{i}"
        for leaf in ("weight", "bias"):
            thirds = [mine[f"{old}.attn1.to_{part}.{leaf}"] for part in "qkv"]
            state[f"{block}.attn.qkv.{leaf}"] = torch.cat(thirds)
            state[f"{block}.attn.proj.{leaf}"] = mine[f"{old}.attn1.to_out.0.{leaf}"]
            state[f"{block}.mlp.fc1.{leaf}"] = mine[f"{old}.ff.net.0.proj.{leaf}"]
            state[f"{block}.mlp.fc2.{leaf}"] = mine[f"{old}.ff.net.2.{leaf}"]
            state[f"{block}.adaLN_modulation.1.{leaf}"] = mine[f"{old}.norm1.linear.{leaf}"]
    torch.save(state, tmp_path / "x.pt")
    settings = {"_class_name": "DiT", "num_attention_heads": 2}
    component = load_models(tmp_path / "x.pt", configs={"transformer": settings})["transformer"]
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, labels = normal(0, 3, 8, 8, 4), np.array([0, 6, 7])
    with torch.no_grad():
        expected = theirs(tm.nchw(x), timestep=tensor(TIMES), class_labels=tensor(labels)).sample
    y = called(component, x, jnp.asarray(TIMES), jnp.asarray(labels))
    assert tm.relative(y, tm.nhwc(expected)[..., :4]) < TOLERANCE


# --- PixArt ---

SIGMA = {"use_additional_conditions": False, "interpolation_scale": 0.5, "attention_bias": False}


def prompts(width):
    """Token states and masks of three prompts, of one token, of some, and of all."""
    return normal(1, 3, 7, width), np.arange(7) < np.array([[1], [4], [7]])


@pytest.mark.parametrize(
    "change", [{}, tm.ALPHA_1024, SIGMA, {"caption_channels": None, "out_channels": 4, "patch_size": 4}]
)
def test_pixart(tmp_path, change):
    """At the training's size and at sizes that are not square, with padded prompts, sizes given and taken from x."""
    theirs = tm.randomise(PixArtTransformer2DModel(**tm.PIXART | change))
    theirs.save_pretrained(tmp_path)
    ours = load_component(tmp_path)
    context, mask = prompts(theirs.config.caption_channels or theirs.config.cross_attention_dim)
    for height, width in ((8, 8), (4, 16), (12, 8)):
        x = normal(height, 3, height, width, 4)
        cond = {"context": context, "mask": jnp.asarray(mask, jnp.int32)}
        sizes = {"resolution": torch.tensor([[8.0 * height, 8.0 * width]] * 3)}
        sizes["aspect_ratio"] = torch.tensor([[height / width]] * 3)
        if (height, width) == (12, 8):
            sizes = {"resolution": torch.tensor([[512.0, 512], [96, 64], [1024, 2048]])}
            sizes["aspect_ratio"] = torch.tensor([[1.0], [1.5], [0.5]])
            cond |= {key: jnp.asarray(value.numpy()) for key, value in sizes.items()}
        with torch.no_grad():
            expected = theirs(
                tm.nchw(x), tensor(context), tensor(TIMES), sizes, encoder_attention_mask=tensor(mask)
            ).sample
        assert tm.relative(called(ours, x, jnp.asarray(TIMES), cond), tm.nhwc(expected)[..., :4]) < TOLERANCE


def test_pixart_without_a_mask(tmp_path):
    theirs = tm.randomise(PixArtTransformer2DModel(**tm.PIXART))
    theirs.save_pretrained(tmp_path)
    x, (context, _) = normal(0, 3, 8, 8, 4), prompts(20)
    with torch.no_grad():
        expected = theirs(tm.nchw(x), tensor(context), tensor(TIMES)).sample
    y = called(load_component(tmp_path), x, jnp.asarray(TIMES), {"context": context})
    assert tm.relative(y, tm.nhwc(expected)[..., :4]) < TOLERANCE


@pytest.mark.parametrize(("cls", "config"), [(DiTTransformer2DModel, tm.DIT), (PixArtTransformer2DModel, tm.PIXART)])
def test_export_is_what_was_read(tmp_path, cls, config):
    theirs = tm.randomise(cls(**config))
    theirs.save_pretrained(tmp_path / "transformer")
    export(tmp_path / "again", {"transformer": load_component(tmp_path / "transformer")})
    again = cls.from_pretrained(tmp_path / "again" / "transformer").state_dict()
    assert theirs.state_dict().keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in theirs.state_dict().items())
