"""Single files as people share them: the same networks under other names, and marks that say how to sample them.

Fine-tuned models are written by many tools. Some leave "text_model." out of the text encoder's names, some write a
network alone without the prefix that it has in a whole model, some what torch.compile adds to names. `respelled` reads
all as one. Some say what the network predicts, as an empty tensor of a telling name or in the file's metadata:
`said_of_sampling` reads that.

References:
  github.com/Stability-AI/ModelSpec (the metadata); the files of NovelAI, NoobAI and kohya-ss's scripts.
"""

import re
from collections.abc import Mapping
from typing import Any

from mmdjax.checkpoint import Checkpoint, CheckpointError

# a key that only the spelling has, what to replace, and by what
SPELLINGS = (
    (re.compile(r"(^|\.)_orig_mod\."), re.compile(r"(^|\.)_orig_mod\."), r"\1"),
    (re.compile(r"^module\.\w+"), re.compile(r"^module\."), ""),
    (re.compile(r"^diffusion_model\.input_blocks\."), re.compile(r"^diffusion_model\."), "model.diffusion_model."),
    (
        re.compile(r"^input_blocks\.0\.0\.weight$"),
        re.compile(r"^(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\."),
        r"model.diffusion_model.\1.",
    ),
    (
        re.compile(r"^encoder\.down\.0\.block\.0\.conv1\.weight$"),
        re.compile(r"^(encoder|decoder|quant_conv|post_quant_conv|quantize|loss|model_ema)\."),
        r"first_stage_model.\1.",
    ),
    (
        re.compile(r"^(cond_stage_model|conditioner\.embedders\.0)\.transformer\.embeddings\."),
        re.compile(
            r"^(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(embeddings|encoder|final_layer_norm)\."
        ),
        r"\1.transformer.text_model.\2.",
    ),
)
PREDICTIONS = {
    **{"v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction"},
    **{"epsilon": "epsilon", "eps": "epsilon", "noise": "epsilon", "sample": "sample", "x0": "sample"},
}
V, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors of these names
EDM = re.compile(r"^edm_(mean|std)$|^edm_vpred\.sigma_(max|min)$")
EDM_NAME = "a model of EDM's noise, such as Playground 2.5 or CosXL"


def respelled(file: Checkpoint) -> Checkpoint:
    """The file's tensors under the names of whole single-file checkpoints.

    Raises:
      CheckpointError: two spellings of one name.

    Example:
      >>> from mmdjax.checkpoint import Checkpoint
      >>> list(respelled(Checkpoint({"_orig_mod.input_blocks.0.0.weight": 0}, "unet.safetensors")))
      ['model.diffusion_model.input_blocks.0.0.weight']
    """
    stored = file.stored
    for marker, pattern, new in SPELLINGS:
        if not any(marker.search(key) for key in stored):
            continue
        again = {pattern.sub(new, key): value for key, value in stored.items()}
        if len(again) < len(stored):
            raise CheckpointError(f"{file.source} has tensors twice, under two spellings of their names")
        stored = again
    return Checkpoint(stored, file.source, file.metadata)


def said_of_sampling(file: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a scheduler that a single file says itself: the prediction, and a table that ends in pure noise.

    Args:
      given: the caller's settings, which come first.
    Raises:
      ValueError: nothing is given, and the file says a kind of noise that is not implemented, an unknown prediction, or
        two that contradict each other.

    Example:
      >>> from mmdjax.checkpoint import Checkpoint
      >>> said_of_sampling(Checkpoint({}, "model", {"modelspec.prediction_type": "v"}), {})
      {'prediction_type': 'v_prediction'}
    """
    settings = {}
    if ZERO_SNR in file or file.metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # from pure noise: Lin et al. 2024
    if "prediction_type" not in given:
        settings |= _said_of_prediction(file)
    return {**settings, **given}


def _said_of_prediction(file: Checkpoint) -> dict[str, str]:
    edm = sorted(key for key in file if EDM.match(key))
    if edm:
        raise ValueError(f"{file.source} is {EDM_NAME} ({', '.join(edm)}); its network takes other inputs than here")
    said = {key: value for key, value in _in_metadata(file.metadata).items() if value}
    if V in file:
        said[f"the tensor {V}"] = "v_prediction"
    unknown = [f"{key} = {value!r}" for key, value in said.items() if value not in PREDICTIONS]
    if unknown:
        raise ValueError(
            f"{file.source}: {', '.join(unknown)}; known: {', '.join(PREDICTIONS)}. Give what the network predicts: "
            'load(..., scheduler={"prediction_type": "epsilon"}), --prediction epsilon'
        )
    found = {PREDICTIONS[value] for value in said.values()}
    if len(found) > 1:
        raise ValueError(
            f"{file.source} says two things of what its network predicts ({said}); give which is right: "
            'load(..., scheduler={"prediction_type": "v_prediction"}), --prediction v_prediction'
        )
    return {"prediction_type": found.pop()} if found else {}


def _in_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file's metadata say of the prediction, by key."""
    trained = metadata.get("ss_v_parameterization", "").lower()
    said = {
        "modelspec.prediction_type": metadata.get("modelspec.prediction_type", "").lower(),
        "ss_v_parameterization": {"true": "v", "false": "epsilon"}.get(trained, trained),
    }
    architecture = metadata.get("modelspec.architecture", "")
    if not any(said.values()) and architecture.startswith("stable-diffusion-v2-"):
        said["modelspec.architecture"] = "v" if "-768-v" in architecture else "epsilon"
    return said
