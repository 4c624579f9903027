"""How long whole scans take, beside the published way and a 3-D U-Net; and how much memory.

    python -m benchmarks.inference [--quick] [--json FILE] [--markdown FILE]
    python -m benchmarks.inference --activations

*Parts.* One slice in one view through each two-dimensional network, and one patch through the
three-dimensional one, run in turns; random weights, float32 unless it says ``auto``. The time of a
scan is that times the slices, views and patches it takes, which a table lists. That the published
way is linear in slices is measured beside it.

*Published way.* ViT-B of transformers with eager attention and unmerged adapters, every slice of
the volume stretched to 512 x 512, views one after another. *Exact steps* is our network on the same
pictures with the same weights; the largest difference of probabilities is given. *Ours* is the
network on its own grid: head window, slices with a head. *Approximate steps* adds ``adaptive`` with
the slices that the phantom's lesions would have seen again, and ``auto`` precision.

*Whole commands.* Fresh processes from start to saved files, on the untrained models of
``wmh-lora models init``: wall time, time to the first slice, peak memory, and their growth.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.harness import (
    _peak_rss_mb,
    machine,
    matmul_gflops_per_s,
    peak_memory_mb,
    publish,
    report_peak_memory,
    result_of_process,
    time_in_turns,
)
from benchmarks.inference_networks import (
    dynunet,
    head_scan,
    our_network,
    published_and_merged,
    stretched,
)
from wmh_lora.engine_device import NetworkOnDevice, choose_dtype
from wmh_lora.engine_views import VIEWS, slices_with_evidence
from wmh_lora.models.allocator import keep_freed_memory
from wmh_lora.models.init import init_model
from wmh_lora.models.presets import model_preset
from wmh_lora.preprocess import context_stack, preprocess
from wmh_lora.volume import Volume, write_nifti

CPU = torch.device("cpu")
ENCODERS = ("medsam-vit-b", "litemedsam", "compact")
LESION_LEVEL = 0.6  # of the phantom's intensities; white matter is at 0.4


@dataclass(frozen=True)
class Size:
    """A volume to be timed."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    @property
    def name(self) -> str:
        """Shape as it is written."""
        return "x".join(map(str, self.shape))


SIZES = (Size((256, 256, 40), (0.9, 0.9, 4.0)), Size((182, 218, 182), (1.0, 1.0, 1.0)))
QUICK_SIZES = (Size((96, 112, 10), (2.2, 2.2, 14.0)),)


def _counts(scan: Volume, encoder: str) -> dict[str, int]:
    """Slices that the engine shows its network, with and without approximate steps."""
    prepared = preprocess(scan, model_preset(encoder)[1])
    lesion = (prepared.slices > LESION_LEVEL).astype(np.float32)
    again = slices_with_evidence(lesion, prepared.context_offset)
    shown = prepared.shows_head
    assert shown is not None
    height, width = prepared.slices.shape[1:]
    return {
        "slices": len(prepared.slices),
        "shown": int(shown.sum()),
        "again": int((again & shown).sum()),
        "height": height,
        "width": width,
    }


