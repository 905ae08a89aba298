"""Stable Diffusion 1.5 at full size, random weights, float32: what guidance costs beside its U-Net, and its parity.

Guidance of one step of 4 samples of 64 × 64 × 4, with 150 references, against one call of the U-Net on the 4 samples,
or on 8 as classifier-free guidance makes it: in one process, in turns, medians of elapsed time and of processor time,
which a busy machine changes less. And what compiling a sampler costs beside compiling one such call, in processor time.

With --parity instead: the U-Net, the autoencoder and the text encoder, written by diffusers and transformers, in torch
against ours; the largest difference over the largest value. It needs the extra mmdjax[parity], 10 GB of memory and 4 GB
of disk.

    python benchmarks/full_size.py [--parity] [--rounds 3]
"""

import argparse
import functools
import gc
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sd15
from common import normal, write_json

from mmdjax import DiffusionModel, MMDGuidance, Particles, from_model, guided_sample
from mmdjax.guidance.bound import bind, fit_kernel
from mmdjax.provenance import provenance
from mmdjax.schedules import DiscreteTime
from mmdjax.sd import load_models
from mmdjax.sd.files.convert import to_device
from mmdjax.sd.scheduler import Scheduler
from mmdjax.sd.text.prompts import prompt_kernel

SAMPLES, REFS, SHAPE, WIDTH, TOKENS = 4, 150, (64, 64, 4), 768, 77
AT_MOST = 0.02  # guidance over U-Net
GUIDANCE = {
    'MMDGuidance(), "denoised"': MMDGuidance(),
    'at="sample"': MMDGuidance(at="sample"),
    "with prompts": MMDGuidance(prompt_kernel()),
    'with prompts, at="sample"': MMDGuidance(prompt_kernel(), at="sample"),
}
GUIDANCE_CALLS = 20  # to one call of the U-Net


def conditions(seed: int, n: int) -> dict[str, jax.Array]:
    return {"context": jnp.array(normal(seed, n, TOKENS, WIDTH)), "pooled": jnp.array(normal(seed + 1, n, WIDTH))}


# --- what guidance costs ---


def guided(guidance: MMDGuidance):
    """A compiled step of guidance, without arguments. "sample" makes the most inner steps that it ever does."""
    refs = Particles(jnp.array(normal(0, REFS, *SHAPE)), conditions(1, REFS))
    bound = bind(guidance, fit_kernel(guidance, refs), refs, conditions(3, SAMPLES))
    x = jnp.array(normal(5, SAMPLES, *SHAPE))
    state, key = bound.init(x), jax.random.key(0)
    if guidance.placement.moves == "x0_hat":
        step = jax.jit(lambda bound, x, state: bound.denoised(x, state, 0.5))
        return lambda: step(bound, x, state)
    scheduler = Scheduler(sd15.SCHEDULER)
    t, s = (scheduler.schedule()(time) for time in scheduler.times(10)[4:6])  # coarse: above the cap on inner steps
    step = jax.jit(lambda bound, key, x, state: bound.after_step(key, x, state, 0.5, t, s))
    return lambda: step(bound, key, x, state)


def network(params: Any, module: Any, n: int):
    """A compiled call of the U-Net on n latents, without arguments, and the processor seconds of compiling it."""
    args = jnp.array(normal(7, n, *SHAPE)), jnp.full(n, 500.0), conditions(8, n)["context"]
    call, compiling = compiled(lambda params, *args: module.apply({"params": params}, *args), params, *args)
    return lambda: call(params, *args), compiling


def sampler(params: Any, module: Any, refs: Any) -> float:
    """Processor seconds of compiling the sampler of 50 steps with this U-Net."""

    def predict(params, x, t, cond):
        return module.apply({"params": params}, x, t, cond["context"])

    model = DiffusionModel(from_model(predict, "eps", DiscreteTime(1000)), Scheduler(sd15.SCHEDULER).schedule(), SHAPE)
    sample = functools.partial(guided_sample, model=model, num_samples=SAMPLES)
    cond = conditions(3, SAMPLES)
    return compiled(lambda *args: sample(*args, cond=cond).x, params, jax.random.key(0), refs)[1]


def compiled(function, *args):
    start = time.process_time()
    call = jax.jit(function).lower(*args).compile()
    return call, time.process_time() - start


def seconds(call) -> tuple[float, float]:
    """Elapsed and processor seconds of a call."""
    start = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - start[0], time.process_time() - start[1]


