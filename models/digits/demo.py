"""The demo: a trained DiT becomes an integer model by PTQ4DiT, is saved, loaded again, and sampled beside its float original.

make demo        (or: python -m models.digits.demo --out out/demo)
"""

from __future__ import annotations

import ptq4dit_start

if __name__ == "__main__":
    ptq4dit_start.take_signals()

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ptq4dit_jax as ptq
from models.digits.classifier import train_classifier
from ptq4dit_jax import ending
from ptq4dit_jax.engine import describe
from ptq4dit_jax.evaluation import SQNR_MEAN, SQNR_POOLED, compare, sample_grid, write_report
from ptq4dit_jax.progress import StageProgress
from ptq4dit_jax.terminal import console, devices_line, megabytes, print_table, stages
from ptq4dit_jax.unfinished import expect

MODEL = Path(__file__).parent
SAMPLES_PER_CLASS = 10


def _report_under(report: StageProgress, name: str, stage: str, done: int, total: int, note: str = "") -> None:
    report(f"{name}: {stage}", done, total, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for models, picture and report")
    out = parser.parse_args().out
    expect(out / "digits-w8a8", out / "digits-w4a8", out / "samples.png", out / "report")
    started = time.perf_counter()
    key = jax.random.key(0)

    dit = ptq.load(MODEL)
    assert isinstance(dit, ptq.FloatDiT)
    console.print(f"ptq4dit_jax on {devices_line()}: DiT on handwritten digits, {dit.num_params / 1e6:.2f} M parameters")
    settings = [ptq.QuantConfig.of(weight_bits=bits).resolve(dit.schedule, dit.config) for bits in (8, 4)]
    console.print("Calibrating on the float model's own sampling, then quantizing twice from the same rows")
    models: dict[str, Any] = {}
    with stages() as report:
        calibration = settings[0].calibration
        rows = ptq.sample_trajectories(dit, calibration, key=key, progress=partial(report, "sample calibration rows"))
        for config in settings:
            name = f"W{config.weights.bits}A{config.activations.bits}"
            quantized = ptq.quantize(
                dit,
                config,
                key=key,
                calibration=rows,
                progress=partial(_report_under, report, name),
            )
            folder = ptq.save(quantized, out / f"digits-{name.lower()}", provenance={"source": "models/digits"}, overwrite=True)
            models[name] = ptq.load(folder)
        labels = np.repeat(np.arange(10), SAMPLES_PER_CLASS)
        comparison = compare(
            dit,
            models,
            labels=labels,
            key=jax.random.key(1),
            sampling=calibration.sampling,
            progress=report,
        )

    layers = describe(models["W4A8"])
    integer = sum(layer.integer for layer in layers)
    console.print(f"W4A8: {integer} of {len(layers)} kinds of product run int8 x int8 -> int32; the others are fed by floats:")
    console.print("  " + ", ".join(layer.layer for layer in layers if not layer.integer))

    judge = train_classifier()
    recognized = {name: float(np.mean(judge.predict(images) == labels)) for name, images in comparison.images.items()}
    table = [
        {
            "model": "float",
            "size": megabytes(comparison.reference_bytes),
            SQNR_MEAN: "",
            SQNR_POOLED: "",
            "PSNR of images (dB)": "",
            "SSIM": "",
            "recognized": f"{recognized['float32']:.1%}",
        }
    ]
    for name, figures in comparison.figures.items():
        table.append(
            {
                "model": name,
                "size": megabytes(figures.num_bytes),
                SQNR_MEAN: f"{figures.sqnr_mean_db:.1f}",
                SQNR_POOLED: f"{figures.sqnr_pooled_db:.1f}",
                "PSNR of images (dB)": f"{figures.psnr_interval.mean:.1f}",
                "SSIM": f"{figures.ssim_interval.mean:.3f}",
                "recognized": f"{recognized[name]:.1%}",
            }
        )
    how = calibration.sampling.resolve(dit.schedule, dit.config)
    print_table(f"{len(labels)} images, {how}, same noise", table)
    console.print("SQNR: of the guided noise prediction. bfloat16 shows the noise floor.")

    first_of_class = np.arange(10) * SAMPLES_PER_CLASS
    shown = {name: comparison.images[name][first_of_class] for name in ("float32", *models)}
    picture = out / "samples.png"
    sample_grid(shown, np.arange(10)).save(picture)
    page = write_report(
        out / "report",
        comparison,
        title="Digits: W8A8 and W4A8 against float",
        describe_rows=layers,
        settings=settings[1].to_dict(),
        rounding=models["W4A8"].provenance.facts.get("rounding"),
        balancing=models["W4A8"].provenance.facts.get("balancing"),
        overwrite=True,
    )
    console.print(f"Models:  {out / 'digits-w8a8'}, {out / 'digits-w4a8'}")
    console.print(f"Picture: {picture}")
    console.print(f"Report:  {page / 'report.md'}")
    console.print(f"Done in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    ending.run(main)
