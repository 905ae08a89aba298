"""What `import mmdjax` costs beyond `import jax`: each in fresh interpreters, alternating, the median of several.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import write_json

from mmdjax.provenance import provenance


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main():
    pairs = [(seconds("import jax"), seconds("import mmdjax")) for _ in range(7)]
    jax_alone, with_mmdjax = (statistics.median(column) for column in zip(*pairs, strict=True))
    extra = statistics.median(b - a for a, b in pairs)
    print(f"import jax {jax_alone:.2f} s, import mmdjax {with_mmdjax:.2f} s, beyond jax {extra:.2f} s (at most 1)")
    out = Path(__file__).parent / "results" / "import_time.json"
    seconds_of = {"jax": jax_alone, "mmdjax": with_mmdjax, "beyond_jax": extra}
    write_json(out, {**provenance(), "seconds": seconds_of})


if __name__ == "__main__":
    main()
