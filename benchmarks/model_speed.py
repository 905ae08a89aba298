"""Speed of the Flax networks beside their peers, float32, by turns in one run; medians.

    unet       Stable Diffusion 1.5's U-Net at full size on one latent of 64 × 64 × 4, random weights: ours, torch's
               with channels last and as it comes, and with --flax diffusers' last Flax one, in a process of its own
    pipeline   text to pictures of 128 × 128, 4 prompts, 50 steps of DDIM with classifier-free guidance, the small model
               of CONFIGS: ours and diffusers' on torch, from the same folder and the same noise; the largest difference
               between their pictures is measured, too
    compile    the guided sampler of Stable Diffusion 1.5 beside one call of its U-Net, processor seconds

    python benchmarks/model_speed.py [--only unet] [--rounds 5] [--flax FOLDER]

FOLDER is what `pip install --no-deps --target FOLDER diffusers==0.39.0` made. Needs the extra mmdjax[parity].
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sd15
from common import in_turns, normal, write_json
from full_size import REFS, SAMPLES, SHAPE, TOKENS, WIDTH, nchw, network, sampler

from mmdjax import DDIM, Particles, guided_sample
from mmdjax.provenance import provenance
from mmdjax.sd import load
from mmdjax.sd.files.convert import to_device
from mmdjax.sd.tiny import write_vocabulary

TARGETS = {"unet": 1.15, "flax": 0.65, "pipeline": 0.8, "pipeline, compilation included": 1.5, "compile": 1.3}
CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 32,
        "block_out_channels": (64, 128, 256, 256),
        "layers_per_block": 2,
        "cross_attention_dim": 256,
        "attention_head_dim": 8,
    },
    "vae": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "sample_size": 128,
    },
    "text_encoder": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
}
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULER |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
PROMPTS, STEPS, SCALE = ["a cat", "a dog", "a cat and a dog", "two dogs"], 50, 7.5


def medians(times: dict[str, list[float]], ours: str = "ours") -> dict[str, Any]:
    found = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: found[ours] / value for name, value in found.items() if name != ours}
    for name, value in found.items():
        print(
            f"{name:34}{value:9.3f} s" + (f"   ours over it {ratios[name]:.2f}" if name in ratios else ""), flush=True
        )
    return {"median_s": found, "seconds": times, "ours_over": ratios}


# --- one call of the U-Net ---


def unet(rounds: int, flax: Path | None) -> dict[str, Any]:
    import torch
    from diffusers import UNet2DConditionModel

    x, context = normal(0, 1, *SHAPE), normal(1, 1, TOKENS, WIDTH)
    module, drawn, _ = sd15.component("unet")
    params = jax.tree.map(lambda leaf: to_device(np.asarray(leaf)), drawn)
    arguments = jnp.array(x), jnp.array([500]), jnp.array(context)
    compiled = (
        jax.jit(lambda params, *args: module.apply({"params": params}, *args)).lower(params, *arguments).compile()
    )

    model = UNet2DConditionModel.from_config(sd15.CONFIGS["unet"]).eval()
    last = {"plain": torch.contiguous_format, "channels last": torch.channels_last}
    images = {name: nchw(x).contiguous(memory_format=layout) for name, layout in last.items()}

    def theirs(name):
        def call():
            model.to(memory_format=last[name])
            start = time.perf_counter()
            with torch.no_grad():
                model(images[name], 500, torch.from_numpy(context))
            return time.perf_counter() - start

        return call

    calls: dict[str, Any] = {"ours": lambda: compiled(params, *arguments)}
    calls |= {f"torch, {name}": theirs(name) for name in last}
    peer = None
    if flax is not None:
        command = [sys.executable, __file__, "--serve-flax", str(flax)]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def ask():
            peer.stdin.write("go\n")
            peer.stdin.flush()
            return float(peer.stdout.readline())

        ask()  # its start is not another's turn
        calls["diffusers' Flax"] = ask
    found = medians(in_turns(calls, rounds))
    if peer is not None:
        peer.communicate()
    return found


def serve_flax(folder: Path) -> None:
    """Run diffusers' Flax U-Net once for each line that comes, and answer with the seconds."""
    out, sys.stdout = sys.stdout, sys.stderr
    sys.path.insert(0, str(folder))
    from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel

    raw = {key: value for key, value in sd15.CONFIGS["unet"].items() if key != "_class_name"}
    model = FlaxUNet2DConditionModel(**raw)
    shapes = jax.eval_shape(model.init_weights, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), shapes)
    params = jax.tree.map(jnp.array, params)
    x, context = nchw(normal(0, 1, *SHAPE)).numpy(), normal(1, 1, TOKENS, WIDTH)
    call = jax.jit(lambda params, *args: model.apply({"params": params}, *args).sample)
    arguments = jnp.array(x), jnp.array(500), jnp.array(context)
    jax.block_until_ready(call(params, *arguments))
    for _ in sys.stdin:
        start = time.perf_counter()
        jax.block_until_ready(call(params, *arguments))
        print(time.perf_counter() - start, file=out, flush=True)


