"""Give a model that was trained on without T1 the way in of T1 that an earlier state of it has.

    python tools/carry_t1.py MODEL --t1-of EARLIER -o MODEL-T1

What the model finds in FLAIR alone stays; what a T1 adds must be measured anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from wmh_lora.models.model_edits import carry_t1


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--t1-of", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    carry_t1(given.model, given.t1_of, given.output, overwrite=True)


if __name__ == "__main__":
    main()
