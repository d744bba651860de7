"""Balancing x rounding x widths on a trained model, each with several seeds: the ablation that the papers leave out.

    python -m benchmarks.ablation --hardware "one NVIDIA H200"
    python -m benchmarks.ablation --balances csb+ssc search --roundings nearest gptq "adaround from gptq" \
        --out benchmarks/results/closed_form.json
    python -m benchmarks.ablation --salient --bits 8 4 --balances search --roundings gptq --out benchmarks/results/salient.json

A seed decides the calibration rows and the rows that an iteration of reconstruction draws. What is measured is the same for
all: the guided noise prediction at 25 steps of the float model's own trajectories, and images on the same noise. Results are
written after every seed, and a later run continues from them. The tables go into docs/ablation.md. The second form makes that
of rounding in closed form and of reconstruction from it, in minutes; the third that of the same network with salient channels.
The peers of every row are the other rows and the float model, in one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ptq4dit_jax as ptq
from benchmarks import common
from benchmarks.salient import salient_model
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.evaluation import SQNR_MEAN, SQNR_POOLED, compare

PAGE = common.ROOT / "docs" / "ablation.md"
RESULTS = common.RESULTS / "ablation.json"
#: The tables of the page by the results that they show.
TABLES = {
    RESULTS: "ablation.py",
    common.RESULTS / "closed_form.json": "ablation.py, from closed form",
    common.RESULTS / "salient.json": "ablation.py, salient channels",
}
BALANCES, BITS = ("none", "csb", "csb+ssc", "search"), (8, 4, 3)
OFFICIAL = "official recipe"
ROUNDINGS = ("nearest", "gptq", "adaround", "adaround from gptq", OFFICIAL)
#: What identifies a run that may be continued.
_FIXED = ("commit", "hardware", "jax", "model", "iterations", "samples")


def official(iterations: int) -> Reconstruction:
    """Rates, schedules and regularizer of the official code (method.md, 6.2). Its regularizer counts 0.01 a weight against an
    error summed over tokens; per weight, and with the error relative to nearest rounding, that is of the order of 1e4."""
    return Reconstruction(
        iterations=iterations,
        start="nearest",
        rounding_rate=1e-3,
        rounding_eps=1e-8,
        decay_rounding=False,
        scale_rate=4e-5,
        regularizer=1e4,
    )


def cells(iterations: int) -> dict[str, dict[str, Any]]:
    """Settings of every row of the table by its name."""
    recipes: dict[str, dict[str, Any]] = {
        "nearest": {"rounding": "nearest"},
        "gptq": {"rounding": "gptq"},
        "adaround": {"reconstruction": Reconstruction(iterations=iterations, start="nearest")},
        "adaround from gptq": {"reconstruction": Reconstruction(iterations=iterations, start="gptq")},
        OFFICIAL: {"reconstruction": official(iterations)},
    }
    return {
        f"W{bits}A8|{balance}|{name}": {"weight_bits": bits, "balance": balance, **recipes[name]}
        for bits, balance, name in itertools.product(BITS, BALANCES, ROUNDINGS)
        if name != OFFICIAL or (bits, balance) == (4, "csb+ssc")
    }


def measure(dit: ptq.FloatDiT, seed: int, samples: int, wanted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures of the wanted cells for one seed."""
    base, key = ptq.QuantConfig(), jax.random.key(seed)
    rows = ptq.sample_trajectories(dit, base.calibration, key=key)
    models, seconds = {}, {}
    for name, settings in wanted.items():
        started = time.perf_counter()
        config = ptq.QuantConfig.of(**settings)
        models[name] = jax.block_until_ready(ptq.quantize(dit, config, key=key, calibration=rows, keep_poor=True))
        seconds[name] = time.perf_counter() - started
        print(f"seed {seed}  {name}  {seconds[name]:.1f} s", flush=True)
    labels = np.arange(samples) % dit.config.num_classes
    comparison = compare(dit, models, labels=labels, key=jax.random.key(1000), sampling=base.calibration.sampling)
    return {
        name: {
            "sqnr_mean_db": f.sqnr_mean_db,
            "sqnr_pooled_db": f.sqnr_pooled_db,
            "psnr_db": f.psnr_interval.mean,
            "step_sqnr_db": f.step_sqnr_db.tolist(),
            "seconds": seconds.get(name),
        }
        for name, f in comparison.figures.items()
    }


