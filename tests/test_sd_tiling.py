"""Decoding in pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd_tiny

from mmdjax.sd.tiling import decode_sliced, decode_tiled


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def pointwise(z):
    """A decoder that looks at one latent only: three colours, eight times as large."""
    return jnp.repeat(jnp.repeat(jnp.tanh(z[..., :3]), 8, 1), 8, 2)


@pytest.mark.parametrize("size", [5, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 8))])
def test_slices_are_the_whole(size):
    module, params, _ = sd_tiny.component(sd_tiny.VAE)
    decode = functools.partial(module.apply, {"params": params}, method="from_latents")
    z = normal(5, 4, 6, 4)
    whole, sliced = jax.jit(decode)(z), jax.jit(lambda z: decode_sliced(decode, z, size=size))(z)
    np.testing.assert_allclose(sliced, whole, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_slices_of_a_pointwise_decoder_are_the_whole(size):
    z = normal(5, 4, 6, 4)
    np.testing.assert_allclose(decode_sliced(pointwise, z, size=size), pointwise(z), atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (21, 13), (7, 40), (33, 9)])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 2), (8, 7), (12, 5)])
def test_tiles_of_a_pointwise_decoder_are_the_whole(shape, tile, overlap):
    """Weights sum to one everywhere, every latent is covered, nothing is shifted."""
    z = normal(2, *shape, 4)
    tiled = jax.jit(lambda z: decode_tiled(pointwise, z, tile=tile, overlap=overlap))(z)
    np.testing.assert_allclose(tiled, pointwise(z), atol=1e-6)


def test_latents_within_one_tile_are_decoded_as_a_whole():
    module, params, _ = sd_tiny.component(sd_tiny.VAE)
    decode = functools.partial(module.apply, {"params": params}, method="from_latents")
    z = normal(1, 6, 8, 4)
    tiled = jax.jit(lambda z: decode_tiled(decode, z, tile=8, overlap=2))(z)
    np.testing.assert_allclose(tiled, jax.jit(decode)(z), atol=1e-5)


def test_tiles_take_less_memory():
    module, params, _ = sd_tiny.component(sd_tiny.VAE)
    decode = functools.partial(module.apply, {"params": params}, method="from_latents")
    z = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)

    def peak(f):
        return jax.jit(f).lower(z).compile().memory_analysis().temp_size_in_bytes

    assert peak(lambda z: decode_tiled(decode, z, tile=16, overlap=4)) < peak(decode) / 4


@pytest.mark.parametrize("overlap", [-1, 8, 9])
def test_overlap_must_leave_a_step(overlap):
    with pytest.raises(ValueError, match=f"overlap is {overlap} for tiles of 8"):
        decode_tiled(pointwise, normal(1, 16, 16, 4), tile=8, overlap=overlap)
