"""What one of several processes does, or the only one: ``python run_of_several.py PART FOLDER [PORT COUNT INDEX]``.

Each part writes what it found as ``FOLDER/PART-COUNT-INDEX.npz``. Of several processes, the last is killed at the end of
``values``, in a reconstruction that ``resumed`` goes on with. Process 0 alone can write to what is named below ``FOLDER``; the
others are given names below ``/proc``, where nobody can write.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import helpers
import jax
import numpy as np

import ptq4dit_jax as ptq
from ptq4dit_jax import calibration, processes, sharding
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import compare
from ptq4dit_jax.reconstruction import closed_form, units

PART, FOLDER = sys.argv[1], Path(sys.argv[2])
PORT, COUNT, INDEX = map(int, sys.argv[3:6]) if len(sys.argv) > 3 else (0, 1, 0)
if COUNT > 1:
    jax.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, INDEX, heartbeat_timeout_seconds=20)

MESH, KEY = ptq.data_mesh(), jax.random.key(1)
#: Two devices of one process hold each model.
CUT = ptq.data_mesh(model=2)
MODEL = helpers.tiny_model(depth=1)
LABELS = np.arange(11) % 5
#: 44 rows are 11 micro-batches, more than devices.
SETTINGS = {
    "balance": "csb+ssc",
    "range_search": "minmax",
    "calib_steps": 2,
    "calib_rows": 44,
    "steps": 3,
    "step_groups": 2,
    "weight_bits": 4,
}
RECONSTRUCTION = Reconstruction(iterations=6, batch_size=8, start="nearest")


def writable(name: str) -> Path:
    return (FOLDER if INDEX == 0 else Path("/proc/nowhere")) / name


def named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(sharding.to_host(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def of(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def refusal(function: Any) -> np.ndarray:
    try:
        function()
    except Ptq4ditError as error:
        return np.array(str(error))
    return np.array("")


def quantized(stages: list[str], state: Path | None = None, dies: bool = False) -> ptq.QuantizedDiT:
    """Quantizes by reconstruction, after whose second unit the last process may be killed."""

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        stages.append(f"{stage} {done} {note}")
        if dies and INDEX == COUNT - 1 and stage == "reconstruct embed condition":
            os.kill(os.getpid(), signal.SIGKILL)

    config = ptq.QuantConfig.of(**SETTINGS, reconstruction=RECONSTRUCTION)
    return ptq.quantize(MODEL, config, key=KEY, mesh=MESH, state=state, keep_poor=True, progress=report)


def streamed() -> dict[str, np.ndarray]:
    """Writes the float model's samples to a file while they are made; returns what is in it."""
    sampling = ptq.Sampling.of(steps=3, sampler="ddpm")
    batches = ptq.sample_batches(MODEL, LABELS, key=KEY, sampling=sampling, mesh=MESH, batch_size=8)
    with np.load(ptq.save_samples(writable("streamed.npz"), batches, LABELS)) as file:
        return dict(file)


def values() -> dict[str, np.ndarray]:
    """Samples, a file of them, a learned model, statistics of rows, a layer in closed form, a comparison, saving,
    refusals."""
    found = {"float": ptq.sample(MODEL, LABELS, key=KEY, steps=3, sampler="ddpm", mesh=MESH, batch_size=8)}
    program = ptq.export_sampler(MODEL, 8, sampler="ddpm", steps=3, devices=MESH.size)
    ptq.save_sampler(program, writable("program"))
    found["float by a program"] = ptq.sample(MODEL, LABELS, key=KEY, mesh=MESH, program=ptq.load_sampler(FOLDER / "program"))
    found |= of("streamed", streamed())
    found["refused/streamed"] = refusal(streamed)
    model = quantized([])
    found |= of("quantized", named(model))
    found["provenance"] = np.array(json.dumps(model.provenance.facts))
    found["integers"] = ptq.sample(model, LABELS, key=KEY, steps=3, mesh=MESH)
    found["integers alone"] = ptq.sample(model, LABELS, key=KEY, steps=3)
    rows = calibration.CalibrationData(
        x=np.random.default_rng(0).standard_normal((2, 67, 6, 6, 3), np.float32),
        t=np.array([900, 20], np.int32),
        y=np.arange(134, dtype=np.int32).reshape(2, 67) % 5,
    )
    extremes = calibration.channel_extremes(MODEL, rows, sites=("blocks.qkv_in",), per_row=True, mesh=MESH)
    found |= of("extremes", named(extremes))
    walk = closed_form.ClosedFormWalk(MODEL, sharding.own(model), rows, MESH)
    rounded, _ = closed_form.round_unit(walk, units(MODEL.config)[0], search="mse")
    found |= of("rounded", named(rounded))
    comparison = compare(MODEL, {"integers": model}, labels=LABELS, key=KEY, sampling=ptq.Sampling(steps=3), mesh=MESH)
    found["comparison"] = np.array(json.dumps(comparison.to_json()["models"]))
    found["integers/cut"] = ptq.sample(model, LABELS, key=KEY, steps=3, mesh=CUT)
    found |= of("cut", named(ptq.quantize(MODEL, ptq.QuantConfig.of(**SETTINGS, rounding="nearest"), key=KEY, mesh=CUT)))
    ptq.save(model, writable("model"))
    ptq.save(MODEL, writable("float"))
    loaded = ptq.load(FOLDER / "model")
    found |= of("loaded", named(loaded))
    found["of loaded"] = ptq.sample(loaded, LABELS, key=KEY, steps=3, mesh=MESH)
    found["refused/there"] = refusal(lambda: ptq.save(model, writable("model")))
    found["refused/label"] = refusal(lambda: ptq.sample(model, [99], key=KEY, mesh=MESH))
    if COUNT > 1:
        across = ptq.data_mesh(model=jax.device_count())
        found["refused/across"] = refusal(lambda: ptq.sample(model, LABELS, key=KEY, mesh=across))
        found["least"] = np.array([processes.least(5 + INDEX), processes.least(None if INDEX else 7)])
        found["unknown"] = np.array(processes.least(None) is None)
        ours = np.array([-0.0, np.nan, 1e-42], np.float32), np.array(True), np.array([-3], np.int8), np.zeros((0, 2))
        zeros = jax.tree.map(np.zeros_like, ours)
        found |= of("shared", named(processes.shared(ours if INDEX else zeros, source=1)))
    return found


def write(part: str, found: dict[str, np.ndarray]) -> None:
    np.savez(FOLDER / f"{part}-{COUNT}-{INDEX}.npz", **found)  # type: ignore[arg-type]


if PART == "values":
    write(PART, values())
    if COUNT > 1:
        quantized([], writable("state"), dies=True)
else:
    seen: list[str] = []
    write(PART, of("quantized", named(quantized(seen, writable("state")))) | {"stages": np.array(seen)})
