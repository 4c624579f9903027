"""Speed and memory of the encoders, beside transformers' implementation of SAM's.

    python -m benchmarks.encoders [--quick] [--encoders NAME ...] [--json FILE]

For each encoder, with random weights: a forward pass without gradients and a training step
(forward and backward with LoRA adapters at their default ranks), batch of 1. Prints JSON on stdout,
progress on stderr. Seconds are medians; ratios and shares are medians of the ratios within turns in
which all contestants and a matrix product run one after the other, so that other load on the
machine cancels. Each encoder has a process of its own for each task.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    count_flops,
    machine,
    matmul_gflops_per_s,
    matmul_run,
    peak_memory_mb,
    report_peak_memory,
    result_of_process,
    time_in_turns,
)
from wmh_lora.models.encoders import ENCODERS, build_encoder
from wmh_lora.models.lora import LoraSettings, add_lora
from wmh_lora.models.sam_checkpoint import encoder_key_of_hugging_face

DEFAULT_ENCODERS = ("litemedsam", "medsam-vit-b")
TASKS = ("forward", "training")
SEED = 0
MATMULS_A_TURN = 10
OURS, REFERENCE, MATMUL = "ours", "reference", "matmul"


def _reference(encoder: nn.Module, size: int) -> nn.Module:
    """Build transformers' eager encoder on the same weights (not copies of them)."""
    from transformers.models.sam.configuration_sam import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    state = encoder.state_dict()
    blocks: Any = encoder.get_submodule("blocks")
    config = SamVisionConfig(
        hidden_size=state["pos_embed"].shape[-1],
        mlp_dim=len(state["blocks.0.mlp.lin1.bias"]),
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.heads,
        global_attn_indexes=[i for i, block in enumerate(blocks) if not block.attn.window],
    )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        reference: Any = SamVisionEncoder(config)
    shared = {name: state[encoder_key_of_hugging_face(name)] for name in reference.state_dict()}
    reference.load_state_dict(shared, assign=True)
    # It has no interpolation of its own for other sizes than that of its weights.
    side = size // 16
    stored = reference.pos_embed.detach().permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(stored, (side, side), mode="bicubic")
    reference.pos_embed = nn.Parameter(resized.permute(0, 2, 3, 1))
    reference.patch_embed.image_size = (size, size)
    built: nn.Module = reference.requires_grad_(False).eval()
    return built


def _has_reference(name: str) -> bool:
    return "vit" in name


def _features(output: Any) -> Tensor:
    """Neck features of either implementation."""
    features: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    return features


def _build(name: str, implementation: str, task: str, size: int) -> nn.Module:
    """Make an encoder, with adapters if it is to be trained."""
    torch.manual_seed(SEED)
    encoder = build_encoder(name)
    if implementation == REFERENCE:
        encoder = _reference(encoder, size)
    if task == "training":
        add_lora(encoder, LoraSettings(dict(ENCODERS[name].lora_ranks)))
        encoder.train()
    return encoder


def _task(name: str, implementation: str, task: str, size: int) -> Callable[[], Tensor]:
    """Return a function that does one forward pass or training step and returns the features."""
    encoder = _build(name, implementation, task, size)
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(SEED))

    def forward() -> Tensor:
        with torch.no_grad():
            return _features(encoder(images))

    def training() -> Tensor:
        # An adapter before the encoder wants the gradient of the images, too.
        features = _features(encoder(images.requires_grad_()))
        features.square().mean().backward()
        encoder.zero_grad(set_to_none=True)
        images.grad = None
        return features.detach()

    return forward if task == "forward" else training


def _measure(name: str, task: str, size: int, turns: int) -> dict[str, object]:
    """Time one encoder at one task, beside its reference."""
    contestants: dict[str, Callable[[], Tensor]] = {OURS: _task(name, OURS, task, size)}
    if _has_reference(name):
        contestants[REFERENCE] = _task(name, REFERENCE, task, size)
    gflop = {key: count_flops(run) / 1e9 for key, run in contestants.items()}  # warms up, too
    multiply = matmul_run()
    multiply()
    timed = {**contestants, MATMUL: lambda: [multiply() for _ in range(MATMULS_A_TURN)]}
    timings = time_in_turns(timed, turns, warm_up=0)
    gflop_matmul = MATMULS_A_TURN * count_flops(multiply) / 1e9
    found: dict[str, Any] = {}
    for key in contestants:
        seconds = timings.median_s(key)
        found[key] = {
            "seconds": round(seconds, 4),
            "gflop": round(gflop[key], 1),
            "gflops_per_s": round(gflop[key] / seconds, 1),
            "share_of_matmul_rate": round(
                timings.ratio(MATMUL, key) * gflop[key] / gflop_matmul, 3
            ),
            "memory": peak_memory_mb(
                "benchmarks.encoders", "--size", str(size), "--memory-of", name, key, task
            ),
        }
    if _has_reference(name):
        memory = [found[key]["memory"]["above_imports_mb"] for key in (REFERENCE, OURS)]
        found["reference_over_ours"] = {
            "seconds": round(timings.ratio(REFERENCE, OURS), 3),
            "memory_above_imports": round(memory[0] / memory[1], 3),
        }
        if task == "forward":
            ours, theirs = (run() for run in contestants.values())
            found["largest_difference"] = float((ours - theirs).abs().max())
    return found


def _report_memory(name: str, implementation: str, task: str, size: int) -> None:
    """Run in the process that measures memory; libraries are imported before the baseline."""
    if implementation == REFERENCE:
        importlib.import_module("transformers.models.sam.modeling_sam")
    if task == "training":
        importlib.import_module("peft")
    report_peak_memory(lambda: _task(name, implementation, task, size))


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    adaptable = [name for name, spec in ENCODERS.items() if spec.lora_ranks]
    parser.add_argument(
        "--encoders", nargs="+", choices=adaptable, default=list(DEFAULT_ENCODERS), metavar="NAME"
    )
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--turns", type=int, default=5, help="timed forward passes")
    parser.add_argument("--threads", type=int, help="threads of a computation; default: all cores")
    parser.add_argument("--quick", action="store_true", help="256 pixels, 2 turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        name, implementation, task = options.memory_of
        _report_memory(name, implementation, task, options.size)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    size, turns = (256, 2) if options.quick else (options.size, options.turns)
    if options.only:
        name, task = options.only
        sys.stdout.write(json.dumps(_measure(name, task, size, turns)))
        return
    results: dict[str, dict[str, object]] = {}
    for name in options.encoders:
        parameters = sum(parameter.numel() for parameter in build_encoder(name).parameters())
        results[name] = {"parameters": parameters}
        for task in TASKS:
            sys.stderr.write(f"{name}: {task} at {size} px\n")
            # Training steps take three times as long; fewer of them will do.
            number = turns if task == "forward" else max(2, turns - 2)
            settings = ["--size", str(size), "--turns", str(number), "--only", name, task]
            if options.threads:
                settings += ["--threads", str(options.threads)]
            # The heap that one measurement leaves behind makes the next one's allocations cheap.
            results[name][task] = result_of_process("benchmarks.encoders", *settings)
    document = {
        "machine": machine(),
        "size_px": size,
        "turns": turns,
        "matmul_gflops_per_s": round(matmul_gflops_per_s(), 1),
        "encoders": results,
    }
    text = json.dumps(document, indent=2) + "\n"
    sys.stdout.write(text)
    if options.json:
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
