"""Train the small latent diffusion model of digits in examples/latent_digits: Stable Diffusion's parts, small.

    python examples/train_latent_digits.py                  # minutes on two CPU cores
    python examples/train_latent_digits.py --evaluate       # the shipped weights

The folder has diffusers' layout, so that `mmdjax.sd.load` and `StableDiffusionPipeline.from_pretrained` both read it:

  tokenizer     byte pairs learnt from the prompts, in CLIP's files
  text_encoder  CLIP's architecture
  vae           autoencoder of 8 × 8 pictures (RGB, all grey) to latents 4 × 4 × 4
  unet          attends to the prompt, predicts v, on the squared cosine schedule

Prompts are "a three", "a thick three", "a thin three", "a slanted three"; a digit without a style is as it was written.
Seen in training: the 1,200 digits of the training split in all four styles, and nothing else.

Measured:
  reconstruction  RMS error of held-out digits there and back, of a range of 2
  agreement       how often a 1-nearest-neighbour classifier gives samples of "a three" … their class, and held-out ones
  energy          energy distance to held-out digits of the same styles, pixels; of as many training digits; per style
  nearest         mean distance to the nearest training picture over that of held-out ones; well below 1 is memorisation
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax import DiffusionModel, Particles, from_model, guided_sample
from mmdjax.digits import slant, splits, thicken
from mmdjax.metrics import energy_distance, nearest_ratio
from mmdjax.provenance import training_origin
from mmdjax.schedules import DiscreteTime
from mmdjax.sd import Pipeline, load, module_from_config
from mmdjax.sd.scheduler import Scheduler
from mmdjax.sd.tiny import write_vocabulary
from mmdjax.sd.tokenizer import load_tokenizer
from mmdjax.training import fit

FOLDER = Path(__file__).parent / "latent_digits"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = {
    "": lambda images: images,
    "thick": thicken,
    "thin": lambda images: np.clip(thicken(images, -0.4), -1, 1),
    "slanted": slant,
}
PROMPTS = tuple(" ".join(["a", *style.split(), name]) for style in STYLES for name in NAMES)
LENGTH = 8  # tokens: start, up to three words, end, padding

VAE_STEPS, STEPS, WARMUP, BATCH, LEARNING_RATE, EMA, DROP = 1000, 2500, 100, 64, 2e-3, 0.998, 0.1
PIXEL_STD = 0.1  # of the autoencoder's Gaussian on pixels: what of a picture is noise

VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 4,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "projection_dim": 32,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}


def pictures(images):
    """Digits [n, 8, 8, 1] in all styles as the model's pictures, in the order of `PROMPTS`' styles: [4 n, 8, 8, 3]."""
    return np.concatenate([style(images) for style in STYLES.values()]).repeat(3, axis=-1)


def grey(images):
    """[n, 8, 8, 3] -> [n, 8, 8, 1]."""
    return np.asarray(images).mean(-1, keepdims=True)


# --- the tokenizer ---


def write_tokenizer(folder: Path) -> int:
    """A vocabulary of CLIP's kind with the byte pairs learnt from the prompts; how many tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(PROMPTS, trainer)
    merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return write_vocabulary(folder, merges=merges, length=LENGTH)


# --- the networks ---


def train_autoencoder(key, images, num_steps: int):
    """The parameters of the autoencoder with the least  ‖x − x̂‖²/2s² + KL(q(z | x) ‖ N(0, 1)),  s = `PIXEL_STD`."""
    import optax
    from tqdm.auto import trange

    module = module_from_config(VAE)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))
    key_init, key_steps = jax.random.split(key)
    params = module.init(key_init, images[:1])["params"]

    def loss(params, key, x):
        mean, logvar = module.apply({"params": params}, x, method="encode")
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        decoded = module.apply({"params": params}, z, method="decode")
        kl = 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1 - logvar)
        return (jnp.sum((x - decoded) ** 2) / (2 * PIXEL_STD**2) + kl) / len(x)

    @jax.jit
    def step(params, state, key):
        key_rows, key_loss = jax.random.split(key)
        x = images[jax.random.randint(key_rows, (BATCH,), 0, len(images))]
        value, gradient = jax.value_and_grad(loss)(params, key_loss, x)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for i in (bar := trange(num_steps, desc="autoencoder")):
        params, state, value = step(params, state, jax.random.fold_in(key_steps, i))
        if i % 50 == 0:
            bar.set_postfix(loss=f"{float(value):.1f}")
    return params


