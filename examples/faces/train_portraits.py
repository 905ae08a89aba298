"""Train the latent diffusion model of drawn portraits in examples/portraits: Stable Diffusion's parts, small.

    python examples/faces/write_portraits.py --training out/portraits    # draws what it learns from, once
    python examples/faces/train_portraits.py                                   # 75 minutes on one CPU core
    python examples/faces/train_portraits.py --evaluate                        # the shipped weights

Training writes checkpoints to out/portraits; the same command, repeated, goes on from the last one as if it had not
been interrupted. On a CPU `XLA_FLAGS=--xla_cpu_multi_thread_eigen=false` is faster where there is one core.

The folder has diffusers' layout, so that `mmdjax.sd.load` and `StableDiffusionPipeline.from_pretrained` both read it:

  tokenizer     byte pairs learnt from the prompts, in CLIP's files
  text_encoder  CLIP's architecture
  vae           autoencoder of 64 × 64 pictures (RGB) to latents 16 × 16 × 4
  unet          attends to the prompt at 8 × 8 and 4 × 4, predicts v, on the squared cosine schedule

Prompts are like "a smiling person with a red bun and a full beard, dark skin, blue clothes", or part of that. No
portrait of training wears glasses or sunglasses; the words are in the vocabulary but in no prompt of training.

Measured:
  reconstruction  RMS error of held-out portraits there and back, of a range of 2
  energy          energy distance (U) to held-out portraits in latents, of unguided samples of their prompts; the same
                  of as many training portraits
  nearest         mean distance to the nearest training portrait over that of held-out ones, in latents; well below 1 is
                  memorisation
  guided          energy distance to held-out portraits with sunglasses, of samples without guidance and with the
                  default guidance by 100 others
"""

import argparse
import functools
import json
import os
import time
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from drawn_portraits import PARTS, TABLES, describe, read_sheet

from mmdjax import DiffusionModel, MMDGuidance, from_model, guided_sample
from mmdjax.metrics import energy_distance, nearest_ratio
from mmdjax.plots import image_grid
from mmdjax.provenance import training_origin
from mmdjax.schedules import DiscreteTime
from mmdjax.sd import Pipeline, load, module_from_config
from mmdjax.sd.networks import primitives
from mmdjax.sd.scheduler import Scheduler
from mmdjax.sd.text.tokenizer import load_tokenizer
from mmdjax.sd.tiny import write_vocabulary
from mmdjax.training import denoising_loss

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER, WORK = ROOT / "examples" / "portraits", ROOT / "out" / "portraits"
RESULTS = ROOT / "benchmarks" / "results"
LENGTH = 32  # tokens of a prompt, with start and end

PIXEL_STD = 0.07  # of the autoencoder's Gaussian on pixels: what of a picture is noise
VAE_STEPS, VAE_BATCH, VAE_RATE = 1200, 8, 2e-3
STEPS, BATCH, RATE, EMA = 3400, 16, 1e-3, 0.998
WARMUP, DECAY = 100, 0.4  # steps of rising learning rate; share of the steps in which it falls to zero
DROP_PART, DROP_ALL = 0.7, 0.15  # how often a prompt leaves out a part, at most, and how often it is empty
VARIANTS = 8  # prompts of each portrait
SAVE_SECONDS = 180.0

VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "block_out_channels": [48, 64, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": 4,
    "cross_attention_dim": 96,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "projection_dim": 96,
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
PROMPTS = (
    "a smiling person with a brown bun and a full beard, tan skin, yellow clothes",
    "a smiling person with a red bun, pale skin, blue clothes",
    "an angry person with a black afro, dark skin, green clothes",
    "a sad person with no hair, light skin, pink clothes",
    "a grinning person with long black hair, brown skin, red clothes",
    "a laughing person with a pink mohawk, light skin, turquoise clothes",
    "a talking person with curly blond hair, pale skin, orange clothes",
    "a serious person with short grey hair and a moustache, tan skin, blue clothes",
    "a loving person with long curly black hair, brown skin, yellow clothes",
    "a worried person with a high black flat top, dark skin, pink clothes",
    "a tired person with thin grey hair and a long beard, pale skin, green clothes",
    "a calm person with red hair tied back, light skin, turquoise clothes",
    "a cheeky person with a blond quiff, tan skin, red clothes",
    "a suspicious person with small black buns, dark skin, orange clothes",
    "a determined person with black knots and a goatee, brown skin, blue clothes",
    "a smiling person with a black bun with a headband, tan skin, pink clothes",
    "a person with a full beard",
    "a person with a curled moustache",
    "a smiling person",
    "an angry person",
    "a person with a grey bun",
    "a person with a black bob",
    "a person, dark skin",
    "a person, green clothes",
)


# --- a training loop that can be interrupted ---


def train_loop(name, key, params, loss, num_steps, *, rate, ema=0.0, folder=WORK):
    """Adam on loss(params, key) for so many steps: (averaged parameters, losses [num_steps]).

    Step k draws from fold_in(key, k). The learning rate rises for `WARMUP` steps, stays, and falls to zero in the last
    `DECAY` of them. folder/name.msgpack is written whole every `SAVE_SECONDS` and at the end, and read at the start; a
    longer run goes on from the end of a shorter one.
    """
    import optax
    from tqdm.auto import tqdm

    fall = int(DECAY * num_steps)
    pieces = (
        optax.linear_schedule(0.0, rate, WARMUP),
        optax.constant_schedule(rate),
        optax.cosine_decay_schedule(rate, fall),
    )
    schedule = optax.join_schedules(pieces, (WARMUP, num_steps - fall))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_learning_rate(1.0))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry, k):
        params, average, state = carry
        value, gradient = jax.value_and_grad(loss)(params, jax.random.fold_in(key, k))
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda leaf: schedule(k) * leaf, updates))
        return (params, optax.incremental_update(params, average, 1 - ema), state), value

    params = jax.tree.map(jnp.asarray, params)
    saved = {"carry": (params, jax.tree.map(jnp.copy, params), optimizer.init(params)), "losses": np.zeros(0)}
    path = folder / f"{name}.msgpack"
    if path.exists():
        saved = flax.serialization.from_bytes(saved, path.read_bytes())
    carry, losses = jax.tree.map(jnp.asarray, saved["carry"]), list(saved["losses"])

    def save():
        partial = path.with_suffix(".part")
        partial.write_bytes(flax.serialization.to_bytes({"carry": carry, "losses": np.asarray(losses)}))
        os.replace(partial, path)

    last = time.monotonic()
    with tqdm(total=num_steps, initial=len(losses), desc=name, mininterval=20, miniters=1) as bar:
        while len(losses) < num_steps:
            carry, value = step(carry, len(losses))
            losses.append(float(value))
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {len(losses) - 1}")
            if time.monotonic() - last > SAVE_SECONDS or len(losses) == num_steps:
                save()
                last = time.monotonic()
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
            bar.update()
    return carry[1], np.asarray(losses)


# --- the networks ---


def train_autoencoder(key, images, num_steps: int, folder: Path):
    """The parameters of the autoencoder with the least  ‖x − x̂‖²/2s² + KL(q(z | x) ‖ N(0, 1)),  s = `PIXEL_STD`."""
    module = module_from_config(VAE)
    key_init, key_steps = jax.random.split(key)
    params = module.init(key_init, jnp.zeros((1, 64, 64, 3)))["params"]

    def loss(params, key):
        key_rows, key_z = jax.random.split(key)
        x = images[jax.random.randint(key_rows, (VAE_BATCH,), 0, len(images))] / 127.5 - 1
        mean, logvar = module.apply({"params": params}, x, method="encode")
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key_z, mean.shape)
        decoded = module.apply({"params": params}, z, method="decode")
        kl = 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1 - logvar)
        return (jnp.sum((x - decoded) ** 2) / (2 * PIXEL_STD**2) + kl) / len(x)

    return train_loop("vae", key_steps, params, loss, num_steps, rate=VAE_RATE, folder=folder)


def encode_all(vae, images, batch_size: int = 100):
    """The posterior means of pictures, some at a time: [n, 16, 16, 4]."""
    module = module_from_config(VAE)
    encode = jax.jit(lambda params, x: module.apply({"params": params}, x / 127.5 - 1, method="encode")[0])
    starts = range(0, len(images), batch_size)
    return np.concatenate([encode(vae, jnp.asarray(images[i : i + batch_size], jnp.float32)) for i in starts])


