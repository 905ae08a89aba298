"""Alignment: how close guided samples come to the target, against the authors' rule at its best α.

For each task: 100 references, 200 samples, 50 network calls; energy distance (U-statistic) to fresh target samples and
the nearest-reference ratio (below 1: closer to the references than fresh data is), mean over seeds. `MMDGuidance()` is
untouched; the authors' rule (joint-batch form) takes the best of seven α per task, chosen on the very seeds that it is
reported on.

    python benchmarks/alignment.py [--quick]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from provenance import provenance

from mmdjax import DiffusionModel, MMDGuidance, Particles, guided_sample, load_digits
from mmdjax.digits import splits, thicken
from mmdjax.metrics import energy_distance, nearest_ratio
from mmdjax.schedules import VPLinear

ALPHAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
NUM_REFS, NUM_SAMPLES, NUM_STEPS = 100, 200, 50


class Task(NamedTuple):
    """A prior and a target: `draw(seed)` gives (references, fresh samples, more fresh samples to compare them with)."""

    name: str
    model: DiffusionModel
    params: Any
    draw: Callable[[int], tuple[Any, Any, Any]]


def ring() -> Task:
    """8 Gaussians on a circle of radius 4, std .35, to three of them with weights .4, .3, .3."""
    angles = 2 * np.pi * np.arange(8) / 8
    means, std = 4 * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32), 0.35

    def exact(params, x, level, cond):
        variance = (level.alpha * std) ** 2 + level.sigma**2
        offset = x[:, None] - level.alpha * means
        weight = jax.nn.softmax(-jnp.sum(offset**2, -1) / (2 * variance), axis=1)
        return jnp.einsum("nk,nkd->nd", weight, means + level.alpha * std**2 / variance * offset)

    def draw(seed):
        rng = np.random.default_rng(seed)
        mode = np.array([0, 2, 5])[rng.choice(3, size=NUM_REFS + NUM_SAMPLES + 2000, p=[0.4, 0.3, 0.3])]
        points = means[mode] + std * rng.normal(size=(len(mode), 2)).astype(np.float32)
        return points[:NUM_REFS], points[NUM_REFS : NUM_REFS + NUM_SAMPLES], points[NUM_REFS + NUM_SAMPLES :]

    return Task("ring: 8 Gaussians to 3", DiffusionModel(exact, VPLinear(), (2,)), None, draw)


def digits_thick() -> Task:
    """Held-out digits with thickened strokes."""
    model, params = load_digits()

    def draw(seed):
        rng = np.random.default_rng(seed)
        _, (images, _) = splits()
        images = thicken(images)[rng.permutation(len(images))]
        return images[:NUM_REFS], images[NUM_REFS : NUM_REFS + NUM_SAMPLES], images[NUM_REFS + NUM_SAMPLES :]

    return Task("digits: thickened strokes", model, params, draw)


def digits_mixture() -> Task:
    """Digits of the classes 0, 3 and 6 with weights .5, .3, .2; sampling is unconditional.

    References are 50, 30 and 20 held-out images. A class has some 178 images in all, so those that are left, the
    model's training images among them, make two disjoint sets, weighted to the target's proportions: fresh samples and
    what all are compared with. Both come from one finite pool without replacement, so a perfect method's energy is a
    little below 0 here.
    """
    model, params = load_digits()
    proportions = {0: 0.5, 3: 0.3, 6: 0.2}

    def draw(seed):
        rng = np.random.default_rng(seed)
        train, held_out = splits()
        refs, fresh, rest = [], [], []
        for c, share in proportions.items():
            mine = rng.permutation(held_out[0][held_out[1] == c])
            k = round(share * NUM_REFS)
            refs.append(mine[:k])
            left = rng.permutation(np.concatenate([mine[k:], train[0][train[1] == c]]))
            fresh.append(left[: len(left) // 2])
            rest.append(left[len(left) // 2 :])

        def weighted(parts):
            weight = [np.full(len(part), p / len(part)) for part, p in zip(parts, proportions.values(), strict=True)]
            return Particles(np.concatenate(parts), weight=np.concatenate(weight).astype(np.float32))

        return np.concatenate(refs), weighted(fresh), weighted(rest)

    return Task("digits: classes 0, 3, 6", model, params, draw)


def measure(task: Task, seeds: range) -> dict[str, dict[str, list[float]]]:
    """energy and nearest-reference ratio of each method, one number a seed."""
    draws = [task.draw(seed) for seed in seeds]

    def sampled(refs, guidance, seed):
        key = jax.random.key(seed)
        return guided_sample(
            task.params, key, refs, model=task.model, num_samples=NUM_SAMPLES, num_steps=NUM_STEPS, guidance=guidance
        ).x

    methods: dict[str, Callable[[int], Any]] = {
        "fresh sample": lambda i: draws[i][1],
        "references": lambda i: draws[i][0],
        "unguided": lambda i: sampled(None, MMDGuidance(), seeds[i]),
        "MMDGuidance()": lambda i: sampled(draws[i][0], MMDGuidance(), seeds[i]),
        'MMDGuidance(at="sample")': lambda i: sampled(draws[i][0], MMDGuidance(at="sample"), seeds[i]),
    }
    for alpha in ALPHAS:
        methods[f"paper α = {alpha:g}"] = lambda i, a=alpha: sampled(draws[i][0], MMDGuidance.paper(a), seeds[i])
    table = {}
    for name, method in methods.items():
        made = [(method(i), *draws[i]) for i in range(len(seeds))]
        table[name] = {
            "energy": [float(energy_distance(x, rest)) for x, _, _, rest in made],
            "ratio": [float(nearest_ratio(x, refs, rest)) for x, refs, _, rest in made],
        }
    return table


def markdown(results: dict[str, Any]) -> str:
    """The README's table from the JSON's "tasks": energy ± standard error (nearest-reference ratio)."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    names = [name for name in next(iter(results.values())) if not name.startswith("paper")]

    def cell(row):
        error = np.std(row["energy"], ddof=1) / np.sqrt(len(row["energy"]))
        return f"{np.mean(row['energy']):.3f} ± {error:.3f} ({np.mean(row['ratio']):.2f})"

    for name in names:
        label = f"**`{name}`**" if name.startswith("MMDGuidance") else name
        lines.append(f"| {label} | " + " | ".join(cell(table[name]) for table in results.values()) + " |")
    best = [table[best_alpha(table)] for table in results.values()]
    lines.append("| the authors' rule, best α of seven | " + " | ".join(map(cell, best)) + " |")
    return "\n".join(lines)


