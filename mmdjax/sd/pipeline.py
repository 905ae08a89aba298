"""A whole latent diffusion model: pictures to latents and back, prompts to conditions, the `DiffusionModel` between.

    pipeline, params = mmdjax.sd.load("stable-diffusion-v1-5", dtype=jnp.bfloat16)
    refs = pipeline.encode_images(params, images)
    null = pipeline.encode_prompts(params, "blurry", negative=True)
    cond = pipeline.encode_prompts(params, ["a red cat"] * 4)
    model = pipeline.model(guidance_scale=7.5, null_cond=null)
    samples = guided_sample(params, key, refs, model=model, num_samples=4, cond=cond, times=pipeline.times(50))
    images = pipeline.decode(params, samples.x)

References:
  Rombach et al. 2022 (latent diffusion), Podell et al. 2023 (SDXL), Ho & Salimans 2022 (classifier-free guidance).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.numerics import all_finite
from mmdjax._files.atomic import write_json
from mmdjax.denoisers import Clipped, DiffusionModel, cfg, from_model
from mmdjax.kernels import Product
from mmdjax.schedules import Discrete, DiscreteTime
from mmdjax.sd.models import Component, export, save
from mmdjax.sd.prompts import ENCODERS, Network, encode_ids, prompt_kernel, rows
from mmdjax.sd.scheduler import Scheduler
from mmdjax.sd.tiling import decode_sliced, decode_tiled
from mmdjax.sd.tokenizer import FILES, AnyTokenizer
from mmdjax.tree import is_concrete, pytree, static

AUTOENCODERS = ("vae", "vqvae")
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A latent diffusion model without its parameters; made by `mmdjax.sd.load`. Its methods take the parameters.

    Args:
      modules: the networks by component: "unet", "vae" or "vqvae", "text_encoder", "text_encoder_2".
      configs: their config.json.
      scheduler: the noise, the prediction and the time grid.
      tokenizers: by text encoder.
      index: model_index.json, or {}.
    Raises:
      ValueError: networks are missing or do not fit each other.
    """

    modules: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Scheduler
    tokenizers: Mapping[str, AnyTokenizer]
    index: Mapping[str, Any]

    def __repr__(self) -> str:
        parts = [f"{name}={type(module).__name__}" for name, module in self.modules.items()]
        return f"Pipeline({', '.join(parts)}, prediction={self.scheduler.prediction!r})"

    def __post_init__(self):
        if "unet" not in self.modules or not set(AUTOENCODERS) & set(self.modules):
            raise ValueError(
                f"a pipeline needs a unet and a vae or vqvae; there are: {', '.join(self.modules) or 'none'}. "
                "mmdjax.sd.load_models loads networks on their own"
            )
        unet, latents = self.modules["unet"].config, self.autoencoder.config.latent_channels
        if unet.in_channels != latents or unet.out_channels != latents:
            raise ValueError(
                f"the U-Net maps {unet.in_channels} channels to {unet.out_channels} but the autoencoder's latents have "
                f"{latents}: an inpainting or depth model, or parts of two models"
            )
        if not self.conditional:
            return
        widths = [self.modules[name].config.hidden_size for name in self.encoders]
        if sum(widths) != unet.cross_attention_dim:
            raise ValueError(
                f"the U-Net takes prompts of width {unet.cross_attention_dim} but the text encoders "
                f"({', '.join(self.encoders) or 'none'}) give {sum(widths)}"
            )
        if self.sdxl:
            pooled = self.modules["text_encoder_2"].config.projection_dim if "text_encoder_2" in self.modules else 0
            wanted = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
            if pooled != wanted:
                raise ValueError(
                    f"the U-Net takes a pooled prompt of width {wanted} beside six sizes but text_encoder_2 gives "
                    f"{pooled}; SDXL's refiner is not implemented"
                )

    # What it is

    @property
    def autoencoder(self) -> Any:
        """The `AutoencoderKL` or `VQModel`."""
        return self.modules[self._autoencoder_name]

    @property
    def conditional(self) -> bool:
        """Whether the model takes prompts."""
        return hasattr(self.modules["unet"].config, "cross_attention_dim")

    @property
    def sdxl(self) -> bool:
        """Whether the U-Net also takes pooled prompts and sizes."""
        return self.conditional and self.modules["unet"].config.addition_embed_type is not None

    @property
    def encoders(self) -> tuple[str, ...]:
        """The names of the text encoders."""
        return tuple(name for name in ENCODERS if name in self.modules)

    @property
    def schedule(self) -> Discrete:
        """The noise schedule."""
        return self.scheduler.schedule()

    def times(self, num_steps: int) -> Float[np.ndarray, " times"]:
        """The time grid of the checkpoint's scheduler, for `guided_sample(times=...)`; see `Scheduler.times`."""
        return self.scheduler.times(num_steps)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """The shape of the latent of a picture of height × width pixels; None: the U-Net's training size.

        Raises:
          ValueError: a size that the autoencoder does not divide, or no size here and none in the config.
        """
        down, size = self.autoencoder.config.downscale, self.modules["unet"].config.sample_size
        defaults = size if isinstance(size, tuple) else (size, size)
        sides = []
        for name, side, default in zip(("height", "width"), (height, width), defaults, strict=True):
            if side is None and default is None:
                raise ValueError(f"the U-Net's config has no sample_size; give {name} in pixels, a multiple of {down}")
            side = default * down if side is None else side
            if side < down or side % down:
                raise ValueError(f"{name} is {side}; give a multiple of {down}, such as {max(1, side // down) * down}")
            sides.append(side // down)
        return (*sides, self.autoencoder.config.latent_channels)

    # Pictures

    def encode_images(
        self, params: Any, images: Float[Array | np.ndarray, "n h w c"], *, batch_size: int | None = None
    ) -> Float[Array, "n h2 w2 k"]:
        """Latents of pictures, scaled as the U-Net takes them; float32.

        They are the posterior's mean, or with a `VQModel` the vector before quantisation.

        Args:
          images: in [−1, 1], NHWC.
          batch_size: pictures at a time; None: all.
        Raises:
          ValueError: images of another shape or range, or not finite.
          FloatingPointError: the latents are not finite.
        """
        config = self.autoencoder.config
        shape, down, channels = images.shape, config.downscale, config.in_channels
        if shape[3] != channels or shape[1] % down or shape[2] % down or 0 in shape:
            raise ValueError(
                f"images have shape {shape}; give [n, height, width, {channels}], height and width multiples of {down}"
            )
        if is_concrete(images):
            low, high = float(np.min(images)), float(np.max(images))
            if not (low >= -1.001 and high <= 1.001):
                raise ValueError(f"images lie in [{low:g}, {high:g}]; give them in [-1, 1]: 8-bit ones / 127.5 - 1")
        latents = _encode(self.autoencoder, params[self._autoencoder_name], jnp.asarray(images), batch_size)
        return self._finite("the latents", latents)

    def decode(
        self,
        params: Any,
        latents: Float[Array | np.ndarray, "n h w k"],
        *,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Float[Array, "n h2 w2 c"]:
        """Pictures [n, h, w, c] of the U-Net's latents, clipped to [−1, 1]; float32.

        Args:
          latents: NHWC.
          batch_size: latents at a time; None: all.
          tile: for large pictures in little memory: the side of the tiles to decode, in latents; they overlap by a
            quarter. None: whole pictures.
        Raises:
          ValueError: latents of another shape.
          FloatingPointError: the latents or the pictures are not finite.
        """
        channels = self.autoencoder.config.latent_channels
        if latents.shape[3] != channels or 0 in latents.shape:
            raise ValueError(f"latents have shape {latents.shape}; give [n, h, w, {channels}]")
        self._finite("the latents to decode", latents)
        images = _decode(self.autoencoder, params[self._autoencoder_name], jnp.asarray(latents), batch_size, tile)
        return self._finite("the pictures", images)

    def decoder(self, params: Any) -> "Decoder":
        """A function from latents to pictures, a pytree with its parameters: for kernels on pictures or their features.

            kernel = Mapped(pipeline.decoder(params), RBF(None))
            MMDGuidance(kernel=kernel, scale=0.02, precondition="length", inner_steps=1)

        Each inner step of the guidance then decodes and differentiates the decoder. A shift grows with the square of
        the decoder's gain, so find the scale by trial.
        """
        return Decoder(self.autoencoder, params[self._autoencoder_name])

    # Prompts

    def encode_prompts(
        self, params: Any, prompts: str | Sequence[str], *, negative: bool = False, time_ids: Any = None
    ) -> dict[str, Array]:
        """The condition of prompts: {"context": [n, l, d], "pooled": [n, p]}; see `mmdjax.sd.prompts`.

        Args:
          prompts: a list; or one string, for a condition without the batch axis, as `model(null_cond=...)` takes it.
          negative: whether these are negative prompts. Then the condition of an empty prompt is zeros if the model was
            trained so (SDXL: `force_zeros_for_empty_prompt`).
          time_ids: SDXL's sizes, [6]: original height and width, the crop's top and left, target height and width.
            None: the height and width of the samples, not cropped.
        Raises:
          ValueError: the model takes no prompts, `prompts` is empty, or a vocabulary is missing.
        """
        if not self.conditional:
            raise ValueError("this model is unconditional; it takes no prompts")
        if isinstance(prompts, str):
            return rows(self.encode_prompts(params, [prompts], negative=negative, time_ids=time_ids), 0)
        if not prompts:
            raise ValueError("prompts is empty; give at least one")
        lacking = [name for name in self.encoders if name not in self.tokenizers]
        if lacking:
            raise ValueError(
                f"no vocabulary for {', '.join(lacking)}; give load(..., tokenizer=folder) a folder with {FILES}"
            )
        distinct = list(dict.fromkeys(prompts))
        ids = {name: self.tokenizers[name](distinct) for name in self.encoders}
        encoders = tuple((name, self.modules[name]) for name in self.encoders)
        cond = encode_ids({name: params[name] for name in self.encoders}, ids, encoders=encoders)
        if negative and self.sdxl and self.index.get("force_zeros_for_empty_prompt", True) and "" in distinct:
            empty = distinct.index("")
            cond = jax.tree.map(lambda leaf: leaf.at[empty].set(0), cond)
        cond = rows(cond, [distinct.index(prompt) for prompt in prompts])
        if time_ids is None:
            return cond
        if not self.sdxl or np.shape(time_ids) != (6,):
            raise ValueError(f"time_ids has shape {np.shape(time_ids)}; give six numbers for SDXL, None for others")
        return cond | {"time_ids": jnp.tile(jnp.asarray(time_ids, jnp.float32), (len(prompts), 1))}

    def kernel(self, x: Any = None, *, level: str = "pooled", cond: Any = None) -> Product:
        """The kernel for references with prompts; see `mmdjax.sd.prompts.prompt_kernel`.

        Raises:
          ValueError: the model takes no prompts.
        """
        if not self.conditional:
            raise ValueError("this model takes no prompts; use a kernel on latents, such as IMQ(None)")
        return prompt_kernel(x, level=level, cond=cond)

    # The diffusion model

    @property
    def denoiser(self) -> Any:
        """E[x_0 | x_t] without classifier-free guidance; it takes the parameters of the whole pipeline."""
        network = Network(self.modules["unet"], self.autoencoder.config.downscale)
        time = DiscreteTime(self.scheduler.num_train_steps)
        denoiser = from_model(network, self.scheduler.prediction, time)  # pyright: ignore[reportArgumentType]
        clip = self.scheduler.clip
        return denoiser if clip is None else Clipped(denoiser, -clip, clip)

    def model(
        self,
        *,
        guidance_scale: Any = 1.0,
        null_cond: Any = None,
        height: int | None = None,
        width: int | None = None,
    ) -> DiffusionModel:
        """The model for `guided_sample`: samples are latents [h, w, k], parameters those of the pipeline.

        Args:
          guidance_scale: of classifier-free guidance; 1 is none. Another value compiles nothing.
          null_cond: the negative prompt's condition, `encode_prompts(params, "", negative=True)`. With it, each network
            call takes both conditions, even at scale 1.
          height: of the pictures, in pixels; None: the training size.
          width: likewise.
        Raises:
          ValueError: a scale other than 1 without null_cond; null_cond with a batch axis, or for a model without
            prompts; a size that the autoencoder does not divide.
        """
        shape = self.latent_shape(height, width)
        if null_cond is None:
            if not (is_concrete(guidance_scale) and np.ndim(guidance_scale) == 0 and float(guidance_scale) == 1.0):
                how = 'null_cond=pipeline.encode_prompts(params, "", negative=True)'
                remedy = f"give {how}" if self.conditional else "an unconditional model has none; leave it 1"
                raise ValueError(f"guidance_scale is {guidance_scale} without a negative prompt; {remedy}")
            return DiffusionModel(self.denoiser, self.schedule, shape)
        if not self.conditional:
            raise ValueError("null_cond is for models with prompts; this one is unconditional")
        if not isinstance(null_cond, Mapping) or np.ndim(null_cond.get("context", 0)) != 2:
            raise ValueError(
                "null_cond must be one condition without batch axis: "
                'pipeline.encode_prompts(params, "", negative=True), with a string and not a list'
            )
        return DiffusionModel(cfg(self.denoiser, guidance_scale, null_cond), self.schedule, shape)

    # Files

    def save(self, path: str | Path, params: Any) -> None:
        """Write the pipeline to a folder that `load(path)` reads without conversion."""
        save(path, self._components(params))
        self._save_rest(Path(path))

    def export(self, path: str | Path, params: Any) -> None:
        """Write the pipeline to a folder in the layout of diffusers, every tensor bit for bit."""
        export(path, self._components(params))
        self._save_rest(Path(path))

    def _components(self, params: Any) -> dict[str, Component]:
        return {name: Component(module, params[name], self.configs[name]) for name, module in self.modules.items()}

    def _save_rest(self, path: Path) -> None:
        for name, tokenizer in self.tokenizers.items():
            tokenizer.save(path / TOKENIZERS[name])
        write_json(path / "scheduler" / "scheduler_config.json", self.scheduler.raw)
        write_json(path / "model_index.json", self.index or self._index())

    def _index(self) -> dict[str, Any]:
        # what diffusers' loader wants to know: the class of the whole, and library and class of each part
        kind = "StableDiffusionXLPipeline" if self.sdxl else "StableDiffusionPipeline"
        index: dict[str, Any] = {"_class_name": kind if self.conditional else "LDMPipeline"}
        for name, raw in self.configs.items():
            library = "transformers" if name in ENCODERS else "diffusers"
            index[name] = [library, raw.get("_class_name") or raw["architectures"][0]]
        index |= {TOKENIZERS[name]: ["transformers", "CLIPTokenizer"] for name in self.tokenizers}
        index["scheduler"] = ["diffusers", self.scheduler.raw["_class_name"]]
        if self.conditional and not self.sdxl:
            index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        return index

    @property
    def _autoencoder_name(self) -> str:
        return next(name for name in AUTOENCODERS if name in self.modules)

    def _finite(self, what: str, x: Any) -> Any:
        if is_concrete(x) and not all_finite(x):
            raise FloatingPointError(
                f"{what} are not finite (dtype {jnp.dtype(self.autoencoder.dtype).name}); load the model with "
                "dtype=jnp.float32 or jnp.bfloat16, which have a larger range"
            )
        return x


@pytree
class Decoder:
    """Latents [n, h, w, k] -> pictures [n, h2, w2, c], not clipped; made by `Pipeline.decoder`."""

    module: Any = static()
    params: Any

    def __call__(self, latents: Float[Array, "n h w k"]) -> Float[Array, "n h2 w2 c"]:
        return self.module.apply({"params": self.params}, latents, method="from_latents").astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(module: Any, params: Any, images: Array, batch_size: int | None) -> Array:
    encode = functools.partial(module.apply, {"params": params}, method="to_latents")
    latents = encode(images) if batch_size is None else decode_sliced(encode, images, size=batch_size)
    return latents.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _decode(module: Any, params: Any, latents: Array, batch_size: int | None, tile: int | None) -> Array:
    decode = functools.partial(module.apply, {"params": params}, method="from_latents")
    if tile is not None:
        decode = functools.partial(decode_tiled, decode, tile=tile, overlap=tile // 4)
    images = decode(latents) if batch_size is None else decode_sliced(decode, latents, size=batch_size)
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)
