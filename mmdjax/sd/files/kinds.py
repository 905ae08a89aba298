"""Models that look like Stable Diffusion and are conditioned on more: recognised, to be refused by name.

Their U-Nets take further channels beside the latents, or other numbers beside the prompt. Sampled as if they were plain
models they would fail, or give noise.

References:
  Rombach et al. 2022, section 4.5 (inpainting); Brooks et al. 2023 (InstructPix2Pix); Podell et al. 2023, section 2.5
  (SDXL's refiner).
"""

from typing import Any

BESIDE = {  # channels beside the latents
    1: "a depth model, which also takes the depth of a picture",
    3: "an upscaler, which also takes a small picture",
    4: "a model that edits pictures by instructions (InstructPix2Pix), which also takes the picture",
    5: "an inpainting model, which also takes a mask and the masked picture",
}
REFINER_SIZES = 5  # beside the prompt: original height and width, the crop's corner, a score of beauty; SDXL has six


def other_channels(unet: Any, latents: int) -> str:
    """Why a U-Net's channels are not those of the latents, in words."""
    more = BESIDE.get(unet.in_channels - latents) if unet.out_channels == latents else None
    if more is not None:
        return f"{more}; load the plain model that it was made from"
    if unet.in_channels == latents and unet.out_channels == 2 * latents:
        return "a model that predicts its variance too, which is not implemented for U-Nets"
    return "an inpainting or depth model, or parts of two models"


def other_sizes(unet: Any, pooled: int) -> str:
    """Why an SDXL U-Net's condition is not that of its text encoder's projection, of width `pooled`, in words."""
    if unet.projection_class_embeddings_input_dim == pooled + REFINER_SIZES * unet.addition_time_embed_dim:
        return (
            "this is SDXL's refiner, which is trained for the last fifth of the noise only and finishes another "
            "model's pictures; load the base model"
        )
    return "these are parts of two models"
