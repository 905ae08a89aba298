"""What each family of models does in its own way, one file for each family.

    text encoders' outputs → the condition → the network's call → its time, its usual strength of guidance

`mmdjax.sd.Pipeline` asks the family of its network, and knows no family itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmdjax.sd.families.contract import ENCODERS, TOKENIZERS, Embedded, Family, encode
from mmdjax.sd.families.flux import Flux1, Flux2Klein
from mmdjax.sd.families.labels import Interpolants, Labels
from mmdjax.sd.families.pixart import PixArt
from mmdjax.sd.families.sd3 import StableDiffusion3
from mmdjax.sd.families.unets import StableDiffusion, Unconditional

FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    Unconditional,
    Interpolants,  # whose network is a kind of the next one's
    Labels,
    PixArt,
    StableDiffusion3,
    Flux1,
    Flux2Klein,
)

__all__ = ["ENCODERS", "FAMILIES", "TOKENIZERS", "Embedded", "Family", "Network", "encode", "family_of"]


def family_of(modules: Mapping[str, Any]) -> Family:
    """The family of a model's networks.

    Raises:
      ValueError: no network to sample with.
    """
    for family in FAMILIES:
        if isinstance(modules.get(family.component), family.networks):
            return family(tuple(modules.items()))
    raise ValueError(
        f"a pipeline needs a unet or a transformer, and a vae or vqvae; there are: {', '.join(modules) or 'none'}. "
        "mmdjax.sd.load_models loads networks on their own"
    )


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as `from_model` calls it: (params, x, t, cond) -> prediction, with the parameters of the pipeline.

    Args:
      module: of any family.
      downscale: pixels for each latent; SDXL takes the picture's size.
    """

    module: Any
    downscale: int

    def __call__(self, params, x, t, cond):
        family = next(family for family in FAMILIES if isinstance(self.module, family.networks))
        return family(((family.component, self.module),)).call(params, x, t, cond, self.downscale)