def markdown(document: dict[str, Any]) -> str:
    """The table: mean over seeds, and in brackets the lowest and highest."""
    seeds = document["seeds"]

    def cell(name: str, figure: str) -> str:
        values = [run[name][figure] for run in seeds.values()]
        return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    measured = [name for name in ("bfloat16", *cells(document["iterations"])) if all(name in run for run in seeds.values())]
    learned = any("adaround" in name or OFFICIAL in name for name in measured)
    iterations = f"{document['iterations']:,} iterations per unit, " if learned else ""
    lines = [
        f"{document['model']}, {iterations}{len(seeds)} seeds (mean, lowest to highest), SQNR of the predicted noise "
        f"at 25 steps, {document['samples']} images, DDPM 50 steps, guidance 1.5; {common.source(document)}.",
        "",
        f"| widths | balancing | rounding | {SQNR_MEAN} | {SQNR_POOLED} | PSNR of images (dB) |",
        "|---|---|---|---|---|---|",
    ]
    for name in measured:
        widths, balance, rounding = name.split("|") if "|" in name else (f"none: {name}", "", "")
        figures = " | ".join(cell(name, figure) for figure in ("sqnr_mean_db", "sqnr_pooled_db", "psnr_db"))
        lines.append(f"| {widths} | {balance} | {rounding} | {figures} |")
    return "\n".join(lines)


def joined(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Documents of the same run over different seeds or cells as one."""
    common.refuse_unlike(documents, _FIXED)
    seeds: dict[str, dict[str, Any]] = {}
    for document in documents:
        for seed, run in document["seeds"].items():
            seeds.setdefault(seed, {}).update(run)
    return {**documents[0], "seeds": dict(sorted(seeds.items()))}


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], RESULTS)
    parser.add_argument("--model", default="photos", help="a folder in models/")
    parser.add_argument("--salient", action="store_true", help="with 2 %% of the channels made 30 times larger, one function")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS), choices=BITS, help="widths of the weights")
    parser.add_argument("--balances", nargs="+", default=list(BALANCES), choices=BALANCES)
    parser.add_argument("--roundings", nargs="+", default=list(ROUNDINGS), choices=ROUNDINGS)
    parser.add_argument("--join", type=Path, nargs="+", help="measure nothing: join these results and rewrite the page")
    arguments = parser.parse_args()
    if arguments.join:
        common.write(joined([json.loads(path.read_text()) for path in arguments.join]), arguments.out)
    else:
        run(arguments)
    text = markdown(json.loads(arguments.out.read_text()))
    print(text)
    if table := TABLES.get(arguments.out.resolve()):
        common.put_table(PAGE, table, text)


def run(arguments: argparse.Namespace) -> None:
    """Measures what the results lack of the wanted cells."""
    jax.config.update("jax_default_matmul_precision", "highest")  # the float reference in true float32
    document = {
        **common.header(arguments),
        "model": f"{arguments.model}, salient" if arguments.salient else arguments.model,
        "iterations": arguments.iterations,
        "samples": arguments.samples,
        "seeds": {},
    }
    document, _ = common.continued(document, arguments.out, _FIXED)
    chosen = itertools.product(arguments.bits, arguments.balances, arguments.roundings)
    names = {f"W{bits}A8|{balance}|{rounding}" for bits, balance, rounding in chosen}
    wanted = {name: settings for name, settings in cells(arguments.iterations).items() if name in names}
    loaded = ptq.load(common.ROOT / "models" / arguments.model)
    assert isinstance(loaded, ptq.FloatDiT)
    dit = loaded.astype(np.float32)
    if arguments.salient:
        dit = salient_model(dit)
    for seed in map(str, arguments.seeds):
        done = document["seeds"].get(seed, {})
        if missing := {name: settings for name, settings in wanted.items() if name not in done}:
            document["seeds"][seed] = {**done, **measure(dit, int(seed), arguments.samples, missing)}
            common.write(document, arguments.out)


if __name__ == "__main__":
    main()
