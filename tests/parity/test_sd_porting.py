"""The places where ports went wrong that need a real block to show it: same parameters, an input that tells them
apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

torch = pytest.importorskip("torch", reason="parity needs the extra mmdjax[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity needs the extra mmdjax[parity]")
pytest.importorskip("transformers", reason="parity needs the extra mmdjax[parity]")

import torch_models as tm  # noqa: E402
from diffusers.models.attention import BasicTransformerBlock  # noqa: E402
from diffusers.models.embeddings import get_timestep_embedding  # noqa: E402
from diffusers.models.resnet import Downsample2D, ResnetBlock2D  # noqa: E402
from diffusers.models.transformers.transformer_2d import Transformer2DModel  # noqa: E402

from mmdjax.sd.files import convert  # noqa: E402
from mmdjax.sd.networks import layers  # noqa: E402
from mmdjax.sd.networks.unet import SpatialTransformer, TransformerBlock, UNet2DConditionConfig  # noqa: E402

TOLERANCE = 1e-5  # one block in float32


@pytest.fixture(autouse=True)
def precision():
    with jax.default_matmul_precision("highest"):
        yield


def ours(module, theirs, *args):
    """Our block's output with the parameters of theirs."""
    tree = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("Conv2d_0")}  # an alias
    keys = convert.keys(tree)
    assert keys.keys() == state.keys()
    params = {path: jnp.array(convert.to_flax(path[-1], state[key].numpy())) for key, path in keys.items()}
    return jax.jit(lambda p: module.apply({"params": p}, *args))(unflatten_dict(params))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tensor(x):
    return torch.from_numpy(np.array(x))


@pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning")
@pytest.mark.parametrize("linear", [False, True])
def test_1_eps_of_the_transformers_group_norm(linear):
    """An input of variance 1e-6: with 1e-5 for 1e-6 the norm would be a third of itself."""
    theirs = tm.randomise(
        Transformer2DModel(4, 8, in_channels=32, num_layers=1, cross_attention_dim=24, use_linear_projection=linear)
    )
    config = UNet2DConditionConfig(cross_attention_dim=24, use_linear_projection=linear)
    x, context = 1e-3 * normal(2, 5, 6, 32), normal(2, 7, 24, seed=1)
    with torch.no_grad():
        expected = theirs(tm.nchw(x), tensor(context)).sample
    assert tm.relative(ours(SpatialTransformer(config, 4, 1), theirs, x, context), tm.nhwc(expected)) < TOLERANCE


def test_2_geglu_is_the_erf_one():
    theirs = tm.randomise(BasicTransformerBlock(32, 4, 8, cross_attention_dim=24))
    x, context = 2 * normal(2, 6, 32), normal(2, 7, 24, seed=1)
    with torch.no_grad():
        expected = theirs(tensor(x), encoder_hidden_states=tensor(context))
    assert tm.relative(ours(TransformerBlock(4, False), theirs, x, context), expected.numpy()) < TOLERANCE


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_3_eps_of_the_residual_block(eps):
    theirs = tm.randomise(ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=16, eps=eps))
    x, emb = 1e-3 * normal(2, 5, 6, 32), normal(2, 16, seed=1)
    with torch.no_grad():
        expected = theirs(tm.nchw(x), tensor(emb))
    assert tm.relative(ours(layers.ResnetBlock(64, 32, eps), theirs, x, emb), tm.nhwc(expected)) < TOLERANCE


@pytest.mark.parametrize("padding", [1, 0])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_7_downsampling_at_the_edges(padding, size):
    """The U-Net pads both sides, the autoencoder after the last row and column only: (0, 1)."""

    class Down(layers.Block):
        @layers.nn.compact
        def __call__(self, x):
            return self.conv("conv", 32, stride=2, padding=[(padding, 1)] * 2)(x)

    theirs = tm.randomise(Downsample2D(32, use_conv=True, padding=padding))
    x = jnp.zeros((1, *size, 32)).at[:, [0, -1]].set(normal(1, 2, size[1], 32)).at[:, :, [0, -1]].set(1.0)
    with torch.no_grad():
        expected = theirs(tm.nchw(x))
    assert tm.relative(ours(Down(), theirs, x), tm.nhwc(expected)) < TOLERANCE


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dim", [32, 33])
def test_8_timestep_embedding(flip, shift, dim):
    t = np.array([0, 1, 999])
    expected = get_timestep_embedding(torch.from_numpy(t), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    y = layers.timestep_embedding(jnp.asarray(t), dim, flip=flip, shift=shift)
    np.testing.assert_allclose(y, expected.numpy(), atol=2e-4)  # 999 radians known to 2⁻²⁴, and so are the frequencies
