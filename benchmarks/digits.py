"""The table in the card of models/digits: balancing x rounding x widths, measured on one set of noise.

    python -m benchmarks.digits --hardware "one NVIDIA H200"

Writes benchmarks/results/digits.json and puts the table between the markers in models/digits/README.md. The peer of every
row is the float model in the same run.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

import ptq4dit_jax as ptq
from benchmarks import common
from models.digits.classifier import train_classifier
from ptq4dit_jax.config import BalancingMethod, Rounding
from ptq4dit_jax.evaluation import SQNR_MEAN, SQNR_POOLED, compare

CARD = common.ROOT / "models" / "digits" / "README.md"
RESULTS = common.RESULTS / "digits.json"
#: The default, and what it is instead of.
WAYS: tuple[tuple[BalancingMethod, Rounding], ...] = (
    ("search", "gptq"),
    ("csb+ssc", "gptq"),
    ("search", "nearest"),
    ("csb+ssc", "nearest"),
)
PAPER: tuple[BalancingMethod, ...] = ("none", "csb", "csb+ssc")


def settings() -> dict[str, ptq.QuantConfig]:
    """Of every quantized model by its name: the defaults first, then what they changed, then the paper's."""
    made = {}
    for bits in (8, 4, 3):
        for balance, rounding in WAYS:
            made[f"W{bits}A8 {balance}, {rounding}"] = ptq.QuantConfig.of(weight_bits=bits, balance=balance, rounding=rounding)
    for bits in (8, 4):
        for balance in PAPER:
            made[f"paper W{bits}A8 {balance}, nearest"] = ptq.QuantConfig.paper(weight_bits=bits, balance=balance)
    return made


def measure(samples: int) -> list[dict[str, Any]]:
    """One row per model: the float model, its bfloat16 noise floor, and every quantized one."""
    dit = ptq.load(common.ROOT / "models" / "digits")
    assert isinstance(dit, ptq.FloatDiT)
    base = ptq.QuantConfig()
    rows = ptq.sample_trajectories(dit, base.calibration, key=jax.random.key(0))
    models: dict[str, Any] = {}
    for name, config in settings().items():
        models[name] = ptq.quantize(dit, config, key=jax.random.key(0), calibration=rows, keep_poor=True)
    labels = np.arange(samples) % dit.config.num_classes
    comparison = compare(dit, models, labels=labels, key=jax.random.key(1), sampling=base.calibration.sampling)
    judge = train_classifier()
    recognized = {name: float(np.mean(judge.predict(images) == labels)) for name, images in comparison.images.items()}
    table = [{"model": "float32", "bytes": comparison.reference_bytes, "recognized": recognized["float32"]}]
    for name, f in comparison.figures.items():
        table.append(
            {
                "model": name,
                "bytes": f.num_bytes,
                "recognized": recognized[name],
                "sqnr_mean_db": f.sqnr_mean_db,
                "sqnr_pooled_db": f.sqnr_pooled_db,
                "step_sqnr_db": f.step_sqnr_db.tolist(),
                "psnr_db": f.psnr_interval._asdict(),
                "ssim": f.ssim_interval._asdict(),
            }
        )
    return table


def markdown(document: dict[str, Any]) -> str:
    lines = [
        f"{document['samples']} images, DDPM 50 steps, guidance 1.5, the same noise for all; SQNR of the predicted noise at 25 "
        f"steps; {common.source(document)}.",
        "",
        f"| model | MB | {SQNR_MEAN} | {SQNR_POOLED} | PSNR of images, dB (95 %) | SSIM | recognized |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["table"]:
        figures = "| | | | "
        if "psnr_db" in row:
            psnr = common.with_interval(row["psnr_db"])
            figures = f"| {row['sqnr_mean_db']:.1f} | {row['sqnr_pooled_db']:.1f} | {psnr} | {row['ssim']['mean']:.4f} "
        lines.append(f"| {row['model']} | {row['bytes'] / 1e6:.2f} {figures}| {row['recognized']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], RESULTS)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--card-only", action="store_true", help="only rewrite the card from the stored results")
    arguments = parser.parse_args()
    if not arguments.card_only:
        jax.config.update("jax_default_matmul_precision", "highest")  # the float reference in true float32
        document = {**common.header(arguments), "samples": arguments.samples, "table": measure(arguments.samples)}
        common.write(document, arguments.out)
        print(markdown(document))
    if arguments.out == RESULTS:
        common.put_table(CARD, "digits.py", markdown(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
