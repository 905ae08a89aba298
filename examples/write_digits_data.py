"""Write mmdjax/digits/digits.npz from scikit-learn's copy of the digits (which is not needed to use them).

python examples/write_digits_data.py
"""

import argparse
from pathlib import Path

import numpy as np

DEFAULT = Path(__file__).parent.parent / "mmdjax" / "digits" / "digits.npz"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT, help="where to write (default: %(default)s)")
    out = parser.parse_args().out

    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez_compressed(out, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))
    print(f"{out}: {len(digits.target)} images, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
