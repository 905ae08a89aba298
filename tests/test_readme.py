"""The README says what was measured."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_results_are_the_benchmarks():
    """The table is that of benchmarks/results/alignment.json, and in it the untouched default is ahead on every task."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from alignment import best_alpha, markdown

    tasks = json.loads((ROOT / "benchmarks" / "results" / "alignment.json").read_text())["tasks"]
    assert markdown(tasks) in (ROOT / "README.md").read_text()
    for table in tasks.values():
        mean = {name: sum(row["energy"]) / len(row["energy"]) for name, row in table.items()}
        assert mean["MMDGuidance()"] < mean[best_alpha(table)]
