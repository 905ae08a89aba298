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

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.numerics import all_finite
from mmdjax._files.atomic import write_json
from mmdjax.denoisers import Clipped, DiffusionModel, cfg, from_model
from mmdjax.guidance import MMDGuidance
from mmdjax.kernels import Product
from mmdjax.samplers import DDIM
from mmdjax.schedules import Schedule
from mmdjax.sd.decoding import Decoder, decode_whole, encode_whole
from mmdjax.sd.families import ENCODERS, TOKENIZERS, Embedded, Family, Network, encode, family_of
from mmdjax.sd.flow import FlowScheduler
from mmdjax.sd.models import Component, export, save
from mmdjax.sd.scheduler import Scheduler
from mmdjax.sd.text.fast_tokenizer import FastTokenizer
from mmdjax.sd.text.prompts import rows
from mmdjax.sd.text.tokenizer import FILES, Tokenizer
from mmdjax.tree import is_concrete

AUTOENCODERS = ("vae", "vqvae")


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A latent diffusion model without its parameters; made by `mmdjax.sd.load`. Its methods take the parameters.

    Args:
      modules: the networks by component: "unet" or "transformer", "vae" or "vqvae", "text_encoder", …
      configs: their config.json.
      scheduler: the noise, the prediction and the time grid.
      tokenizers: by text encoder.
      index: model_index.json, or {}.
    Raises:
      ValueError: networks are missing or do not fit each other.
    """

    modules: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Scheduler | FlowScheduler
    tokenizers: Mapping[str, Tokenizer | FastTokenizer]
    index: Mapping[str, Any]

    def __repr__(self) -> str:
        parts = [f"{name}={type(module).__name__}" for name, module in self.modules.items()]
        return f"Pipeline({', '.join(parts)}, prediction={self.scheduler.prediction!r})"

    def __post_init__(self):
        family = self.family
        if not set(AUTOENCODERS) & set(self.modules):
            raise ValueError(
                f"a pipeline needs a {family.component} and a vae or vqvae; there are: {', '.join(self.modules)}. "
                "mmdjax.sd.load_models loads networks on their own"
            )
        family.check(self.autoencoder.config.latent_channels)

    # What it is

    @property
    def autoencoder(self) -> Any:
        """The `AutoencoderKL` or `VQModel`."""
        return self.modules[self._autoencoder_name]

    @functools.cached_property
    def family(self) -> Family:
        """How the networks work together; see `mmdjax.sd.families`."""
        return family_of(self.modules)

    @property
    def conditional(self) -> bool:
        """Whether the model takes prompts or labels."""
        return self.family.conditional

    @property
    def encoders(self) -> tuple[str, ...]:
        """The names of the text encoders."""
        return self.family.texts

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self.scheduler.schedule()

    def times(
        self, num_steps: int, *, height: int | None = None, width: int | None = None
    ) -> Float[np.ndarray, " times"]:
        """The time grid of the checkpoint's scheduler, for `guided_sample(times=...)`; see `Scheduler.times`.

        Args:
          height: of the pictures, in pixels, by which some schedulers shift the grid; None: the training size.
          width: likewise.
        """
        return self.family.times(self.scheduler, num_steps, self.latent_shape(height, width))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """The shape of the latent of a picture of height × width pixels; None: the training size.

        Raises:
          ValueError: a size that autoencoder and patches do not divide, or no size here and none in the config.
        """
        down, size = self.autoencoder.config.downscale, self.family.sample_size
        defaults, patch = size if isinstance(size, tuple) else (size, size), down * self.family.patch
        sides = []
        for name, side, default in zip(("height", "width"), (height, width), defaults, strict=True):
            if side is None and default is None:
                raise ValueError(
                    f"the {self.family.said}'s config has no sample_size; give {name} in pixels, a multiple of {patch}"
                )
            side = default * down if side is None else side
            if side < patch or side % patch:
                near = max(1, side // patch) * patch
                raise ValueError(f"{name} is {side}; give a multiple of {patch}, such as {near}")
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
        latents = encode_whole(self.autoencoder, params[self._autoencoder_name], jnp.asarray(images), batch_size)
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
        images = decode_whole(self.autoencoder, params[self._autoencoder_name], jnp.asarray(latents), batch_size, tile)
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
        """The condition of prompts, a dictionary of arrays with a row for each; see `mmdjax.sd.families`.

        Args:
          prompts: a list; or one string, for a condition without the batch axis, as `model(null_cond=...)` takes it. Of
            a model with labels: their names, or numbers as text; "" is no label.
          negative: whether these are negative prompts. Then the condition of an empty prompt is zeros if the model was
            trained so (SDXL: `force_zeros_for_empty_prompt`).
          time_ids: SDXL's sizes, [6]: original height and width, the crop's top and left, target height and width.
            None: the height and width of the samples, not cropped.
        Raises:
          ValueError: the model takes no prompts, `prompts` is empty, a vocabulary is missing, or no such label.
        """
        if not self.conditional:
            raise ValueError("this model is unconditional; it takes no prompts")
        if isinstance(prompts, str):
            return rows(self.encode_prompts(params, [prompts], negative=negative, time_ids=time_ids), 0)
        if not len(prompts):
            raise ValueError("prompts is empty; give at least one")
        lacking = [name for name in self.encoders if name not in self.tokenizers]
        if lacking:
            raise ValueError(
                f"no vocabulary for {', '.join(lacking)}; give load(..., tokenizer=folder) a folder with {FILES}"
            )
        distinct = list(dict.fromkeys(prompts))
        tokens = self.family.tokens(distinct, self.tokenizers, self.index)
        for name in self.encoders:
            if isinstance(tokenizer := self.tokenizers[name], Tokenizer):
                tokenizer.check(tokens[name][0], self.modules[name].config.vocab_size, name)
        cond = encode({name: params[name] for name in self.encoders}, tokens, family=self.family)
        if negative:
            cond = self.family.negative(cond, distinct, self.index)
        cond = rows(cond, [distinct.index(prompt) for prompt in prompts])
        if time_ids is None:
            return cond
        if not getattr(self.family, "sizes", False) or np.shape(time_ids) != (6,):
            raise ValueError(f"time_ids has shape {np.shape(time_ids)}; give six numbers for SDXL, None for others")
        return cond | {"time_ids": jnp.tile(jnp.asarray(time_ids, jnp.float32), (len(prompts), 1))}

    def kernel(self, x: Any = None, *, level: str = "pooled", cond: Any = None) -> Product:
        """The kernel for references with prompts; see `mmdjax.sd.text.prompts.prompt_kernel`. Of labels: equal or not.

        Raises:
          ValueError: the model takes no prompts.
        """
        if not self.conditional:
            raise ValueError("this model takes no prompts; use a kernel on latents, such as IMQ(None)")
        return self.family.kernel(x, level=level, cond=cond)

    # The diffusion model

    @property
    def denoiser(self) -> Any:
        """E[x_0 | x_t] without classifier-free guidance; it takes the parameters of the whole pipeline."""
        network = Network(self.family.network, self.autoencoder.config.downscale)
        prediction: Any = self.scheduler.prediction
        denoiser = from_model(network, prediction, self.family.time(self.scheduler))
        clip = self.scheduler.clip
        return denoiser if clip is None else Clipped(denoiser, -clip, clip)

    def model(
        self,
        *,
        guidance_scale: Any = 1.0,
        null_cond: Any = None,
        height: int | None = None,
        width: int | None = None,
        embedded_guidance: Any = None,
    ) -> DiffusionModel:
        """The model for `guided_sample`: samples are latents [h, w, k], parameters those of the pipeline.

        Args:
          guidance_scale: of classifier-free guidance; 1 is none. Another value compiles nothing.
          null_cond: the negative prompt's condition, `encode_prompts(params, "", negative=True)`. With it, each network
            call takes both conditions, even at scale 1.
          height: of the pictures, in pixels; None: the training size.
          width: likewise.
          embedded_guidance: the strength of a distilled model's guidance, an input of its network (FLUX.1 dev). None:
            the usual one of such a model, 3.5.
        Raises:
          ValueError: a scale other than 1 without null_cond; null_cond with a batch axis, or for a model without
            prompts; embedded_guidance for a network without such an input; a size that the autoencoder does not divide.
        """
        shape, denoiser = self.latent_shape(height, width), self.denoiser
        usual = self.family.embedded_guidance
        if usual is not None:
            denoiser = Embedded(denoiser, usual if embedded_guidance is None else embedded_guidance)
        elif embedded_guidance is not None:
            raise ValueError(f"embedded_guidance is {embedded_guidance}, but this model's network has no such input")
        if null_cond is None:
            if not (is_concrete(guidance_scale) and np.ndim(guidance_scale) == 0 and float(guidance_scale) == 1.0):
                how = 'null_cond=pipeline.encode_prompts(params, "", negative=True)'
                remedy = f"give {how}" if self.conditional else "an unconditional model has none; leave it 1"
                raise ValueError(f"guidance_scale is {guidance_scale} without a negative prompt; {remedy}")
            return DiffusionModel(denoiser, self.schedule, shape)
        if not self.conditional:
            raise ValueError("null_cond is for models with prompts; this one is unconditional")
        if not self.family.is_one(null_cond):
            raise ValueError(
                "null_cond must be one condition without batch axis: "
                'pipeline.encode_prompts(params, "", negative=True), with a string and not a list'
            )
        return DiffusionModel(cfg(denoiser, guidance_scale, null_cond), self.schedule, shape)

    def sample(
        self,
        params: Any,
        key: Array,
        prompts: str | Sequence[str] = (),
        *,
        refs: Any = None,
        avoid: Any = None,
        num_samples: int | None = None,
        negative: str = "",
        guidance_scale: float | None = None,
        embedded_guidance: float | None = None,
        num_steps: int = 50,
        sampler: Any = DDIM(eta=1.0),
        guidance: MMDGuidance = MMDGuidance(),
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 4,
        memory: int = 1000,
        progress: bool = True,
    ) -> Float[np.ndarray, "n h w c"]:
        """From prompts to pictures in one call, for notebooks: [n, h, w, c] in [−1, 1]. It cannot be traced.

            pictures = pipeline.sample(params, jax.random.key(0), "a red cat", refs="pictures/", num_samples=8)

        For samples in a folder, that survive a crash: `mmdjax.sd.run.sample_to_folder`. Within `jit`, or with more
        settings: `guided_sample(params, key, refs, model=pipeline.model(...), ...)`.

        Args:
          prompts: sample i takes prompt i modulo their number. (): the references' prompts in turn, else "".
          refs: what the samples shall be like: a `ReferencePack`, its file, a folder of pictures, with captions or
            without, or pictures [m, h, w, c] in [−1, 1]. None: plain sampling.
          avoid: what the samples shall keep away from, likewise.
          num_samples: n; None: one for each prompt.
          negative: the negative prompt.
          guidance_scale: of classifier-free guidance; 1 is none. None: the usual one of this model's family.
          embedded_guidance, height, width: as in `model`.
          num_steps, sampler, guidance: as in `guided_sample`.
          batch_size: the most samples made at once.
          memory: how many samples of earlier batches count as particles in the guidance of a batch; 0: none.
          progress: show bars.
        Raises:
          ValueError: see `model`, `encode_prompts` and `guided_sample`; references of another size or another model.
          FileNotFoundError, CheckpointError, PictureError: references that cannot be read.
          FloatingPointError: samples or pictures are not finite.
        """
        from mmdjax.sd.sample import sample  # it stands on this module

        return sample(
            self,
            params,
            key,
            prompts,
            refs=refs,
            avoid=avoid,
            num_samples=num_samples,
            negative=negative,
            guidance_scale=guidance_scale,
            embedded_guidance=embedded_guidance,
            num_steps=num_steps,
            sampler=sampler,
            guidance=guidance,
            height=height,
            width=width,
            batch_size=batch_size,
            memory=memory,
            progress=progress,
        )

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
        index: dict[str, Any] = {"_class_name": self.family.pipeline_class}
        for name, raw in self.configs.items():
            library = "transformers" if name in ENCODERS else "diffusers"
            index[name] = [library, raw.get("_class_name") or raw["architectures"][0]]
        index |= {TOKENIZERS[name]: ["transformers", t.class_name] for name, t in self.tokenizers.items()}
        index["scheduler"] = ["diffusers", self.scheduler.raw["_class_name"]]
        return index | {name: [None, None] for name in self.family.left_out}

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
