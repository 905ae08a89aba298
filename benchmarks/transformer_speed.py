"""Speed of the diffusion transformers beside diffusers' on torch, float32, by turns in one process; medians.

    network    one call on one latent, the widths of DiT-XL/2 and Stable Diffusion 3.5 medium at reduced depth
    guidance   the default guidance's part of a step: batch 4, 150 references. Its time is over that of the network,
               whose time grows with its depth; so the measured one at reduced depth is scaled to the full depth
    loading    from a folder that diffusers wrote: time over that of reading the file, memory over the parameters'

    python benchmarks/transformer_speed.py [--only network] [--rounds 5]

Needs the extra mmdjax[parity]; the memory is read on Linux.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import in_turns, medians, memory, normal, write_json

from mmdjax import MMDGuidance, Particles
from mmdjax.guidance.bound import bind, fit_kernel
from mmdjax.provenance import provenance
from mmdjax.sd import load_component

SAMPLES, REFS = 4, 150
TARGETS = {"network": 1.0, "guidance": 0.01, "loading": 2.5, "memory": 1.1}  # at most


class Model(NamedTuple):
    """A model at reduced depth: how torch makes it, the depth in full, its latents, its other inputs."""

    make: Callable[[], Any]
    depth: int
    full_depth: int
    shape: tuple[int, ...]
    inputs: Callable[[], dict[str, np.ndarray]]


def dit():
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(num_layers=4, out_channels=8, sample_size=64)


def sd35():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128, num_layers=4, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=1536,
        joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
    )  # fmt: skip


MODELS = {
    "DiT-XL/2, 4 of 28 blocks": Model(dit, 4, 28, (64, 64, 4), lambda: {"class_labels": np.array([7])}),
    "Stable Diffusion 3.5 medium, 4 of 24 blocks": Model(
        sd35,
        4,
        24,
        (64, 64, 16),
        lambda: {"encoder_hidden_states": normal(2, 1, 333, 4096), "pooled_projections": normal(3, 1, 2048)},
    ),
}


def ours(folder: Path, shape: tuple[int, ...], inputs: dict[str, np.ndarray]):
    """A compiled call of our network, without arguments."""
    module, params, _ = load_component(folder)
    cond = inputs.get("class_labels")
    if cond is None:
        cond = {"context": inputs["encoder_hidden_states"], "pooled": inputs["pooled_projections"]}
    args = jnp.array(normal(0, 1, *shape)), jnp.array([500.0]), jax.tree.map(jnp.asarray, cond)
    call = jax.jit(lambda params, *args: module.apply({"params": params}, *args)).lower(params, *args).compile()
    return lambda: call(params, *args)


def theirs(model: Any, shape: tuple[int, ...], inputs: dict[str, np.ndarray]):
    """The same call on torch; its picture [n, h, w, c]."""
    import torch

    x = torch.from_numpy(normal(0, 1, *shape).transpose(0, 3, 1, 2).copy())
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}

    def call():
        with torch.no_grad():
            out = model(x, timestep=torch.tensor([500]), **given).sample
        return out[:, : shape[-1]].permute(0, 2, 3, 1).numpy()

    return call


def network(rounds: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name, (make, _, _, shape, inputs) in MODELS.items():
        model = make().eval()
        model.save_pretrained(folder / "model")
        calls = {"ours": ours(folder / "model", shape, inputs()), "torch": theirs(model, shape, inputs())}
        images = {who: np.asarray(call()) for who, call in calls.items()}
        difference = float(np.abs(images["ours"] - images["torch"]).max() / np.abs(images["torch"]).max())
        times = in_turns(calls, rounds)
        middle = {who: statistics.median(seconds) for who, seconds in times.items()}
        ratio = middle["ours"] / middle["torch"]
        print(f"{name:46}ours over torch {ratio:.2f}, {middle['ours']:.3f} s; they differ by {difference:.1e}")
        found[name] = {"seconds": times, "median_s": middle, "ours_over": ratio, "difference": difference}
    return found


def guidance(rounds: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name, (make, depth, full, shape, inputs) in MODELS.items():
        make().save_pretrained(folder / "model")
        refs = Particles(jnp.array(normal(1, REFS, *shape)))
        bound = bind(MMDGuidance(), fit_kernel(MMDGuidance(), refs), refs, None)
        x = jnp.array(normal(5, SAMPLES, *shape))
        state, step = bound.init(x), jax.jit(lambda bound, x, state: bound.denoised(x, state, 0.5))
        calls = {
            "network": ours(folder / "model", shape, inputs()),
            "guidance": lambda step=step, bound=bound, x=x, state=state: step(bound, x, state),
        }
        middle = medians(calls, rounds)
        share = middle["guidance"] / (SAMPLES * middle["network"] * full / depth)
        print(f"{name:46}guidance {1e3 * middle['guidance']:.1f} ms, {share:.2%} of a step at full depth")
        found[name] = {"median_s": middle, "share": share}
    return found


def loading(rounds: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name, model in MODELS.items():
        model.make().save_pretrained(folder / "model")
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        rows: dict[str, list[dict[str, float]]] = {"read": [], "load": []}
        for turn in range(rounds + 1):
            for kind in rows:
                command = [sys.executable, __file__, "--child", kind, str(folder / "model")]
                row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                if turn:
                    rows[kind].append(row)
        middle = {kind: statistics.median(row["seconds"] for row in those) for kind, those in rows.items()}
        peak = statistics.median(row["peak"] for row in rows["load"]) / size
        ratio = middle["load"] / middle["read"]
        print(f"{name:46}{size / 2**30:.2f} GiB, loading over reading {ratio:.2f}, memory over parameters {peak:.3f}")
        found[name] = {"bytes": size, "rows": rows, "load_over_read": ratio, "memory_over_parameters": peak}
    return found


def child(kind: str, folder: str) -> None:
    """One measurement: seconds, and the peak of the process's own memory beyond what it held before."""
    from threading import Event, Thread

    before, peak, done = memory("RssAnon"), [0], Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], memory("RssAnon"))

    watcher = Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if kind == "read":
        held: Any = [path.read_bytes() for path in Path(folder).glob("*.safetensors")]
    else:
        held = jax.block_until_ready(load_component(folder).params)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "peak": max(peak[0], memory("RssAnon")) - before, "held": len(held)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = {"network": network, "guidance": guidance, "loading": loading}
    parser.add_argument("--only", choices=runs, nargs="+", default=list(runs))
    parser.add_argument("--rounds", type=int, default=5, help="of the turns (default 5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "transformer_speed.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    packages = {name: version(name) for name in ("torch", "diffusers")}
    for name in args.only:
        print(f"\n{name}")
        with tempfile.TemporaryDirectory() as folder:
            measured = runs[name](args.rounds, Path(folder))
        found[name] = provenance() | packages | {"load_average": os.getloadavg(), "models": measured}
        write_json(args.out, found | {"at_most": TARGETS})


if __name__ == "__main__":
    main()
