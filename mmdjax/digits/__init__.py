"""1,797 handwritten digits and a trained class-conditional denoiser of them, all in the package.

The images are scikit-learn's (8 × 8, 17 grey levels), pixel p in 0 … 16 scaled to p/8 − 1. The denoiser was trained by
`examples/train_digits.py` on the 1,200 images of the training split only.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (CC BY).
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from mmdjax.checkpoint import load_weights, save_weights
from mmdjax.denoisers import DiffusionModel, from_model
from mmdjax.schedules import Cosine

__all__ = [
    "DEFAULT_WEIGHTS", "NULL_CLASS", "NUM_TRAIN", "digits_model", "load_digits", "load_weights", "save_weights",
    "slant", "splits", "thicken",
]  # fmt: skip

DATA = Path(__file__).parent
DEFAULT_WEIGHTS = DATA / "digits.safetensors"
NULL_CLASS = 10
NUM_TRAIN = 1200

Split = tuple[Float[np.ndarray, "_ 8 8 1"], Int[np.ndarray, " _"]]


def digits_model() -> DiffusionModel:
    """The digits' model without parameters: v-prediction of `DigitsNetwork` on the cosine schedule, samples [8, 8, 1].

    Its cond is an integer label [n], 0 to 9; None, or label 10, is the null class.
    """
    from mmdjax.digits.network import DigitsNetwork

    return DiffusionModel(from_model(DigitsNetwork().apply, "v"), Cosine(), (8, 8, 1))


def load_digits() -> tuple[DiffusionModel, Any]:
    """A trained class-conditional denoiser of 8 × 8 digits and its parameters, from the package's own files.

    cond is an integer label [n], 0 to 9; None, or label 10, is the null class. The models of two calls are equal, so
    that nothing compiles anew.

    Returns:
      (model, params): model.shape is (8, 8, 1), images in [−1, 1]; params are float32 NumPy arrays.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from mmdjax import guided_sample
      >>> model, params = load_digits()
      >>> threes = guided_sample(
      ...     params, jax.random.key(0), None, model=model, num_samples=2, cond=jnp.array([3, 3]), num_steps=5)
      >>> threes.x.shape
      (2, 8, 8, 1)
    """
    return digits_model(), load_weights(DEFAULT_WEIGHTS)


def splits() -> tuple[Split, Split]:
    """(train_images, train_labels), (held_out_images, held_out_labels): the denoiser was trained on the first only.

    Training: the first 1,200 of `numpy.random.RandomState(0).permutation(1797)`; held out: the other 597.

    Returns:
      Images [n, 8, 8, 1] float32 in [−1, 1], labels [n] int32.

    Example:
      >>> (train, _), (held_out, labels) = splits()
      >>> train.shape, held_out.shape, labels[:3].tolist()
      ((1200, 8, 8, 1), (597, 8, 8, 1), [6, 1, 6])
    """
    images, labels = _dataset()
    order = np.random.RandomState(0).permutation(len(labels))
    train, held_out = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def thicken(images: Float[Array | np.ndarray, "n 8 8 1"], amount: float = 0.4) -> Float[np.ndarray, "n 8 8 1"]:
    """Digits with thicker strokes: each image blended with its grey dilation by a cross.

    x + amount (max_cross x − x), the maximum being over a pixel and its four neighbours.

    Args:
      images: [n, 8, 8, 1] in [−1, 1].
      amount: 0 leaves the images, 1 is the dilation; above .5 the holes of 0, 6, 8 and 9 close.

    Example:
      >>> dot = np.full((1, 8, 8, 1), -1.0, np.float32)
      >>> dot[0, 4, 4] = 1.0
      >>> int((thicken(dot, 1.0) > 0).sum())
      5
    """
    images = np.asarray(images)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    cross = [padded[:, 1 + i : 9 + i, 1 + j : 9 + j] for i, j in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))]
    return (images + np.float32(amount) * (np.max(cross, axis=0) - images)).astype(images.dtype)


def slant(images: Float[Array | np.ndarray, "n 8 8 1"], amount: float = 0.4) -> Float[np.ndarray, "n 8 8 1"]:
    """Digits leaning to the right: row i moves by amount (3.5 − i) pixels, with linear interpolation and −1 outside.

    Args:
      images: [n, 8, 8, 1] in [−1, 1].
      amount: pixels a row; negative leans to the left.

    Example:
      >>> bar = np.full((1, 8, 8, 1), -1.0, np.float32)
      >>> bar[0, :, 4] = 1.0
      >>> slant(bar)[0, ..., 0].argmax(axis=1).tolist()
      [5, 5, 5, 4, 4, 3, 3, 3]
    """
    images = np.asarray(images)
    out = np.empty_like(images)
    columns = np.arange(8)
    for i in range(8):
        source = columns - amount * (3.5 - i)
        left = np.floor(source).astype(int)
        fraction = (source - left)[None, :, None].astype(images.dtype)
        out[:, i] = (1 - fraction) * _column(images[:, i], left) + fraction * _column(images[:, i], left + 1)
    return out


def _column(row, index):
    inside = (index >= 0) & (index < 8)
    return np.where(inside[None, :, None], row[:, np.clip(index, 0, 7)], -1)


@functools.cache
def _dataset():
    with np.load(DATA / "digits.npz") as data:
        images = data["images"].astype(np.float32)[..., None] / 8 - 1
        labels = data["labels"].astype(np.int32)
    return images, labels
