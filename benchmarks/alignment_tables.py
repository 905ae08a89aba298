"""The tables of benchmarks/README.md, from results/alignment.json."""

from typing import Any

import numpy as np
from common import table
from methods import DEFAULT, RULE, TUNED
from scores import COPIES
from targets import FIELD_NAME, FIELD_REFS, OTHER_REFS, REFS_NAME, Target
from task import NUM_REFS

SHOWN = {
    "fresh sample": "fresh sample",
    "unguided": "unguided",
    RULE: "the authors' rule, tuned",
    TUNED: "fine-tuning, tuned",
    DEFAULT: f"**`{DEFAULT}`**",
}

SHARES = ("precision", "recall", "ratio")


def error(values: Any) -> float:
    """The standard error of a mean."""
    return np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan


def share_left(record: dict[str, Any], name: str) -> np.ndarray:
    """The share of the unguided excess that a method leaves, one number a seed."""
    excess = {key: np.array(record["methods"][key]["energy"]) - record["fresh_energy"] for key in (name, "unguided")}
    return excess[name] / excess["unguided"].mean()


def tables(results: dict[str, Any]) -> list[str]:
    """The tables of benchmarks/README.md: energies, shares, faces, few references, thresholds."""
    as_it_is = {task: record for task, record in results["tasks"].items() if record["as_it_is"]}
    tasks = {task: record for task, record in results["tasks"].items() if task not in as_it_is}
    names = list(dict.fromkeys(name for record in tasks.values() for name in record["methods"]))
    shown = [name for name in SHOWN if name in names]

    def share(record, name):
        if name not in record["methods"]:
            return ""
        left = 100 * share_left(record, name)
        copies = "†" if np.mean(record["methods"][name]["ratio"]) < COPIES else ""
        return f"{left.mean():.1f} ± {error(left):.1f}{copies}"

    found = [
        table(
            ["", *(SHOWN[name] for name in shown)],
            [[task, *(_energy(record["methods"].get(name)) for name in shown)] for task, record in tasks.items()],
        ),
        table(
            ["%", *tasks],
            [[name, *(share(record, name) for record in tasks.values())] for name in names if name != "unguided"],
        ),
    ]
    found += [attribute_table(tasks), number_table(results["tasks"]), as_it_is_table(as_it_is)]
    if results.get("targets"):
        found.append(target_table([Target(**row) for row in results["targets"]]))
    return found


def attribute_table(tasks: dict[str, Any]) -> str:
    """What samples show, where a classifier reads it: one row a task and method."""
    columns = {"share": "{:.0%}", "tv": "{:.2f}", "identity": "{:.2f}", "kid": "{:.0f}"}
    columns |= dict.fromkeys(SHARES, "{:.2f}")
    rows = []
    for task, record in tasks.items():
        if {"share", "identity"} & record["methods"][DEFAULT].keys():
            for name, row in record["methods"].items():
                cells = [form.format(np.mean(row[c])) if c in row else "" for c, form in columns.items()]
                rows.append([task, SHOWN.get(name, name), *cells])
    return table(["task", "method", "share with it", "TV of colours", "TV of the rest", "KID", *SHARES], rows)


def number_table(tasks: dict[str, Any]) -> str:
    """20 to 300 references: energy, in brackets the ratio, and the share with the attribute."""
    numbers = sorted((NUM_REFS, *OTHER_REFS))
    names = [*map(FIELD_NAME.format, FIELD_REFS), *map(REFS_NAME.format, numbers)]
    rows = []
    for task, record in tasks.items():
        found = record["variations"] | {REFS_NAME.format(NUM_REFS): record["methods"][DEFAULT]}
        cells = [_energy(found.get(name)) + _share(found.get(name)) for name in names]
        rows.append([task, _energy(record["methods"]["unguided"]), *cells])
    return table(["", "unguided", *names], rows)


def as_it_is_table(tasks: dict[str, Any]) -> str:
    """Energy of each method where the target is the model's own distribution, or near it."""
    names = list(dict.fromkeys(name for record in tasks.values() for name in record["methods"] if name != "references"))
    rows = [[task, *(_energy(record["methods"].get(name)) for name in names)] for task, record in tasks.items()]
    return table(["", *(SHOWN.get(name, name) for name in names)], rows)


def _share(row):
    return f" {np.mean(row['share']):.0%}" if row and "share" in row else ""


def _energy(row):
    return f"{np.mean(row['energy']):.3f} ± {error(row['energy']):.3f} ({np.mean(row['ratio']):.2f})" if row else "–"


def target_table(rows: list[Target]) -> str:
    """One row a quantity and task."""
    return table(
        ["quantity", "task", "measured", "must", "goal", "met"],
        [[row.name, row.task, row.measured, row.must, row.goal, row.met] for row in rows],
    )
