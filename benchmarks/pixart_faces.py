"""The default guidance on a small PixArt that draws the pixel-art faces from prompts, beside the package's own model.

A PixArt of 4 blocks and 96 channels learns v̂ from the 4,000 faces of "source", which wear no accessories, with prompts
such as "long auburn hair, tan skin". A T5 encoder of 2 layers with random weights makes the prompts' states. Then
`MMDGuidance()` meets 100 references:

    glasses     all of them wear glasses; every sample has the empty prompt
    prompted    those whose prompt says short hair wear glasses, those with long hair hats; the samples have prompts of
                both, and the kernel compares what prompts say of hair
    whole prompts   the same with `prompt_kernel()`: of 70 prompts that name hair, its colour and skin, hardly two
                references share one, so a sample is pulled by one or two of them and resembles these

    python benchmarks/pixart_faces.py              # trains, about half an hour on one CPU core, and measures
    python benchmarks/pixart_faces.py --out out    # keeps checkpoint, pictures and figures there; repeat it to resume

`label model` in the JSON is the package's class-conditional DiT on the same two tasks and draws.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import face_tasks
import jax
import jax.numpy as jnp
import numpy as np
from alignment_tables import error
from common import as_particles, write_json
from methods import guided
from scores import judge
from task import NUM_REFS, REPORTING, Draw, Task, split_pool

from mmdjax import IMQ, RBF, DiffusionModel, Mapped, MMDGuidance, Particles, Product, from_model
from mmdjax.faces import HAIR, HAIR_COLOURS, SKINS, pool
from mmdjax.plots import image_grid
from mmdjax.provenance import provenance
from mmdjax.schedules import Cosine
from mmdjax.sd.networks.t5 import T5Encoder, T5EncoderConfig
from mmdjax.sd.networks.transformers.pixart import PixArt, PixArtConfig
from mmdjax.sd.text.prompts import mean_token, prompt_kernel, rows
from mmdjax.training import fit

STEPS, BATCH, LEARNING_RATE = 3_000, 64, 2e-3
EMPTY = ""
WORDS = [*dict.fromkeys(["<pad>", "</s>", "hair,", "skin", *HAIR, *HAIR_COLOURS, *SKINS])]
NETWORK = PixArt(
    PixArtConfig(
        num_attention_heads=4, attention_head_dim=24, in_channels=3, out_channels=3, num_layers=4,
        cross_attention_dim=96, caption_channels=48, sample_size=16, patch_size=2,
    )
)  # fmt: skip
ENCODER = T5Encoder(T5EncoderConfig(vocab_size=len(WORDS), d_model=48, d_kv=16, d_ff=96, num_layers=2, num_heads=3))


@functools.cache
def encoder_params() -> Any:
    """The encoder's random weights."""
    return ENCODER.init(jax.random.key(0), *(jnp.zeros(spec.shape, spec.dtype) for spec in ENCODER.inputs()))["params"]


def prompts_of(attributes: dict[str, np.ndarray]) -> list[str]:
    """A prompt for each face."""
    names = [list(each) for each in (HAIR, HAIR_COLOURS, SKINS)]
    numbers = zip(attributes["hair"], attributes["hair_colour"], attributes["skin"], strict=True)
    return ["{} {} hair, {} skin".format(*(name[i] for name, i in zip(names, row, strict=True))) for row in numbers]


def encode(prompts: list[str]) -> dict[str, np.ndarray]:
    """The conditions of prompts, and the number of the hair that each names (−1: none)."""
    said = [[WORDS.index(word) for word in (*prompt.split(), "</s>")] for prompt in prompts]
    ids = np.array([row + [0] * (6 - len(row)) for row in said])
    mask = np.array([[1] * len(row) + [0] * (6 - len(row)) for row in said], bool)
    context = _states(encoder_params(), ids, mask)
    cond = {"context": context, "mask": mask, "pooled": mean_token({"context": context, "mask": mask})}
    hair = [list(HAIR).index(prompt.split()[0]) if prompt else -1 for prompt in prompts]
    return jax.tree.map(np.asarray, cond | {"hair": np.array(hair)})


@jax.jit
def _states(params, ids, mask):
    return ENCODER.apply({"params": params}, ids, mask).last


def apply(params: Any, x: Any, t: Any, cond: Any) -> Any:
    """v̂ of the network, t in [0, 1]."""
    return NETWORK.apply({"params": params}, x, 999 * t, cond)


MODEL = DiffusionModel(from_model(apply, "v"), Cosine(), (16, 16, 3))


def train(out: Path, num_steps: int) -> Any:
    """The result of `fit`, whose checkpoint stands in the folder."""
    import optax

    faces = pool("source")
    cond = encode([*prompts_of(faces.attributes), EMPTY])
    shapes = [jnp.zeros(spec.shape, spec.dtype) for spec in jax.tree.leaves(NETWORK.inputs()[:2])]
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, num_steps // 25, num_steps)
    return fit(
        NETWORK.init(jax.random.key(1), *shapes, rows(cond, [0]))["params"],
        jax.random.key(2),
        Particles(jnp.asarray(faces.images), cond=rows(cond, np.arange(len(faces.images)))),
        model=MODEL,
        num_steps=num_steps,
        batch_size=BATCH,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-2)),
        null_cond=rows(cond, len(faces.images)),
        drop_cond=0.3,
        chunk=1,
        checkpoint=out / "pixart_faces.safetensors",
    )


