"""Speed and memory of block reconstruction at the shapes of DiT-XL/2, 256 px.

    python -m benchmarks.reconstruction --hardware "one NVIDIA H200"

Random weights, W4A8, 1600 calibration rows, batch 32. First milliseconds an iteration of a block in the middle of a shallow
network of those widths, compilation apart; then a walk through the whole network with few iterations per unit, for what lies
between them and for the peak of device memory, planned and seen. Writes benchmarks/results/reconstruction_speed.json.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np

import ptq4dit_jax as ptq
from benchmarks import common
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.reconstruction import optimize, reconstruct
from ptq4dit_jax.reconstruction.learning import LearningWalk
from ptq4dit_jax.reconstruction.units import units

RESULTS = common.RESULTS / "reconstruction_speed.json"
#: Dense bfloat16 peak, in operations a second, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


#: Calibration steps, the default for a chain of 50.
STEPS = 25


def operations(config: DiTConfig, batch_size: int) -> float:
    """Multiplications and additions of one iteration: a forward pass and twice that for the gradients."""
    T, D = config.num_tokens, config.hidden_size
    tokens = sum(k * n for name, (k, n) in config.linear_shapes.items() if name.startswith("blocks.") and "adaLN" not in name)
    row = 2 * (T * tokens + 6 * D * D) + 2 * 2 * T * T * D
    return 3.0 * batch_size * row


def random_rows(config: DiTConfig, steps: int, rows: int) -> CalibrationData:
    """Rows as a sampler would give them, but of noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps, rows, *config.image_shape)).astype(np.float32)
    t = np.linspace(999, 0, steps).round().astype(np.int32)
    return CalibrationData(x=x, t=t, y=rng.integers(0, config.num_classes, (steps, rows)).astype(np.int32))


def prepared(config: DiTConfig, calib_rows: int) -> tuple[ptq.FloatDiT, ptq.QuantizedDiT, CalibrationData]:
    """Random weights, balanced, and quantized by few rows; and the rows to reconstruct with."""
    model = ptq.FloatDiT.init(config, key=jax.random.key(0))
    wanted = ptq.QuantConfig.of(weight_bits=4, rounding="nearest")
    calibration = random_rows(config, STEPS, calib_rows)
    few = CalibrationData(x=calibration.x[:, :4], t=calibration.t, y=calibration.y[:, :4])
    folded = ptq.balance(model, wanted, ptq.observe(model, few), few).folded
    return folded, ptq.quantize(model, wanted, key=jax.random.key(0), calibration=few), calibration


def measure_block(preset: str, settings: Reconstruction, timed: int, calib_rows: int) -> dict[str, Any]:
    """Milliseconds an iteration of one block, and what follows from them."""
    config = DiTConfig.preset(preset, depth=2)
    folded, quantized, calibration = prepared(config, calib_rows)
    started = time.perf_counter()
    walk = LearningWalk(folded, quantized, calibration, settings, None)  # compiles the program of the blocks
    compile_seconds = time.perf_counter() - started
    for unit in units(config):
        task, variables = walk.task(unit)
        rows = walk.rows(unit)
        outputs, before = walk.outputs(unit, walk.nearest(unit), rows)
        if unit.kind == "block" and unit.index == 1:
            break
        walk.advance(unit, outputs, rows.target)
    del outputs
    state, key = optimize.start(variables, settings), jax.random.key(0)
    state = jax.block_until_ready(walk.train(unit, state, task, rows, before, key, 20))
    started = time.perf_counter()
    state = jax.block_until_ready(walk.train(unit, state, task, rows, before, key, 20 + timed))
    seconds = (time.perf_counter() - started) / timed
    kind = jax.devices()[0].device_kind
    peak = next((value for name, value in PEAKS.items() if name in kind), None)
    flops = operations(config, settings.batch_size)
    return {
        "preset": preset,
        "dtype": walk.dtype,
        "batch_size": settings.batch_size,
        "rows": STEPS * calib_rows,
        "iterations": timed,
        "ms_per_iteration": 1e3 * seconds,
        "compile_seconds": compile_seconds,
        "operations": flops,
        "share_of_bf16_peak": None if peak is None else flops / seconds / peak,
        "memory": dataclasses.asdict(walk.plan),
        "minutes_2000_x_28": 2000 * 28 * seconds / 60,
        "minutes_20000_x_28": 20000 * 28 * seconds / 60,
        "error_after": float(state.errors[20 : 20 + timed][-50:].mean()),
    }


def measure_walk(preset: str, settings: Reconstruction, calib_rows: int) -> dict[str, Any]:
    """Seconds of a walk through the whole network, and its peak of device memory."""
    folded, quantized, calibration = prepared(DiTConfig.preset(preset), calib_rows)
    peak = lambda: (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    before = peak()
    started = time.perf_counter()
    reconstruct(folded, quantized, calibration, settings, key=jax.random.key(0))
    seconds, after = time.perf_counter() - started, peak()
    plan = LearningWalk(folded, quantized, calibration, settings, None).plan
    return {
        "seconds": seconds,
        "iterations_a_part": settings.iterations,
        "planned_peak_bytes": plan.peak,
        "plan": str(plan),
        "peak_bytes_before": before,
        "peak_bytes": after,
    }


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], RESULTS)
    parser.add_argument("--preset", default="DiT-XL/2")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--walk-iterations", type=int, default=20, help="of each unit in the walk through the whole network")
    parser.add_argument("--calib-rows", type=int, default=64, help="calibration rows at each of 25 steps")
    arguments = parser.parse_args()
    block = measure_block(arguments.preset, Reconstruction(), arguments.iterations, arguments.calib_rows)
    document = {**common.header(arguments), **block}
    print(json.dumps(document, indent=1), flush=True)
    document["walk"] = measure_walk(
        arguments.preset, Reconstruction(iterations=arguments.walk_iterations), arguments.calib_rows
    )
    print(json.dumps(document["walk"], indent=1))
    common.write(document, arguments.out)


if __name__ == "__main__":
    main()
