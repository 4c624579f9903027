"""Let T1 count for a share of what training gave it; what a model finds in FLAIR alone stays.

    python tools/scale_t1.py MODEL -o WEAKER --share 0.5

For models whose way in of T1 was trained alone: with 0 a T1 changes nothing, with 1 it counts as
trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from wmh_lora.models.model_edits import scale_t1


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--share", type=float, required=True)
    given = parser.parse_args()
    scale_t1(given.model, given.output, given.share, overwrite=True)


if __name__ == "__main__":
    main()