def cost(rounds: int) -> dict[str, Any]:
    module, drawn, _ = sd15.component("unet")
    params = jax.tree.map(lambda leaf: to_device(np.asarray(leaf)), drawn)
    steps = {name: guided(guidance) for name, guidance in GUIDANCE.items()}
    calls, compiling = {}, {}
    for n, name in ((SAMPLES, "U-Net on 4"), (2 * SAMPLES, "U-Net on 8")):
        calls[name], compiling[name] = network(params, module, n)
    refs = Particles(jnp.array(normal(0, REFS, *SHAPE)))
    compiling |= {"sampler": sampler(params, module, None), "guided sampler": sampler(params, module, refs)}
    for call in steps.values():
        seconds(call)  # compile
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*calls, *steps)}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
            for step, guide in steps.items():
                times[step] += [seconds(guide) for _ in range(GUIDANCE_CALLS)]
    elapsed, busy = ({name: statistics.median(t[i] for t in ts) for name, ts in times.items()} for i in (0, 1))
    ratios = {name: {of: elapsed[name] / elapsed[of] for of in calls} for name in steps}
    cpu_ratios = {name: {of: busy[name] / busy[of] for of in calls} for name in steps}
    print(f"{'':30}{'ms':>10}{'cpu ms':>10}" + "".join(f"{'of ' + name:>16}{'cpu':>8}" for name in calls))
    for name in times:
        shares = [f"{ratios[name][of]:16.3%}{cpu_ratios[name][of]:8.3%}" for of in calls] if name in steps else []
        print(f"{name:30}{1e3 * elapsed[name]:10.1f}{1e3 * busy[name]:10.1f}" + "".join(shares))
    print(f"guidance: at most {AT_MOST:.0%}")
    print("to compile, cpu s: " + ", ".join(f"{name} {value:.1f}" for name, value in compiling.items()))
    shape = {"samples": SAMPLES, "references": REFS, "dimensions": int(np.prod(SHAPE))}
    return shape | {
        "median_s": elapsed,
        "median_cpu_s": busy,
        "ratio": ratios,
        "ratio_cpu": cpu_ratios,
        "elapsed_and_cpu_s": times,
        "compile_cpu_s": compiling,
    }


# --- parity ---


def parity() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        errors = {}
        for name, run in (("text_encoder", text_encoder), ("vae", vae), ("unet", unet)):
            for what, (ours, theirs) in run(Path(folder) / name).items():
                assert ours.shape == theirs.shape
                errors[f"{name}, {what}"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
                print(f"{name + ', ' + what:30}{errors[f'{name}, {what}']:10.1e}   std {theirs.std():.3g}", flush=True)
        return errors


def randomised(model, path: Path):
    """Every parameter drawn by its name; written by its own library."""
    import torch

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(sd15.draw(key, tuple(parameter.shape))))
    model.eval().save_pretrained(path)
    return model


def ours(path: Path, *args, method=None):
    """Our network's output on the checkpoint at `path`."""
    gc.collect()  # torch's model
    module, params, _ = load_models(path)[path.name]
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda params: module.apply({"params": params}, *args, method=method))(params)


def nchw(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x):
    return np.moveaxis(x.numpy(), 1, -1)


def unet(path: Path):
    import torch
    from diffusers import UNet2DConditionModel

    model = randomised(UNet2DConditionModel.from_config(sd15.CONFIGS["unet"]), path)
    x, context, t = normal(0, 1, *SHAPE), normal(1, 1, TOKENS, WIDTH), 500
    with torch.no_grad():
        theirs = nhwc(model(nchw(x), t, torch.from_numpy(context)).sample)
    del model
    return {"output": (ours(path, jnp.array(x), jnp.array([t]), jnp.array(context)), theirs)}


def vae(path: Path):
    import torch
    from diffusers import AutoencoderKL

    model = randomised(AutoencoderKL.from_config(sd15.CONFIGS["vae"]), path)
    images, latents = normal(0, 1, 512, 512, 3), normal(1, 1, *SHAPE)
    with torch.no_grad():
        mean = nhwc(model.encode(nchw(images)).latent_dist.mean)
        decoded = nhwc(model.decode(nchw(latents)).sample)
    del model
    return {
        "encode": (ours(path, jnp.array(images), method="encode")[0], mean),
        "decode": (ours(path, jnp.array(latents), method="decode"), decoded),
    }


def text_encoder(path: Path):
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    model = randomised(CLIPTextModel(CLIPTextConfig(**sd15.CONFIGS["text_encoder"])), path)
    ids = np.full((1, TOKENS), 49407)
    ids[0, :12] = [49406, *np.random.default_rng(0).integers(1, 49000, 11)]
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids))
    del model
    found = ours(path, jnp.array(ids))
    last, pooled = theirs.last_hidden_state.numpy(), theirs.pooler_output.numpy()
    return {"last": (found.last, last), "pooled": (found.pooled, pooled)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parity", action="store_true", help="against torch, instead of the cost")
    parser.add_argument("--rounds", type=int, default=3, help="calls of each U-Net (default 3)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "full_size.json")
    args = parser.parse_args()
    if args.parity:
        packages = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        found = {"parity": provenance() | packages | {"relative_error": parity()}}
    else:
        found = {"cost": provenance() | {"load_average": os.getloadavg()} | cost(args.rounds)}
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    write_json(args.out, before | found)


if __name__ == "__main__":
    main()