def random_prompts(portraits, rng) -> list[str]:
    """A prompt of each portrait that leaves out some parts, of some portraits more than of others."""
    share = rng.uniform(0, DROP_PART, len(portraits.images))
    kept = rng.random((len(share), len(PARTS))) >= share[:, None]
    rows = zip(*(portraits.attributes[name] for name in TABLES), strict=True)
    return [
        describe(dict(zip(TABLES, row, strict=True)), [part for part, keep in zip(PARTS, keeps, strict=True) if keep])
        for row, keeps in zip(rows, kept, strict=True)
    ]


def write_tokenizer(folder: Path) -> int:
    """A vocabulary of CLIP's kind in which every word of the prompts is one token; how many tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    prompts = [prompt for pool in ("source", "sunglasses", "glasses") for prompt in read_sheet(pool).prompts()]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(prompts, trainer)
    merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return write_vocabulary(folder, merges=merges, length=LENGTH)


def train_denoiser(key, latents, ids, null, scheduler: Scheduler, vocab_size: int, num_steps: int, folder: Path):
    """The averaged parameters of the text encoder and the U-Net, trained together on the denoising loss; its values.

    ids are [n, variants, tokens]: a portrait's prompt is one of its variants, drawn anew each time.
    """
    text = module_from_config(TEXT | {"vocab_size": vocab_size, "eos_token_id": vocab_size - 1})
    unet = module_from_config(UNET)

    def apply(params, x, t, ids):
        context = text.apply({"params": params["text_encoder"]}, ids).last
        return unet.apply({"params": params["unet"]}, x, t, context)

    key_text, key_unet, key_fit = jax.random.split(key, 3)
    context = jnp.zeros((1, LENGTH, UNET["cross_attention_dim"]))
    params = {
        "text_encoder": text.init(key_text, ids[:1, 0])["params"],
        "unet": unet.init(key_unet, latents[:1], jnp.zeros(1), context)["params"],
    }
    denoiser = from_model(apply, scheduler.prediction, DiscreteTime(scheduler.num_train_steps))
    model = DiffusionModel(denoiser, scheduler.schedule(), latents.shape[1:])

    def loss(params, key):
        key_rows, key_variants, key_loss = jax.random.split(key, 3)
        rows = jax.random.randint(key_rows, (BATCH,), 0, len(latents))
        cond = ids[rows, jax.random.randint(key_variants, (BATCH,), 0, ids.shape[1])]
        dropping = {"null_cond": null, "drop_cond": DROP_ALL}
        return denoising_loss(params, key_loss, latents[rows], cond, model=model, **dropping)

    return train_loop("denoiser", key_fit, params, loss, num_steps, rate=RATE, ema=EMA, folder=folder)


def train(folder: Path, seed: int, vae_steps: int, num_steps: int, work: Path = WORK):
    """Train everything and write the folder; the losses by network."""
    portraits = read_sheet("training", work)
    images = np.round((portraits.images + 1) * 127.5).astype(np.uint8)
    size = write_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    scheduler = Scheduler(SCHEDULER)
    key_vae, key_denoiser = jax.random.split(jax.random.key(seed))

    vae, vae_losses = train_autoencoder(key_vae, jnp.asarray(images), vae_steps, work)
    cache = work / "latents.npy"
    if not cache.exists() or cache.stat().st_mtime < (work / "vae.msgpack").stat().st_mtime:
        print("encoding", flush=True)
        np.save(cache, encode_all(vae, images))
    latents = np.load(cache)
    factor = float(1 / latents.std())

    rng = np.random.default_rng(seed)
    ids = jnp.asarray(np.stack([tokenizer(random_prompts(portraits, rng)) for _ in range(VARIANTS)], axis=1))
    (null,) = jnp.asarray(tokenizer([""]))
    latents = jnp.asarray(factor * latents)
    both, losses = train_denoiser(key_denoiser, latents, ids, null, scheduler, size, num_steps, work)

    configs = {
        "vae": VAE | {"scaling_factor": factor},
        "text_encoder": TEXT | {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1},
        "unet": UNET,
    }
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), {"vae": vae, **both})
    modules = {name: module_from_config(raw) for name, raw in configs.items()}
    Pipeline(modules, configs, scheduler, {"text_encoder": tokenizer}, {}).export(folder, params)
    return {"vae": vae_losses, "denoiser": losses}


# --- what came out ---


def sample(pipeline, params, prompts, refs=None, *, seed=0, guidance_scale=2.0, num_steps=50, guidance=None):
    """Latents of prompts, [n, 16, 16, 4], guided where there are references."""
    null = pipeline.encode_prompts(params, "", negative=True)
    return guided_sample(
        params,
        jax.random.key(seed),
        refs,
        model=pipeline.model(guidance_scale=guidance_scale, null_cond=null),
        num_samples=len(prompts),
        cond=pipeline.encode_prompts(params, prompts),
        times=pipeline.times(num_steps),
        guidance=guidance or MMDGuidance(),
    ).x


def encode(pipeline, params, images):
    return np.asarray(pipeline.encode_images(params, images, batch_size=50))


def write_samples(folder: Path, results: Path = RESULTS) -> None:
    """portraits_samples.png and portraits_empty_prompt.png: samples of `PROMPTS`, and of the empty one."""
    pipeline, params = load(folder, param_dtype=jnp.float32)
    for name, prompts in (("samples", PROMPTS), ("empty_prompt", [""] * 24)):
        images = pipeline.decode(params, sample(pipeline, params, prompts, guidance_scale=3.0 if prompts[0] else 1.0))
        sheet = image_grid(images, columns=8, margin=0)
        sheet.resize((2 * sheet.width, 2 * sheet.height)).save(results / f"portraits_{name}.png", optimize=True)


def evaluate(folder: Path, work: Path = WORK, seed: int = 0, n: int = 200) -> dict[str, float]:
    """What the module's docstring lists; without the training sheet, not what needs it."""
    pipeline, params = load(folder, param_dtype=jnp.float32)
    source, sunglasses = read_sheet("source"), read_sheet("sunglasses")
    prompts = source.prompts()[:n]  # of the first n; all distances are to the others
    held_out = encode(pipeline, params, source.images[n:])
    back = np.asarray(pipeline.decode(params, held_out[:n]))
    found = {"reconstruction": float(np.sqrt(np.mean((back - source.images[n : 2 * n]) ** 2)))}
    x = {scale: sample(pipeline, params, prompts, seed=seed, guidance_scale=scale) for scale in (1.0, 2.0)}
    for scale, latents in x.items():
        found[f"energy at prompt scale {scale:g}"] = float(energy_distance(latents, held_out, estimator="u"))
    if (work / "training.png").exists():
        seen = read_sheet("training", work)[: 4 * n]
        seen = encode(pipeline, params, seen.images)
        found["energy of training portraits"] = float(energy_distance(seen[:n], held_out, estimator="u"))
        found["nearest"] = float(nearest_ratio(x[2.0], seen, held_out[:n]))
    found["energy of other held-out portraits"] = float(
        energy_distance(encode(pipeline, params, source.images[:n]), held_out, estimator="u")
    )
    refs = encode(pipeline, params, sunglasses.images[:100])
    fresh = encode(pipeline, params, sunglasses.images[100:500])
    for name, by in (("unguided", None), ("guided", refs)):
        latents = sample(pipeline, params, prompts[:64], by, seed=seed)
        found[f"sunglasses: energy, {name}"] = float(energy_distance(latents, fresh, estimator="u"))
    found["sunglasses: energy of the references"] = float(energy_distance(refs, fresh, estimator="u"))
    return found


