"""Pictures of a task: references, unguided, the authors' rule and the default."""

from pathlib import Path
from typing import Any

import numpy as np
from common import as_particles
from methods import DEFAULT, RULE, methods
from scores import judge
from task import Task

from mmdjax.plots import save_labelled_grids

SHOWN = {"references": "references", "unguided": "unguided", RULE: "the authors' rule", DEFAULT: DEFAULT}
NUM_IMAGES = 40


def picture(path: Path, task: Task, record: dict[str, Any], seed: int) -> None:
    """Write one for samples in the plane or images; for others there is none."""
    if len(task.model.shape) != 3 and task.model.shape != (2,):
        return
    shown = task.show or (lambda x: x)
    ways = methods(task)
    panels = {}
    for name, title in SHOWN.items():
        setting = ways[name].settings[record["methods"][name].get("setting", "")]
        panels[title] = np.asarray(shown(as_particles(ways[name].run(task, seed, setting)).x))
    if task.model.shape == (2,):
        _scatter(path, panels, np.asarray(as_particles(judge(task, seed).draw.rest).x))
    else:
        rng = np.random.default_rng(0)
        some = {title: x[np.sort(rng.permutation(len(x))[:NUM_IMAGES])] for title, x in panels.items()}
        width = next(iter(some.values())).shape[2]
        save_labelled_grids(path, some, scale=max(1, 48 // width))


def _scatter(path, panels, target):
    from matplotlib.figure import Figure

    low, high = (bound(np.concatenate([target, *panels.values()]), 0) for bound in (np.min, np.max))
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    figure = Figure(figsize=(3 * len(panels), 3 * (high - low)[1] / (high - low)[0] + 0.3), layout="constrained")
    for axes, (title, x) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.scatter(*target.T, s=2, color="0.85", linewidths=0)
        axes.scatter(*x.T, s=5, color="tab:blue", linewidths=0)
        axes.set(title=title, aspect="equal", xticks=[], yticks=[], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    figure.savefig(path, dpi=80)
