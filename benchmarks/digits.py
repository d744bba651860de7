"""The table in the card of models/digits: balancing x widths, measured on one set of noise.

    python -m benchmarks.digits --hardware "one NVIDIA H200"

Writes benchmarks/results/digits.json and puts the table between the markers in models/digits/README.md. The peer of every
row is the float model in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ptq4dit_jax as ptq
from models.digits.classifier import train_classifier
from ptq4dit_jax.evaluation import compare

ROOT = Path(__file__).parent.parent
CARD = ROOT / "models" / "digits" / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "digits.json"
MARKERS = ("<!-- table: benchmarks/digits.py -->", "<!-- end of table -->")


def measure(samples: int) -> list[dict[str, Any]]:
    """One row per model: the float model, its bfloat16 noise floor, and every quantized one."""
    dit = ptq.load(ROOT / "models" / "digits")
    assert isinstance(dit, ptq.FloatDiT)
    base = ptq.QuantConfig()
    rows = ptq.sample_trajectories(dit, jax.random.key(0), base.walk, steps=base.calib_steps, rows=base.calib_rows)
    models: dict[str, Any] = {}
    for settings, make in (("default", ptq.QuantConfig), ("paper", ptq.QuantConfig.paper)):
        for bits in (8, 4):
            for balance in ("none", "csb", "csb+ssc"):
                config = make(weight_bits=bits, balance=balance)
                models[f"{settings} W{bits}A8 {balance}"] = ptq.quantize(dit, config, key=jax.random.key(0), calibration=rows)
    labels = np.arange(samples) % dit.config.num_classes
    comparison = compare(dit, models, labels=labels, key=jax.random.key(1), steps=base.steps, cfg_scale=base.cfg_scale)
    judge = train_classifier()
    recognized = {name: float(np.mean(judge.predict(images) == labels)) for name, images in comparison.images.items()}
    table = [{"model": "float32", "bytes": comparison.reference_bytes, "recognized": recognized["float32"]}]
    for name, f in comparison.figures.items():
        table.append({
            "model": name, "bytes": f.num_bytes, "recognized": recognized[name],
            "sqnr_mean_db": float(np.mean(f.step_sqnr_db)), "sqnr_pooled_db": f.sqnr_db,
            "psnr_db": f.psnr_interval._asdict(), "ssim": f.ssim_interval._asdict(),
        })  # fmt: skip
    return table


def markdown(document: dict[str, Any]) -> str:
    lines = [
        f"{document['samples']} images, DDPM 50 steps, guidance 1.5, the same noise for all; {document['hardware']}, "
        f"{document['date']}, commit {document['commit']}, JAX {document['jax']}.",
        "",
        "| model | MB | SQNR of noise, dB | PSNR of images, dB (95 %) | SSIM | recognized |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["table"]:
        figures = "| | | "
        if "psnr_db" in row:
            p = row["psnr_db"]
            psnr = f"{p['mean']:.1f} ({p['low']:.1f} to {p['high']:.1f})"
            figures = f"| {row['sqnr_mean_db']:.1f} | {psnr} | {row['ssim']['mean']:.4f} "
        lines.append(f"| {row['model']} | {row['bytes'] / 1e6:.2f} {figures}| {row['recognized']:.1%} |")
    return "\n".join(lines)


def write_card(document: dict[str, Any]) -> None:
    """Puts the table between the markers of the card."""
    head, rest = CARD.read_text().split(MARKERS[0])
    CARD.write_text(f"{head}{MARKERS[0]}\n{markdown(document)}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--hardware", help="the hardware in words")
    parser.add_argument("--commit", help="default: asked from git")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--card-only", action="store_true", help="only rewrite the card from the stored results")
    arguments = parser.parse_args()
    if not arguments.card_only:
        jax.config.update("jax_default_matmul_precision", "highest")  # the float reference in true float32
        commit = (
            arguments.commit or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=ROOT).strip()
        )
        document = {
            "date": datetime.date.today().isoformat(), "commit": commit, "jax": jax.__version__,
            "hardware": arguments.hardware or jax.devices()[0].device_kind, "samples": arguments.samples,
            "table": measure(arguments.samples),
        }  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
        print(markdown(document))
    if arguments.out == RESULTS:
        write_card(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