def train_denoiser(key, latents, ids, null, scheduler: Scheduler, vocab_size: int, num_steps: int):
    """The averaged parameters of the text encoder and the U-Net, trained together on the denoising loss."""
    import optax

    text = module_from_config(TEXT | {"vocab_size": vocab_size, "eos_token_id": vocab_size - 1})
    unet = module_from_config(UNET)

    def apply(params, x, t, ids):
        context = text.apply({"params": params["text_encoder"]}, ids).last
        return unet.apply({"params": params["unet"]}, x, t, context)

    key_text, key_unet, key_fit = jax.random.split(key, 3)
    encoder = text.init(key_text, ids[:1])["params"]
    context = jnp.zeros((1, LENGTH, UNET["cross_attention_dim"]))
    params = {"text_encoder": encoder, "unet": unet.init(key_unet, latents[:1], jnp.zeros(1), context)["params"]}
    denoiser = from_model(apply, scheduler.prediction, DiscreteTime(scheduler.num_train_steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARMUP, num_steps)
    fitted = fit(
        params,
        key_fit,
        Particles(latents, cond=ids),
        model=DiffusionModel(denoiser, scheduler.schedule(), latents.shape[1:]),
        num_steps=num_steps,
        batch_size=BATCH,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        ema=EMA,
        null_cond=null,
        drop_cond=DROP,
        chunk=1,
    )
    return fitted.ema_params


def train(folder: Path, seed: int, vae_steps: int, num_steps: int):
    """Train everything and write the folder."""
    (images, labels), _ = splits()
    size = write_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    scheduler = Scheduler(SCHEDULER)
    key_vae, key_denoiser = jax.random.split(jax.random.key(seed))

    x = jnp.asarray(pictures(images))
    vae = train_autoencoder(key_vae, x, vae_steps)
    latents = module_from_config(VAE).apply({"params": vae}, x, method="encode")[0]
    factor = float(1 / latents.std())

    prompts = [PROMPTS[10 * style + label] for style in range(len(STYLES)) for label in labels]
    ids, (null,) = jnp.asarray(tokenizer(prompts)), jnp.asarray(tokenizer([""]))
    both = train_denoiser(key_denoiser, factor * latents, ids, null, scheduler, size, num_steps)

    configs = {
        "vae": VAE | {"scaling_factor": factor},
        "text_encoder": TEXT | {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1},
        "unet": UNET,
    }
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), {"vae": vae, **both})
    modules = {name: module_from_config(raw) for name, raw in configs.items()}
    Pipeline(modules, configs, scheduler, {"text_encoder": tokenizer}, {}).export(folder, params)


# --- what came out ---


def sample(pipeline, params, prompts, *, seed: int = 0, guidance_scale: float = 2.0, num_steps: int = 50):
    """Unguided grey pictures of prompts, [n, 8, 8, 1]."""
    null = pipeline.encode_prompts(params, "", negative=True)
    x = guided_sample(
        params,
        jax.random.key(seed),
        None,
        model=pipeline.model(guidance_scale=guidance_scale, null_cond=null),
        num_samples=len(prompts),
        cond=pipeline.encode_prompts(params, prompts),
        times=pipeline.times(num_steps),
    ).x
    return grey(pipeline.decode(params, x))


def evaluate(folder: Path, seed: int = 0, n: int = 200) -> dict[str, float]:
    """What the module's docstring lists."""
    pipeline, params = load(folder, param_dtype=jnp.float32)
    (train_images, train_labels), (held_out, held_out_labels) = splits()
    back = pipeline.decode(params, pipeline.encode_images(params, pictures(held_out)))
    found = {"reconstruction": float(np.sqrt(np.mean((grey(back) - grey(pictures(held_out))) ** 2)))}
    labels = np.arange(n) % 10
    rows = np.random.default_rng(seed).permutation(len(train_images))[:n]
    for k, (name, style) in enumerate(STYLES.items()):
        name = name or "plain"
        x = sample(pipeline, params, [PROMPTS[10 * k + label] for label in labels], seed=seed + k)
        seen, fresh = style(train_images), style(held_out)
        nearest = np.argmin(((x[:, None] - seen[None]) ** 2).sum((2, 3, 4)), axis=1)
        found[f"{name}: agreement"] = float((train_labels[nearest] == labels).mean())
        found[f"{name}: energy"] = float(energy_distance(x, fresh))
        found[f"{name}: energy of training digits"] = float(energy_distance(seen[rows], fresh))
        found[f"{name}: nearest"] = float(nearest_ratio(x, seen, fresh))
    nearest = np.argmin(((held_out[:, None] - train_images[None]) ** 2).sum((2, 3, 4)), axis=1)
    found["agreement of held-out digits"] = float((train_labels[nearest] == held_out_labels).mean())
    return found


def provenance(seed: int, vae_steps: int, steps: int) -> dict[str, str]:
    return training_origin(
        __file__,
        script="examples/train_latent_digits.py",
        seed=seed,
        steps=f"autoencoder {vae_steps}, text encoder and U-Net {steps}",
        data="first 1200 of numpy.random.RandomState(0).permutation(1797) of scikit-learn's digits, four styles",
        license="Apache-2.0; of the digits, see mmdjax/digits/NOTICE",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, minibatches and noise (default: 0)")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS, help="of the autoencoder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the rest (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write (default: the shipped one)")
    parser.add_argument("--evaluate", action="store_true", help="train nothing: measure the model at --out")
    args = parser.parse_args()
    if not args.evaluate:
        start, origin = time.perf_counter(), provenance(args.seed, args.vae_steps, args.steps)
        train(args.out, args.seed, args.vae_steps, args.steps)
        told = origin | {"seconds": f"{time.perf_counter() - start:.0f}"}
        (args.out / "provenance.json").write_text(json.dumps(told, indent=2) + "\n")
    for name, value in evaluate(args.out).items():
        print(f"{name:40} {value:.4f}")


if __name__ == "__main__":
    main()
