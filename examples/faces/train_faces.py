"""Train the faces' denoiser that ships with mmdjax, and the classifier of attributes that measures it.

    python examples/faces/write_faces.py --training out/faces        # draws what it learns from; needs Node
    python examples/faces/train_faces.py --out out/faces             # about two hours on two CPU cores
    python examples/faces/train_faces.py --evaluate                  # the shipped weights
    python examples/faces/train_faces.py --classifier --out FOLDER   # minutes

If the training stops, repeat the command to resume it.

Measured on 1,000 unguided samples (cond=None, the defaults of guided_sample):
  energy   energy distance (U) to the 4,000 faces of "source", which the network never saw; the same for as many
           training faces. 0 in the mean for fresh data
  nearest  mean distance to the nearest training face over that of "source"; well below 1 is memorisation
  share    of samples that the classifier gives each accessory: none was in training
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax import Particles, guided_sample
from mmdjax.checkpoint import load_weights, save_weights
from mmdjax.faces import CLASSES, CLASSIFIER, CONDITIONS, WEIGHTS, faces_model, pool, read_attributes, read_sheet
from mmdjax.faces.network import AttributesNetwork, FacesNetwork
from mmdjax.metrics import energy_distance, nearest_ratio
from mmdjax.plots import image_grid
from mmdjax.provenance import training_origin
from mmdjax.training import fit

STEPS, WARMUP, BATCH, LEARNING_RATE, WEIGHT_DECAY, EMA = 5_000, 200, 64, 2e-3, 1e-2, 0.999
DROP_ALL, DROP_ONE = 0.5, 0.2  # how often all conditions are left open, and each by itself
CLASSIFIER_STEPS = 3_000
NULLS = jnp.array([CLASSES[name] for name in CONDITIONS])


def drop(key, batch: Particles) -> Particles:
    """Leave conditions open, so that the network learns to do without any of them."""
    key_all, key_one = jax.random.split(key)
    dropped = jax.random.bernoulli(key_all, DROP_ALL, (batch.n, 1))
    dropped |= jax.random.bernoulli(key_one, DROP_ONE, batch.cond.shape)
    return Particles(batch.x, jnp.where(dropped, NULLS, batch.cond))


def train(folder: Path, seed: int, num_steps: int):
    """The training's result; `folder` has the faces, and keeps the checkpoint."""
    import optax

    faces = read_sheet(folder / "training")
    key_init, key_fit = jax.random.split(jax.random.key(seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARMUP, num_steps)
    return fit(
        FacesNetwork().init(key_init, jnp.zeros((1, 16, 16, 3)), jnp.zeros(1)),
        key_fit,
        Particles(jnp.asarray(faces.images), cond=jnp.asarray(faces.cond)),
        model=faces_model(),
        num_steps=num_steps,
        batch_size=BATCH,
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=WEIGHT_DECAY)
        ),
        ema=EMA,
        augment=drop,
        chunk=1,
        checkpoint=folder / "training.safetensors",
    )


def evaluate(folder: Path, params, seed: int = 0, n: int = 1000) -> tuple[dict[str, float], np.ndarray]:
    """What the module's docstring lists, and the samples."""
    training, source = read_sheet(folder / "training").images, pool("source").images
    x = np.asarray(guided_sample(params, jax.random.key(seed), None, model=faces_model(), num_samples=n).x)
    rows = np.random.default_rng(seed).permutation(len(training))[:n]
    found = {
        "energy of samples (U)": float(energy_distance(x, source)),
        "energy of training faces (U)": float(energy_distance(training[rows], source)),
        "energy between half and half of source (U)": float(energy_distance(source[::2], source[1::2])),
        "nearest training face, over source's": float(nearest_ratio(x, training, source[:n])),
    }
    shown = read_attributes(x)
    return found | {f"share with {name}": float(shown[name].mean()) for name in ("glasses", "hat", "beard")}, x


# --- the classifier ---


def train_classifier(folder: Path, seed: int, num_steps: int):
    """Parameters with the least cross-entropy of all attributes of the faces in "everyone", noise added to some."""
    import optax
    from tqdm.auto import trange

    faces = read_sheet(folder / "everyone")
    x, truth = jnp.asarray(faces.images), {name: jnp.asarray(v) for name, v in faces.attributes.items()}
    network = AttributesNetwork()
    key_init, key_steps = jax.random.split(jax.random.key(seed))
    params = network.init(key_init, x[:1])
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, num_steps), weight_decay=1e-2)

    def loss(params, rows, key):
        key_size, key_noise = jax.random.split(key)
        size = 0.15 * jax.random.uniform(key_size, (len(rows), 1, 1, 1))  # samples are not as clean as drawings
        logits, _ = network.apply(params, x[rows] + size * jax.random.normal(key_noise, (len(rows), 16, 16, 3)))
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits[name], truth[name][rows]).mean() for name in truth
        ]
        return sum(losses)

    @jax.jit
    def step(params, state, key):
        key_rows, key_loss = jax.random.split(key)
        rows = jax.random.randint(key_rows, (128,), 0, len(x))
        gradient = jax.grad(loss)(params, rows, key_loss)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in trange(num_steps, desc="classifier"):
        params, state = step(params, state, jax.random.fold_in(key_steps, i))
    return params


def accuracy() -> dict[str, float]:
    """How often the shipped classifier is right, by attribute, on all faces of the package."""
    faces = [pool(name) for name in ("source", "glasses", "hats", "beards")]
    found = read_attributes(np.concatenate([each.images for each in faces]))
    truth = {name: np.concatenate([each.attributes[name] for each in faces]) for name in found}
    return {f"right about {name}": float((found[name] == truth[name]).mean()) for name in found}


def provenance(seed: int, steps: int) -> dict[str, str]:
    return training_origin(
        __file__,
        script="examples/faces/train_faces.py",
        seed=seed,
        steps=steps,
        data="drawn by examples/faces/write_faces.py --training",
        license="Apache-2.0; of the faces, see mmdjax/faces/NOTICE",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, minibatches and noise (default: 0)")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}, of the classifier {CLASSIFIER_STEPS}")
    parser.add_argument("--out", type=Path, default=Path("out/faces"), help="folder with the faces for training")
    parser.add_argument("--evaluate", action="store_true", help="train nothing: measure the shipped weights")
    parser.add_argument("--classifier", action="store_true", help="train the classifier")
    args = parser.parse_args()
    start = time.perf_counter()
    if args.classifier:
        steps = args.steps or CLASSIFIER_STEPS
        params = train_classifier(args.out, args.seed, steps)
        save_weights(CLASSIFIER, params, provenance(args.seed, steps), dtype=np.float16)
    elif not args.evaluate:
        steps = args.steps or STEPS
        fitted = train(args.out, args.seed, steps)
        told = provenance(args.seed, steps) | {"seconds": f"{time.perf_counter() - start:.0f}"}
        save_weights(WEIGHTS, fitted.ema_params, told, dtype=np.float16)
        curve = fitted.losses[: len(fitted.losses) // 50 * 50].reshape(-1, 50).mean(1)
        report = told | {"loss, mean of 50 steps": [round(float(v), 5) for v in curve]}
        (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, value in accuracy().items():
        print(f"{name:45} {value:.4f}")
    if not args.classifier:
        found, x = evaluate(args.out, load_weights(WEIGHTS))
        for name, value in found.items():
            print(f"{name:45} {value:.4f}")
        image_grid(x[:120], columns=20, scale=4).save(args.out / "samples.png")


if __name__ == "__main__":
    main()
