"""Put a trained model into the package: half precision, a name, and what its card says.

    python tools/package_model.py RUN/last.safetensors NAME --command TEXT --data TEXT
        [--metric KEY=VALUE ...] [--set SETTING=VALUE ...] [-o FILE]

``--set`` changes settings of inference, such as ``threshold=0.5`` or ``planes=all``; ``-o`` writes
another file than the package's own.

Figures are given by hand: they must be those that the commands of the model card print.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from wmh_lora.config import InferenceConfig
from wmh_lora.config_reading import from_dict, to_dict
from wmh_lora.models.model_file import read_model_card, rewrite_card
from wmh_lora.training.settings import apply_overrides

ASSETS = Path(__file__).parents[1] / "src" / "wmh_lora" / "assets"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("name")
    parser.add_argument("--command", required=True, help="How it was trained.")
    parser.add_argument("--data", required=True, help="What it was trained on, with licences.")
    parser.add_argument("--metric", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    card = read_model_card(given.model)
    table = apply_overrides(
        {"inference": to_dict(card.inference)}, [f"inference.{s}" for s in given.settings]
    )
    card = replace(card, inference=from_dict(InferenceConfig, table["inference"]))
    pairs = (pair.split("=", 1) for pair in given.metric)
    card = replace(
        card,
        name=given.name,
        licence="MIT",
        training={**card.training, "command": given.command, "data": given.data},
        metrics={key: float(value) for key, value in pairs},
    )
    target = given.output or ASSETS / f"{given.name}.safetensors"
    rewrite_card(given.model, card, target=target, overwrite=True, half=True)


if __name__ == "__main__":
    main()