def provenance(seed: int, vae_steps: int, steps: int) -> dict[str, str]:
    return training_origin(
        __file__,
        script="examples/faces/train_portraits.py",
        seed=seed,
        steps=f"autoencoder {vae_steps}, text encoder and U-Net {steps}",
        data="20,000 portraits that examples/faces/write_portraits.py --training draws; none with glasses",
        license="Apache-2.0; of the portraits, see examples/faces/portraits/NOTICE",
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
        primitives.FEW_POSITIONS = 0  # the gradients of XLA's own convolutions are faster than those of patches
        losses = train(args.out, args.seed, args.vae_steps, args.steps)
        told = provenance(args.seed, args.vae_steps, args.steps)
        (args.out / "provenance.json").write_text(json.dumps(told, indent=2) + "\n")
        curves = {name: np.asarray(values)[: len(values) // 50 * 50] for name, values in losses.items()}
        means = {name: [round(float(v), 5) for v in c.reshape(-1, 50).mean(1)] for name, c in curves.items()}
        write_samples(args.out)
    found = evaluate(args.out)
    for name, value in found.items():
        print(f"{name:40} {value:.4f}", flush=True)
    if not args.evaluate:
        told |= {"measured": found, "loss, means of 50 steps": means}
        (RESULTS / "portraits_training.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
