"""Balancing x reconstruction x widths on a trained model, each with several seeds: the ablation that the papers leave out.

    python -m benchmarks.ablation --hardware "one NVIDIA H200"

A seed decides the calibration rows and the rows that an iteration of reconstruction draws. What is measured is the same for
all: the guided noise prediction at 25 steps of the float model's own trajectories, and images on the same noise. Writes
benchmarks/results/ablation.json after every seed, goes on where that file ends, and puts the table into docs/ablation.md.
The peers of every row are the other rows and the float model, in one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ptq4dit_jax as ptq
from benchmarks import common
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.evaluation import SQNR_MEAN, SQNR_POOLED, compare

PAGE = common.ROOT / "docs" / "ablation.md"
RESULTS = common.RESULTS / "ablation.json"
BALANCES, BITS = ("none", "csb", "csb+ssc"), (8, 4)
#: What identifies a run that may be continued.
_FIXED = ("commit", "hardware", "jax", "model", "iterations", "samples")


def official(iterations: int) -> Reconstruction:
    """Rates, schedules and regularizer of the official code (method.md, 6.2). Its regularizer counts 0.01 a weight against an
    error summed over tokens; per weight, and with the error relative to nearest rounding, that is of the order of 1e4."""
    return Reconstruction(
        iterations=iterations, rounding_rate=1e-3, rounding_eps=1e-8, decay_rounding=False, scale_rate=4e-5, regularizer=1e4
    )


def cells(iterations: int, widths: Sequence[int] = BITS) -> dict[str, dict[str, Any]]:
    """Settings of every row of the table by its name."""
    made: dict[str, dict[str, Any]] = {}
    for bits, balance in itertools.product(widths, BALANCES):
        recipes = {"off": None, "on": Reconstruction(iterations=iterations)}
        if (bits, balance) == (4, "csb+ssc"):
            recipes["official recipe"] = official(iterations)
        for name, recipe in recipes.items():
            made[f"W{bits}A8|{balance}|{name}"] = {"weight_bits": bits, "balance": balance, "reconstruction": recipe}
    return made


def measure(dit: ptq.FloatDiT, seed: int, iterations: int, samples: int, widths: Sequence[int]) -> dict[str, Any]:
    """Figures of every cell for one seed."""
    base, key = ptq.QuantConfig(), jax.random.key(seed)
    rows = ptq.sample_trajectories(dit, key, base.walk, steps=base.calib_steps, rows=base.calib_rows)
    models, seconds = {}, {}
    for name, settings in cells(iterations, widths).items():
        started = time.perf_counter()
        models[name] = jax.block_until_ready(ptq.quantize(dit, ptq.QuantConfig(**settings), key=key, calibration=rows))
        seconds[name] = time.perf_counter() - started
        print(f"seed {seed}  {name}  {seconds[name]:.1f} s", flush=True)
    labels = np.arange(samples) % dit.config.num_classes
    comparison = compare(dit, models, labels=labels, key=jax.random.key(1000), steps=base.steps, cfg_scale=base.cfg_scale)
    return {
        name: {
            "sqnr_mean_db": f.sqnr_mean_db, "sqnr_pooled_db": f.sqnr_pooled_db, "psnr_db": f.psnr_interval.mean,
            "step_sqnr_db": f.step_sqnr_db.tolist(), "seconds": seconds.get(name),
        }
        for name, f in comparison.figures.items()
    }  # fmt: skip


def markdown(document: dict[str, Any]) -> str:
    """The table: mean over seeds, and in brackets the lowest and highest."""
    seeds = document["seeds"]

    def cell(name: str, figure: str) -> str:
        values = [run[name][figure] for run in seeds.values()]
        return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    lines = [
        f"`models/{document['model']}`, {document['iterations']:,} iterations a part, {len(seeds)} seeds (mean, lowest to "
        f"highest), SQNR of the predicted noise at 25 steps, {document['samples']} images, DDPM 50 steps, guidance 1.5; "
        f"{common.source(document)}.",
        "",
        f"| widths | balancing | reconstruction | {SQNR_MEAN} | {SQNR_POOLED} | PSNR of images (dB) |",
        "|---|---|---|---|---|---|",
    ]
    floor = ["bfloat16"] if all("bfloat16" in run for run in seeds.values()) else []
    for name in [*floor, *cells(document["iterations"], document["widths"])]:
        widths, balance, recipe = name.split("|") if "|" in name else (f"none: {name}", "", "")
        figures = " | ".join(cell(name, figure) for figure in ("sqnr_mean_db", "sqnr_pooled_db", "psnr_db"))
        lines.append(f"| {widths} | {balance} | {recipe} | {figures} |")
    return "\n".join(lines)


def joined(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Documents of the same run over different seeds or widths as one."""
    common.refuse_unlike(documents, _FIXED)
    seeds: dict[str, dict[str, Any]] = {}
    for document in documents:
        for seed, run in document["seeds"].items():
            seeds.setdefault(seed, {}).update(run)
    widths = sorted({bits for document in documents for bits in document["widths"]}, reverse=True)
    return {**documents[0], "widths": widths, "seeds": dict(sorted(seeds.items()))}


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], RESULTS)
    parser.add_argument("--model", default="photos", help="a folder in models/")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS), choices=BITS, help="widths of the weights")
    parser.add_argument("--join", type=Path, nargs="+", help="measure nothing: join these results and rewrite the page")
    arguments = parser.parse_args()
    if arguments.join:
        common.write(joined([json.loads(path.read_text()) for path in arguments.join]), arguments.out)
    else:
        run(arguments)
    text = markdown(json.loads(arguments.out.read_text()))
    print(text)
    if arguments.out == RESULTS:
        common.put_table(PAGE, "ablation.py", text)


def run(arguments: argparse.Namespace) -> None:
    """Measures the seeds that the results lack."""
    jax.config.update("jax_default_matmul_precision", "highest")  # the float reference in true float32
    document = {
        **common.header(arguments), "model": arguments.model, "iterations": arguments.iterations, "samples": arguments.samples,
        "widths": arguments.bits, "seeds": {},
    }  # fmt: skip
    if arguments.out.exists():
        stored = json.loads(arguments.out.read_text())
        if all(stored[key] == document[key] for key in (*_FIXED, "widths")):
            document = stored
    loaded = ptq.load(common.ROOT / "models" / arguments.model)
    assert isinstance(loaded, ptq.FloatDiT)
    dit = loaded.astype(np.float32)
    for seed in arguments.seeds:
        if str(seed) not in document["seeds"]:
            document["seeds"][str(seed)] = measure(dit, seed, arguments.iterations, arguments.samples, arguments.bits)
            common.write(document, arguments.out)


if __name__ == "__main__":
    main()
