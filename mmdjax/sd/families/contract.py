"""The contract of a family; its docstring is all that a new family needs."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax.schedules import DiscreteTime
from mmdjax.sd.scheduler import in_place
from mmdjax.sd.text.prompts import prompt_kernel
from mmdjax.tree import pytree

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = {name: name.replace("text_encoder", "tokenizer") for name in ENCODERS}  # its folder


@dataclasses.dataclass(frozen=True)
class Family:
    """How the networks of one family of models work together.

    A family is compared by its networks' values, so that equal ones compile once. A condition is a dictionary of arrays
    with a row for each sample; "pooled" is one vector for each prompt, which `mmdjax.sd.prompt_kernel` compares.

    Args:
      modules: (component, network) for each.
    """

    modules: tuple[tuple[str, Any], ...]

    component: ClassVar[str] = "transformer"  # what is sampled with
    networks: ClassVar[tuple[type, ...]] = ()  # its classes
    encoders: ClassVar[tuple[str, ...]] = ()  # the text encoders that it can have
    conditional: ClassVar[bool] = True  # whether it takes conditions
    usual_scale: ClassVar[float] = 1.0  # of classifier-free guidance
    embedded_guidance: ClassVar[float | None] = None  # usual strength that is an input of the network
    usual_scheduler: ClassVar[Mapping[str, Any]] = {}  # scheduler_config.json of files that have none
    takes: ClassVar[str] = "cond=pipeline.encode_prompts(params, [...])"  # its condition, in errors

    @property
    def network(self) -> Any:
        """The network that is sampled with."""
        return dict(self.modules)[self.component]

    @property
    def texts(self) -> tuple[str, ...]:
        """The text encoders that this model has, in the order in which the family takes them."""
        return tuple(name for name in self.encoders if name in dict(self.modules))

    @property
    def said(self) -> str:
        """The network in words."""
        return "U-Net" if self.component == "unet" else self.component

    @property
    def sample_size(self) -> Any:
        """The side of the latents that the network was trained on, or (height, width); None if nothing says it."""
        return self.network.config.sample_size

    @property
    def patch(self) -> int:
        """The side of the network's patches of latents."""
        return getattr(self.network.config, "patch_size", 1)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Parts of the class in diffusers that are not written."""
        return ()

    @property
    def pipeline_class(self) -> str:
        """The class in diffusers, for model_index.json."""
        raise NotImplementedError

    def check(self, latent_channels: int) -> None:
        """Raise ValueError if the networks do not fit each other, or the latents of the autoencoder."""
        config = self.network.config
        if config.in_channels != latent_channels:
            raise ValueError(
                f"the {self.component} takes {config.in_channels} channels but the autoencoder's latents have "
                f"{latent_channels}: parts of two models"
            )

    def scheduler_config(self, given: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The settings of the scheduler of a file that has none, under those that the caller gives.

        Raises:
          ValueError: they leave open how the file `name` was trained.
        """
        return in_place(self.usual_scheduler, given)

    def guidance_scale(self, index: Mapping[str, Any]) -> float:
        """The usual scale of classifier-free guidance; 1 is none."""
        return self.usual_scale

    def time(self, scheduler: Any) -> Any:
        """From level.t to the network's t, as `from_model` takes it."""
        return DiscreteTime(scheduler.num_train_steps)

    def times(self, scheduler: Any, num_steps: int, latent: tuple[int, ...]) -> Float[np.ndarray, " times"]:
        """The time grid for latents of this shape."""
        return scheduler.times(num_steps)

    def tokens(self, prompts: Sequence[str], tokenizers: Mapping[str, Any], index: Mapping[str, Any]) -> dict[str, Any]:
        """What `encode` takes, from prompts."""
        return {name: (tokenizers[name](prompts),) for name in self.texts}

    def encode(self, params: Mapping[str, Any], tokens: Mapping[str, Any]) -> dict[str, Float[Array, "n ..."]]:
        """The condition of tokenized prompts; traced, so pure.

        Args:
          params: of the whole pipeline.
          tokens: of `self.tokens`; by default, for each of `texts`, the arguments of its encoder.
        """
        raise NotImplementedError

    def text(self, name: str, params: Mapping[str, Any], tokens: tuple) -> Any:
        """The output of a text encoder."""
        return dict(self.modules)[name].apply({"params": params[name]}, *tokens)

    def negative(self, cond: dict, prompts: Sequence[str], index: Mapping[str, Any]) -> dict:
        """The condition of prompts as negative ones."""
        return cond

    def call(self, params: Mapping[str, Any], x: Float[Array, "n h w c"], t: Float[Array, " n"], cond: Any, down: int):
        """The network's prediction, [n, h, w, c].

        Of `modules` only the network may be used.

        Args:
          params: of the whole pipeline.
          down: pixels for each latent.
        Raises:
          ValueError: a condition of another kind.
        """
        self.check_cond(cond)
        return self.network.apply({"params": params[self.component]}, x, t, cond)

    def check_cond(self, cond: Any) -> None:
        """Raise ValueError for a condition of another kind."""
        wanted = set(self.cond_shapes())
        if not isinstance(cond, Mapping) or not wanted <= set(cond):
            raise ValueError(f"cond is {type(cond).__name__}; this model takes {self.takes}")

    def cond_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The leaves that a condition must have, without the batch axis; lengths that vary are typical ones."""
        raise NotImplementedError

    def is_one(self, cond: Any) -> bool:
        """Whether a condition is that of one sample, without the batch axis."""
        shapes = self.cond_shapes()
        return isinstance(cond, Mapping) and all(np.ndim(cond.get(k, 0)) == len(v.shape) for k, v in shapes.items())

    def kernel(self, x: Any, *, level: str, cond: Any) -> Any:
        """The kernel for references with conditions; see `mmdjax.sd.prompt_kernel`."""
        return prompt_kernel(x, level=level, cond=cond)


def padded(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """The ids [n, length] and mask of prompts, by a `FastTokenizer`."""
    return dataclasses.replace(tokenizer, length=length).encode(prompts)


@pytree
class Embedded:
    """A denoiser whose network takes the strength of guidance as an input, cond["guidance"] [n]: distilled models."""

    denoiser: Any
    strength: Any

    def __call__(self, params, x, level, cond):
        strength = jnp.broadcast_to(jnp.asarray(self.strength, jnp.float32), x.shape[:1])
        return self.denoiser(params, x, level, {**cond, "guidance": strength})


@functools.partial(jax.jit, static_argnames=("family",))
def encode(params: Mapping[str, Any], tokens: Mapping[str, Any], *, family: Family) -> dict[str, Array]:
    """The condition of tokenized prompts, by `Family.encode`; only the text encoders' parameters are given."""
    return family.encode(params, tokens)


def check_width(family: Family, name: str, wanted: int) -> None:
    """Raise ValueError unless a text encoder's states have this width; it may be absent."""
    module = dict(family.modules).get(name)
    if module is not None and module.config.hidden_size != wanted:
        raise ValueError(
            f"the {family.component} takes prompts of width {wanted} but {name} gives {module.config.hidden_size}"
        )