# --- prompts to pictures ---


def pipeline(rounds: int) -> dict[str, Any]:
    import diffusers
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        size = write_vocabulary(path / "words")
        words = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1}
        torch.manual_seed(0)
        made = diffusers.StableDiffusionPipeline(
            unet=diffusers.UNet2DConditionModel(**CONFIGS["unet"]).eval(),
            vae=diffusers.AutoencoderKL(**CONFIGS["vae"]).eval(),
            text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**CONFIGS["text_encoder"] | words)),
            tokenizer=transformers.CLIPTokenizer.from_pretrained(path / "words"),
            scheduler=diffusers.DDIMScheduler(**SCHEDULER),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        made.set_progress_bar_config(disable=True)
        made.save_pretrained(path / "model")
        ours, params = load(path / "model")
    made.unet.to(memory_format=torch.channels_last)
    made.vae.to(memory_format=torch.channels_last)
    latents = normal(0, len(PROMPTS), *ours.latent_shape())
    pictures = {}

    def theirs():
        pictures["theirs"] = made(
            PROMPTS, latents=nchw(latents), num_inference_steps=STEPS, guidance_scale=SCALE, eta=0.0, output_type="np"
        ).images

    def mine():
        cond = ours.encode_prompts(params, PROMPTS)
        null = ours.encode_prompts(params, "", negative=True)
        x = guided_sample(
            params, jax.random.key(0), None, model=ours.model(guidance_scale=SCALE, null_cond=null),
            num_samples=len(PROMPTS), cond=cond, sampler=DDIM(eta=0.0), times=ours.times(STEPS), x_init=latents,
        ).x  # fmt: skip
        pictures["ours"] = np.asarray(ours.decode(params, x))

    start = time.perf_counter()
    mine()
    first = time.perf_counter() - start
    found = medians(in_turns({"ours": mine, "diffusers on torch": theirs}, rounds))
    theirs_s = found["median_s"]["diffusers on torch"]
    difference = float(np.abs((pictures["ours"] + 1) / 2 - pictures["theirs"]).max())
    print(
        f"ours with compilation {first:.1f} s, over theirs {first / theirs_s:.2f}; largest difference {difference:.1g}"
    )
    return found | {
        "first_call_s": first,
        "ours_with_compilation_over": first / theirs_s,
        "largest_difference": difference,
    }


# --- compilation ---


def compilation() -> dict[str, Any]:
    module, _, _ = sd15.component("unet")
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros((1, TOKENS, WIDTH)))
    )["params"]
    _, one = network(shapes, module, SAMPLES)
    found = {"U-Net": one}
    found |= {"sampler": sampler(shapes, module, None)}
    found |= {"guided sampler": sampler(shapes, module, Particles(jnp.array(normal(0, REFS, *SHAPE))))}
    print(", ".join(f"{name} {value:.1f} cpu s" for name, value in found.items()))
    print(f"guided sampler over U-Net {found['guided sampler'] / one:.2f}")
    return {"cpu_s": found, "guided_sampler_over_unet": found["guided sampler"] / one}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("unet", "pipeline", "compile")
    parser.add_argument("--only", choices=kinds, nargs="+", default=kinds)
    parser.add_argument("--rounds", type=int, default=5, help="of the turns (default 5)")
    parser.add_argument("--flax", type=Path, metavar="FOLDER", help="where diffusers 0.39.0 is installed")
    parser.add_argument("--serve-flax", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "model_speed.json")
    args = parser.parse_args()
    if args.serve_flax:
        serve_flax(args.serve_flax)
        return
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    runs = {
        "unet": lambda: unet(args.rounds, args.flax),
        "pipeline": lambda: pipeline(args.rounds),
        "compile": compilation,
    }
    for name in args.only:
        print(f"\n{name}")
        found[name] = provenance() | packages | {"load_average": os.getloadavg()} | runs[name]()
        write_json(args.out, found | {"at_most": TARGETS})


if __name__ == "__main__":
    main()
