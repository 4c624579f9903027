"""Timing, memory and FLOP counting for the benchmarks of this folder.

A shared machine disturbs timings. What is compared therefore runs in turns, and ratios are formed
within each turn: a disturbance that lasts longer than a turn cancels.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from wmh_lora.files import file_sha256, open_atomic

if TYPE_CHECKING:
    from wmh_lora.training.tune_cases import TuningCase

__all__ = [
    "Timings",
    "count_flops",
    "kept_result",
    "machine",
    "markdown_table",
    "matmul_gflops_per_s",
    "peak_memory_mb",
    "publish",
    "report_peak_memory",
    "result_of_process",
    "scan_identity",
    "time_in_turns",
    "write_study",
]

_READING = "## Reading"


@dataclass(frozen=True)
class Timings:
    """Seconds of each contestant in each turn."""

    seconds: Mapping[str, Sequence[float]]

    def median_s(self, name: str) -> float:
        """Median time of one contestant in seconds."""
        return median(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """Median over the turns of the time of ``slow`` over the time of ``fast``."""
        return median(a / b for a, b in zip(self.seconds[slow], self.seconds[fast]))


def time_in_turns(
    contestants: Mapping[str, Callable[[], object]], turns: int, warm_up: int = 1
) -> Timings:
    """Run every contestant once a turn, in alternating order.

    Parameters
    ----------
    contestants : Mapping
        Functions without arguments; results are discarded.
    turns : int
        Number of timed turns.
    warm_up : int
        Untimed runs of each before.
    """
    for _ in range(warm_up):
        for run in contestants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns):
        order = list(contestants.items())
        for name, run in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return Timings(seconds)


# --- studies that take hours -----------------------------------------------------------------


def kept_result(path: Path, identity: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """Return what an earlier run left in a JSON file, or compute it and leave it there.

    Parameters
    ----------
    path : Path
        The file.
    identity : mapping
        What the result depends on, as JSON holds it; a file of another identity is replaced.
    compute : callable
        Makes the result, which JSON can hold.
    """
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["identity"] == identity:
            return document["result"]
    result = compute()
    text = json.dumps({"identity": identity, "result": result}, indent=2)
    with open_atomic(path, overwrite=True) as stream:
        stream.write(text.encode())
    return result


def scan_identity(cases: Iterable[TuningCase]) -> list[list[str]]:
    """Name scans with the checksums of image and reference, for the identity of `kept_result`."""
    return [
        [case.name, file_sha256(case.image), file_sha256(case.reference) if case.reference else ""]
        for case in cases
    ]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, without the line feed at its end."""
    lines = (f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    return "\n".join(lines)


def write_study(path: Path, text: str) -> None:
    """Print a study and write it to a Markdown file; what stands there under "Reading" is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    text += "".join(before.partition(f"\n{_READING}\n")[1:])
    with open_atomic(path, overwrite=True) as stream:
        stream.write(text.encode())
    sys.stdout.write(text)


# --- memory -----------------------------------------------------------------------------------


def _peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MiB.

    On Linux from /proc: there, the peak that ``getrusage`` gives a new process starts at the size
    of the process that launched it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def report_peak_memory(prepare: Callable[[], Callable[[], object]]) -> None:
    """Print the memory of a function, for `peak_memory_mb`, which calls this in a new process.

    Parameters
    ----------
    prepare : callable
        Builds what the function needs, e.g. a model, and returns the function.
    """
    imported = _peak_rss_mb()
    run = prepare()
    prepared = _peak_rss_mb()
    run()
    figures = {"imported_mb": imported, "prepared_mb": prepared, "peak_mb": _peak_rss_mb()}
    sys.stdout.write(json.dumps(figures) + "\n")


def result_of_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m module arguments`` and return the JSON object that it prints last."""
    command = [sys.executable, "-m", module, *arguments]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, check=True, cwd=root, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def peak_memory_mb(module: str, *arguments: str) -> dict[str, float]:
    """Peak resident memory of ``python -m module arguments``, which calls `report_peak_memory`.

    A new process, because the peak of a process never falls.

    Returns
    -------
    dict
        ``imported_mb`` (after the imports), ``prepared_mb`` (with the model), ``peak_mb``, and
        ``above_imports_mb``: the peak less the imports. Peaks up to that point, in MiB.
    """
    figures: dict[str, float] = result_of_process(module, *arguments)
    figures["above_imports_mb"] = figures["peak_mb"] - figures["imported_mb"]
    return {name: round(value, 1) for name, value in figures.items()}


# --- work -------------------------------------------------------------------------------------


def _linear_flops(tokens: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * tokens[-1] * math.prod(out_shape)


def _convolution_flops(
    _: Sequence[int], weight: Sequence[int], *__: Any, out_shape: Sequence[int], **___: Any
) -> int:
    return 2 * math.prod(weight[1:]) * math.prod(out_shape)


def _attention_flops(q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    windows, heads, queries, width = q
    return 4 * windows * heads * queries * k[2] * width


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions that ``run`` does.

    A multiplication and its addition count as two.

    Examples
    --------
    >>> count_flops(lambda: torch.zeros(2, 3) @ torch.zeros(3, 5))
    60
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas: dict[Any, Any] = {attention: _attention_flops}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # see wmh_lora.models.linear
        formulas[torch.ops.mkldnn._linear_pointwise] = _linear_flops
        formulas[torch.ops.mkldnn._convolution_pointwise] = _convolution_flops
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return int(counter.get_total_flops())


def matmul_run(rows: int = 1024, inner: int = 768, cols: int = 3072) -> Callable[[], Tensor]:
    """Return a float32 matrix product of the shape of a ViT-B's MLP at 512 px."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator)
    b = torch.randn(inner, cols, generator=generator)
    out = torch.empty(rows, cols)
    return lambda: torch.mm(a, b, out=out)


def matmul_gflops_per_s(turns: int = 15) -> float:
    """Median rate of `matmul_run` on the threads in use, in GFLOP/s."""
    run = matmul_run()
    seconds = time_in_turns({"mm": run}, turns, warm_up=3).median_s("mm")
    return count_flops(run) / seconds / 1e9


def machine() -> dict[str, object]:
    """Describe the processor and the software that count for speed."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# --- results ----------------------------------------------------------------------------------


def publish(
    document: Mapping[str, Any],
    rows: Sequence[Sequence[str]],
    json_path: Path | None = None,
    markdown_path: Path | None = None,
) -> None:
    """Print a result as JSON, and write it to files where they are named.

    Parameters
    ----------
    document : Mapping
        Everything that was measured.
    rows : sequence of rows
        What a reader wants to see, the head first, for the Markdown table.
    json_path, markdown_path : Path, optional
        Files; those that exist are replaced.
    """
    text = json.dumps(document, indent=2) + "\n"
    sys.stdout.write(text)
    if json_path is not None:
        json_path.write_text(text, encoding="utf-8")
    if markdown_path is not None:
        head, *others = rows
        markdown_path.write_text(markdown_table(head, others) + "\n", encoding="utf-8")
