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
from typing import Any

import jax
import numpy as np
from provenance import provenance
from tasks import NUM_REFS, NUM_SAMPLES, NUM_STEPS, Task, digits_mixture, digits_thick, ring

from mmdjax import MMDGuidance, guided_sample
from mmdjax.metrics import energy_distance, nearest_ratio

ALPHAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


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