def best_alpha(table: dict[str, dict[str, list[float]]]) -> str:
    """The authors' rule at the α with the smallest mean energy."""
    return min((name for name in table if name.startswith("paper")), key=lambda name: np.mean(table[name]["energy"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "alignment.json")
    args = parser.parse_args()
    seeds = range(1 if args.quick else args.seeds)

    results = {}
    for task in (ring(), digits_mixture(), digits_thick()):
        table = results[task.name] = measure(task, seeds)
        print(f"\n{task.name}\n{'':28}{'energy':>10}{'± s.e.':>10}{'nearest ratio':>16}")
        best = best_alpha(table)
        for name, row in table.items():
            if name.startswith("paper") and name != best:
                continue
            error = np.std(row["energy"], ddof=1) / np.sqrt(len(seeds)) if len(seeds) > 1 else float("nan")
            label = f"authors' rule, best {name[6:]}" if name == best else name
            print(f"{label:28}{np.mean(row['energy']):10.4f}{error:10.4f}{np.mean(row['ratio']):16.2f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"references": NUM_REFS, "samples": NUM_SAMPLES, "steps": NUM_STEPS, "seeds": list(seeds)}
    args.out.write_text(json.dumps({**provenance(), **settings, "tasks": results}, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{args.out}")


if __name__ == "__main__":
    main()
