"""DiT and SiT: pictures by their class, not by prompts.

A condition is {"label": [n]}, integers from 0; the number of classes is the null. `encode_prompts` takes the names of
classes in model_index.json ("white shark"), or numbers as text ("207"); "" is the null.

References:
  Peebles & Xie 2023 (DiT), Ma et al. 2024 (SiT).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax.kernels import IMQ, Delta, Mapped, Product, as_kernel
from mmdjax.sd.families.contract import Family
from mmdjax.sd.flow import CLASS
from mmdjax.sd.networks.transformers.dit import DiT, SiT

FLOW = {"_class_name": CLASS}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": False,
    "set_alpha_to_one": True,
}


class Labels(Family):
    """DiT: transformers with labels that predict the noise."""

    networks = (DiT,)
    usual_scale = 4.0
    usual_scheduler = SCHEDULER
    takes = "labels: cond=pipeline.encode_prompts(params, [...]), or {'label': [...]}"
    method: ClassVar[str | None] = None  # of the network

    @property
    def pipeline_class(self):
        return "DiTPipeline"

    def tokens(self, prompts, tokenizers, index):
        return {"label": np.array([label_of(prompt, self.network.config.num_classes, index) for prompt in prompts])}

    def encode(self, params, tokens):
        return {"label": jnp.asarray(tokens["label"], jnp.int32)}

    def call(self, params, x, t, cond, down):
        if isinstance(cond, Mapping):
            self.check_cond(cond)
            cond = cond["label"]
        return self.network.apply({"params": params["transformer"]}, x, t, cond, method=self.method)

    def cond_shapes(self):
        return {"label": jax.ShapeDtypeStruct((), jnp.int32)}

    def kernel(self, x, *, level, cond):
        return Product(
            x=IMQ(None) if x is None else x, cond=Mapped(label, Delta() if cond is None else as_kernel(cond))
        )


class Interpolants(Labels):
    """SiT: the same network, which predicts the velocity of a linear interpolant at t in [0, 1]."""

    networks = (SiT,)
    method = "flow"
    usual_scheduler = FLOW

    def time(self, scheduler):
        return None

    def times(self, scheduler, num_steps, latent):
        return scheduler.times(num_steps, grid="uniform")


def label(cond: Mapping[str, Any]) -> Any:
    """The labels in a condition, for `Mapped`: [n]."""
    return cond["label"]


def label_of(prompt: str, num_classes: int, index: Mapping[str, Any]) -> int:
    """The number of a class from its name or its number as text; of "" the null.

    Raises:
      ValueError: no such class, with those whose names are nearest.
    """
    said = prompt.strip()
    if not said:
        return num_classes
    if said.isdecimal() and int(said) <= num_classes:
        return int(said)
    names = {
        name.strip().lower(): int(number)
        for number, all_names in (index.get("id2label") or {}).items()
        for name in (*str(all_names).split(","), str(all_names))
    }
    if said.lower() in names:
        return names[said.lower()]
    near = [name for name in names if said.lower() in name or name in said.lower()][:5]
    hint = f"; near it: {', '.join(near)}" if near else "" if names else "; this model names no classes"
    raise ValueError(
        f"{prompt!r} is no class of this model; give a number from 0 to {num_classes - 1}, or a name{hint}"
    )
