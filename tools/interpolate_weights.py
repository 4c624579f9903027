"""Put a model's weights between two states of it.

    python tools/interpolate_weights.py MODEL LATER -o BETWEEN --share 0.5

LATER is MODEL trained on. Settings, and the way in of a T1, are those of MODEL; the version of
preprocessing is LATER's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from wmh_lora.models.model_edits import interpolate_weights


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("later", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--share", type=float, required=True)
    given = parser.parse_args()
    interpolate_weights(given.model, given.later, given.output, given.share, overwrite=True)


if __name__ == "__main__":
    main()
