"""A Meta-layout checkpoint of full DiT-XL/2 size through the program: convert, info, quantize, sample, with time and memory.

    python -m benchmarks.convert --hardware "2 CPU cores"

The file has random weights: a ``.pt`` where torch is installed, else the same tensors as safetensors. Every command is a
process of its own, whose peak of resident memory is its own. Writes benchmarks/results/convert.json.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

import ptq4dit_jax as ptq
from benchmarks import common
from ptq4dit_jax.checkpoints.foreign import export_meta, open_tensors
from ptq4dit_jax.networks.dit import DiTConfig

RESULTS = common.RESULTS / "convert.json"


def write_checkpoint(folder: Path) -> Path:
    """A file of random weights, at least 2.7 GB."""
    model = ptq.FloatDiT.init(DiTConfig.preset("DiT-XL/2"), key=jax.random.key(0))
    path = folder / "DiT-XL-2-256x256.safetensors"
    export_meta(model, path)
    try:
        import torch
    except ImportError:
        return path
    state = {name: torch.from_numpy(tensor.read()) for name, tensor in open_tensors(path).items()}
    torch.save(state, path.with_suffix(".pt"))
    path.unlink()
    return path.with_suffix(".pt")


def run(*arguments: str | Path) -> dict[str, Any]:
    """One command of the program: seconds, and the peak of its resident memory in bytes."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "ptq4dit_jax.cli", *map(str, arguments)]
    child = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"Error: ptq4dit {arguments[0]} failed.")
    return {"seconds": time.perf_counter() - started, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder)
        model, quantized = folder / "xl", folder / "xl-w4a8"
        calibration = ("--sampler", "ddim", "--steps", "2", "--calib-steps", "2", "--calib-rows", "2", "--step-groups", "2")
        commands = {
            "convert": run("convert", checkpoint, model),
            "info": run("info", checkpoint),
            "quantize": run("quantize", checkpoint, "--weight-bits", "4", "--out", quantized, *calibration),
            "sample": run("sample", quantized, "--labels", "0", "--steps", "2", "--sampler", "ddim", "--out", folder / "a.npz"),
        }
        size = checkpoint.stat().st_size
        document = {**common.header(arguments), "file": checkpoint.name, "file_bytes": size, "commands": commands}
    common.write(document, arguments.out)
    for command, found in commands.items():
        print(f"{command:10s} {found['seconds']:6.1f} s  {found['peak_bytes'] / 1e9:5.2f} GB resident")


if __name__ == "__main__":
    main()
