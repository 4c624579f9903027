"""How many lesions are called new or vanished where nothing has changed.

    python -m benchmarks.unchanged FLAIR.nii.gz [--model NAME|FILE] [--json FILE] [--markdown FILE]

The scan, of thin slices along its last axis, is followed as if it were two visits: cut into slices
three and five times as thick from two different starts, and as it is beside itself with noise.
Every lesion that comes or goes is false. They are counted with the rule that calls a lesion
doubtful where the other visit's probability speaks for it, and without.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.contrast import thick_scan, without_first
from benchmarks.harness import publish
from benchmarks.robustness import add_noise
from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.longitudinal.changes import Rules
from wmh_lora.longitudinal.study import Visit, compare_visits
from wmh_lora.volume import Volume

HEAD = ("pair", "at both", "new or vanished, by the masks alone", "with the rule", "doubtful")
_CHANGED = ("new", "vanished")
_MASKS_ALONE = Rules(min_evidence=1.0, min_share_with_evidence=1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args(arguments)
    engine = WMHInferenceEngine(load_model(given.model), "cpu")
    rows = []
    for name, pair in pairs(Volume.read(given.image)):
        rows.append((name, *follow_pair(engine, pair)))
        sys.stderr.write(f"{dict(zip(HEAD, rows[-1], strict=True))}\n")
    document = {
        "model": engine.model_description,
        "rows": [dict(zip(HEAD, row, strict=True)) for row in rows],
    }
    publish(document, [HEAD, *([str(v) for v in row] for row in rows)], given.json, given.markdown)


def pairs(scan: Volume) -> Iterator[tuple[str, tuple[Volume, Volume]]]:
    """Make pairs of scans that show the same head, on grids that their headers tell."""
    for count, start in ((3, 1), (5, 2)):
        later = thick_scan(without_first(scan, start), count)
        yield f"two cuts, slices {count} times as thick", (thick_scan(scan, count), later)
    yield "with noise", (scan, replace(scan, data=add_noise(scan)))


def follow_pair(
    engine: WMHInferenceEngine, pair: tuple[Volume, Volume]
) -> tuple[int, int, int, int]:
    """Count lesions seen at both visits, those that changed by masks and by the rule, and doubt."""
    visits = [Visit.of(name, engine.segment(scan)) for name, scan in zip("ab", pair, strict=True)]
    masks, ruled = (
        Counter(
            lesion.changes[0].kind
            for lesion in compare_visits(visits, rules=rules, register=False).lesions
        )
        for rules in (_MASKS_ALONE, Rules())
    )
    both = sum(ruled[kind] for kind in ("stable", "grown", "shrunk"))
    return (
        both,
        sum(masks[kind] for kind in _CHANGED),
        sum(ruled[kind] for kind in _CHANGED),
        ruled["doubtful"],
    )


if __name__ == "__main__":
    main()