# --- the two tasks ---


def glasses(params: Any) -> Task:
    """`face_tasks.faces_glasses` with this model."""
    theirs = face_tasks.faces_glasses()

    def draw(seed, num_refs=NUM_REFS):
        return Draw(*(Particles(x, cond=encode([EMPTY] * len(x))) for x in theirs.draw(seed, num_refs)))

    return _task("glasses", params, draw, [EMPTY] * face_tasks.NUM_SAMPLES, wanted=theirs.wanted)


def hair_of(cond: Any) -> Any:
    """What a prompt says of hair, as a unit vector."""
    return jax.nn.one_hot(cond["hair"], len(HAIR))


def prompted(params: Any, name: str = "prompted", kernel: Any = None) -> Task:
    """Short hair comes with glasses, long hair with hats."""
    kinds = {"short": "glasses", "long": "hats"}
    parts = []
    for hair, sheet in kinds.items():
        faces = pool(sheet)
        parts.append(faces[faces.attributes["hair"] == list(HAIR).index(hair)])

    def particles(*chosen):
        some = [faces[at] for faces, at in zip(parts, chosen, strict=True)]
        said = [prompt for faces in some for prompt in prompts_of(faces.attributes)]
        return Particles(np.concatenate([faces.images for faces in some]), cond=encode(said))

    def draw(seed, num_refs=NUM_REFS):
        sizes = seed, num_refs // 2, face_tasks.NUM_SAMPLES // 2
        return Draw(*map(particles, *(split_pool(np.arange(len(faces.images)), *sizes) for faces in parts)))

    said = [prompt for faces in parts for prompt in prompts_of(faces[: face_tasks.NUM_SAMPLES // 2].attributes)]
    kernel = kernel or Product(x=IMQ(), cond=Mapped(hair_of, RBF(0.5)))
    return _task(name, params, draw, said, wanted=face_tasks.faces_prompted().wanted, kernel=kernel)


def _task(name, params, draw, said, **more):
    settings = {"num_samples": face_tasks.NUM_SAMPLES, "num_steps": face_tasks.NUM_STEPS, "cond": encode(said)}
    return Task(name, MODEL, params, draw, group_of=lambda cond: np.asarray(cond["hair"]), **settings, **more)


def measure(task: Task, out: Path | None = None) -> dict[str, Any]:
    """Energy, ratio and share by seed, unguided and guided; a picture of the first seed's samples."""
    found: dict[str, Any] = {"unguided": [], "guided": []}
    shown = []
    for seed in REPORTING:
        judged = judge(task, seed)
        for name, refs, guidance in (
            ("unguided", None, MMDGuidance()),
            ("guided", judged.draw.refs, MMDGuidance(kernel=task.kernel)),
        ):
            x = guided(task, seed, refs, guidance)
            wanted = np.mean(task.wanted(x.x, task.groups(x.cond)))
            found[name].append(judged.brief(x) | {"share": float(wanted)})
            if seed == REPORTING[0]:
                shown.append(np.asarray(x.x)[:: face_tasks.NUM_SAMPLES // 20])
    fresh = [as_particles(task.draw(seed).fresh) for seed in REPORTING]
    fresh = [np.mean(task.wanted(each.x, task.groups(each.cond))) for each in fresh]
    energy = {name: np.array([row["energy"] for row in by_seed]) for name, by_seed in found.items()}
    left = energy["guided"] / energy["unguided"].mean()
    found |= {"fresh_share": float(np.mean(fresh)), "left": [float(left.mean()), error(left)]}
    for name in ("unguided", "guided"):
        means = {key: np.mean([row[key] for row in found[name]]) for key in ("energy", "ratio", "share")}
        print(f"{task.name:43}{name:10}" + "  ".join(f"{key} {value:.3f}" for key, value in means.items()))
    print(f"{task.name:43}{100 * left.mean():.1f} ± {100 * error(left):.1f} % of the unguided energy left")
    if out is not None:
        name = f"pixart_faces_{task.name.replace(' ', '_')}.png"
        image_grid(np.concatenate(shown), columns=20, scale=3).save(out / name)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training (default {STEPS})")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    fitted = train(args.out, args.steps)
    report: dict[str, Any] = {
        "steps": args.steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(fitted.params)),
        "loss by hundred steps": np.mean(fitted.losses[: len(fitted.losses) // 100 * 100].reshape(-1, 100), 1).tolist(),
    }
    params = fitted.ema_params
    for task in (glasses(params), prompted(params), prompted(params, "whole prompts", prompt_kernel())):
        report[task.name] = {"pixart": measure(task, args.out)}
    for task in (face_tasks.faces_glasses(), face_tasks.faces_prompted()):
        name = "prompted" if task.cond is not None else "glasses"
        report[name]["label model"] = measure(task)
    write_json(args.out / "pixart_faces.json", provenance() | report)


if __name__ == "__main__":
    main()