def _look(encoder: str, scan: Volume, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that shows one slice to one of our networks."""
    prepared = preprocess(scan, model_preset(encoder)[1])
    network = NetworkOnDevice(our_network(encoder), ("wmh",), CPU)
    slices = context_stack(prepared, [len(prepared.slices) // 2], 3)
    return lambda: network.see(slices, (0, False), dtype)


def measure_parts(size: Size, side: int, turns: int) -> dict[str, Any]:
    """Time one slice or patch of each contestant, in turns."""
    scan = head_scan(size.shape, size.spacing_mm)
    published, merged = published_and_merged(side)
    plane = torch.from_numpy(scan.data[:, :, size.shape[2] // 2].copy()) / 600.0
    runs: dict[str, Callable[[], object]] = {
        "published": (reference := stretched(published, plane, side)),
        "exact": (ours := stretched(merged, plane, side)),
    }
    difference = float((reference() - ours()).abs().max())
    for encoder in ENCODERS:
        runs[encoder] = _look(encoder, scan, torch.float32)
        runs[f"{encoder} auto"] = _look(encoder, scan, choose_dtype(CPU, "auto"))
    unet, patch, patches = dynunet(size.shape, size.spacing_mm)
    cube = torch.zeros(1, 1, *patch)

    def one_patch() -> object:
        with torch.inference_mode():
            return unet(cube)

    runs["unet"] = one_patch
    timings = time_in_turns(runs, turns)
    three = time_in_turns({"three": lambda: [reference() for _ in range(3)]}, 1, 0)
    return {
        "seconds": {name: list(times) for name, times in timings.seconds.items()},
        "largest_difference": difference,
        "three_slices_over_one": three.median_s("three") / timings.median_s("published"),
        "patch": patch,
        "patches": patches,
        "counts": {encoder: _counts(scan, encoder) for encoder in ENCODERS},
    }


def scan_rows(size: Size, parts: dict[str, Any], tta: str) -> list[dict[str, Any]]:
    """Scale the parts to a whole scan; ratios are medians of those within turns."""
    views = len(VIEWS[tta])  # type: ignore[index]
    every = size.shape[2] * views
    work = {"published": every, "exact": every, "unet": parts["patches"] * views}
    for encoder, counts in parts["counts"].items():
        work[encoder] = counts["slices"] * views
        work[f"{encoder} auto"] = counts["shown"] + counts["again"] * (views - 1)
    seconds = parts["seconds"]
    published = [time_s * every for time_s in seconds["published"]]
    rows = []
    for name, times in seconds.items():
        whole = [time_s * work[name] for time_s in times]
        rows.append(
            {
                "volume": size.name,
                "views": views,
                "way": name,
                "passes": work[name],
                "seconds": round(median(whole), 2),
                "times_faster": round(median(p / w for p, w in zip(published, whole)), 2),
            }
        )
    return rows


# --- whole commands ---------------------------------------------------------------------------


def _whole(model: Path, scan: Path, tta: str, started: float) -> None:
    """Run in a fresh process: what ``wmh-lora segment`` does for one scan, with the times told."""
    from wmh_lora.engine import WMHInferenceEngine, load_model

    keep_freed_memory()
    imported = time.time() - started
    engine = WMHInferenceEngine(load_model(model), "cpu")
    loaded = time.time() - started
    first: list[float] = []

    def progress(done: int, total: int) -> None:
        if not first:
            first.append(time.time() - started)

    result = engine.segment(scan, tta=tta, progress=progress)
    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
    figures = {
        "imported_s": imported,
        "loaded_s": loaded,
        "first_slice_s": first[0],
        "saved_s": time.time() - started,
        "peak_mb": _peak_rss_mb(),
    }
    sys.stdout.write(json.dumps({key: round(value, 2) for key, value in figures.items()}) + "\n")


def measure_whole(
    encoder: str, size: Size, tta: str, folder: Path, turns: int
) -> dict[str, dict[str, float] | float | str]:
    """Time whole processes; medians."""
    model = folder / f"{encoder}.safetensors"
    if not model.exists():
        init_model(model, encoder, random_base=encoder != "compact")
    scan = folder / f"{size.name}.nii.gz"
    volume = head_scan(size.shape, size.spacing_mm)
    write_nifti(scan, volume.data, volume, overwrite=True)
    found = []
    for _ in range(turns):
        arguments = ("--whole", str(model), str(scan), tta, str(time.time()))
        found.append(result_of_process("benchmarks.inference", *arguments))
    figures = {key: median(run[key] for run in found) for key in found[0]}
    return {"encoder": encoder, "volume": size.name, "tta": tta, **figures}


def _growth(quick: bool) -> list[Size]:
    """Volumes with more slices, and with more pixels of the same head."""
    slices = (10, 20) if quick else (20, 40, 80)
    pixels = (128,) if quick else (128, 256, 512)
    return [
        *(Size((192, 224, n), (1.0, 1.0, 160.0 / n)) for n in slices),
        *(Size((n, n, 20), (230.0 / n, 230.0 / n, 8.0)) for n in pixels),
    ]


# --- memory of a slice ------------------------------------------------------------------------


def _pass_of(encoder: str, batch: int, size: tuple[int, int]) -> Callable[[], object]:
    network = NetworkOnDevice(our_network(encoder), ("wmh",), CPU)
    slices = np.zeros((batch, 3, *size), np.float32)
    return lambda: network.see(slices, (0, False))


def measure_activations() -> dict[str, float]:
    """Bytes a pixel of a slice: the growth of the peak from one slice to three."""
    size = (256, 192)
    found: dict[str, float] = {}
    for encoder in ENCODERS:
        peaks = [
            peak_memory_mb("benchmarks.inference", "--pass-of", encoder, str(batch))
            for batch in (1, 3)
        ]
        grown = (peaks[1]["peak_mb"] - peaks[0]["peak_mb"]) * 2**20
        found[encoder] = round(grown / 2 / (size[0] * size[1]))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small volumes, one turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--activations", action="store_true", help="memory of a slice alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    parser.add_argument("--whole", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--pass-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.whole:
        model, scan, tta, started = options.whole
        _whole(Path(model), Path(scan), tta, float(started))
    elif options.pass_of:
        encoder, batch = options.pass_of
        report_peak_memory(lambda: _pass_of(encoder, int(batch), (256, 192)))
    elif options.activations:
        sys.stdout.write(json.dumps(measure_activations(), indent=2) + "\n")
    else:
        _run(options)


def _run(options: argparse.Namespace) -> None:
    sizes: tuple[Size, ...] = SIZES
    turns, side = options.turns, 512
    if options.quick:
        sizes, turns, side = QUICK_SIZES, 1, 128
    parts, rows, whole, growth = {}, [], [], []
    for size in sizes:
        sys.stderr.write(f"{size.name}: parts\n")
        parts[size.name] = measure_parts(size, side, turns)
        for tta in ("none", "d4"):
            rows += scan_rows(size, parts[size.name], tta)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in sizes:
            for encoder in ("compact",) if options.quick else ("compact", "litemedsam"):
                sys.stderr.write(f"{size.name}: {encoder} as a whole\n")
                whole.append(measure_whole(encoder, size, "none", folder, max(1, turns // 2)))
        for size in _growth(options.quick):
            growth.append(measure_whole("compact", size, "none", folder, 1))
    document = {
        "machine": machine(),
        "matmul_gflops_per_s": round(matmul_gflops_per_s(), 1),
        "stretched_to_px": side,
        "parts": parts,
        "scans": rows,
        "whole_commands": whole,
        "growth": growth,
    }
    head = ["volume", "views", "way", "passes", "seconds", "times faster"]
    table = [head, *([str(value) for value in row.values()] for row in rows)]
    publish(document, table, options.json, options.markdown)


if __name__ == "__main__":
    main()
