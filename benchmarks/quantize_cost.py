"""What `quantize` costs, stage by stage: seconds, and seconds of this process's CPU time.

    python -m benchmarks.quantize_cost --preset DiT-XL/2
    PYTHONPATH=/another/checkout python benchmarks/quantize_cost.py --preset DiT-XL/2

The second form measures another checkout with the same script, to compare two commits; the first line names the package that
was measured. Random weights. The first run compiles and is told apart; then come `--repeat` more, and the median of their
totals. On a machine that others use too, compare CPU times, and let the runs of both checkouts take turns. A stage ends when
the next begins; what a device has not finished by then counts to the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import time
from typing import Any

import jax

import ptq4dit_jax as ptq
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.networks.dit import PRESETS, DiTConfig


def now() -> tuple[float, float]:
    """Seconds of wall time and of the process's CPU time, from an arbitrary start."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def run(model: ptq.FloatDiT, config: ptq.QuantConfig, seed: int) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of each stage, and of all."""
    marks: list[tuple[str, tuple[float, float]]] = [("prepare", now())]

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        if stage.startswith("plan "):
            print(f"{stage}: {note}", flush=True)
        stage = next((word for word in ("reconstruct", "round") if stage.startswith(f"{word} ")), stage)
        if marks[-1][0] != stage:
            marks.append((stage, now()))

    jax.block_until_ready(ptq.quantize(model, config, key=jax.random.key(seed), progress=report))
    marks.append(("all", now()))
    pairs = itertools.pairwise(marks)
    spent = {stage: (after[0] - before[0], after[1] - before[1]) for (stage, before), (_, after) in pairs}
    first, last = marks[0][1], marks[-1][1]
    return {**spent, "all": (last[0] - first[0], last[1] - first[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="DiT-S/2", choices=PRESETS)
    parser.add_argument("--input-size", type=int, default=32, help="side of the latent; 32 is 256 px")
    parser.add_argument("--depth", type=int, help="fewer blocks than the preset has")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--calib-rows", type=int, default=64)
    parser.add_argument("--calib-steps", type=int, default=25)
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--rounding", choices=["nearest", "gptq"], help="of the weights; older checkouts know nearest alone")
    parser.add_argument("--iterations", type=int, default=0, help="of reconstruction for each unit; 0 leaves it out")
    parser.add_argument("--chunks", type=int, help="of a batch of the reconstruction; the default is the package's")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    shape: dict[str, Any] = {} if arguments.depth is None else {"depth": arguments.depth}
    model = ptq.FloatDiT.init(
        DiTConfig.preset(arguments.preset, input_size=arguments.input_size, **shape), key=jax.random.key(0)
    )
    chunks = {} if arguments.chunks is None else {"accumulation_chunks": arguments.chunks}
    learn = Reconstruction(iterations=arguments.iterations, **chunks) if arguments.iterations else None
    config = ptq.QuantConfig.of(
        weight_bits=arguments.weight_bits,
        calib_steps=arguments.calib_steps,
        calib_rows=arguments.calib_rows,
        steps=arguments.steps,
        reconstruction=learn,
        **({} if arguments.rounding is None else {"rounding": arguments.rounding}),
    )
    print(f"{ptq.__file__}, JAX {jax.__version__}, {jax.devices()[0].device_kind}, {vars(arguments)}", flush=True)
    totals = []
    for index in range(arguments.repeat + 1):
        spent = run(model, config, seed=index)
        rounded = {stage: [round(seconds, 2) for seconds in both] for stage, both in spent.items()}
        print(f"{'compiling' if index == 0 else f'run {index}'}, [wall, CPU] s: {json.dumps(rounded)}", flush=True)
        totals += [spent["all"]] if index else []
    if totals:
        wall, cpu = (statistics.median(each) for each in zip(*totals, strict=True))
        print(f"median of {len(totals)}: {wall:.2f} s, CPU {cpu:.2f} s")
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak is not None:  # a CPU has no such counter
        print(f"peak of the device's memory, the float model included: {peak / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
