"""e4m3 beside the integers that it is derived from: quality on the shipped models, and the time of DiT-XL/2.

    python -m benchmarks.fp8 --quality digits --hardware "two cores of an AMD EPYC"
    python -m benchmarks.fp8 --quality photos --times --hardware "one NVIDIA H200"

Quality is that of models quantized as by default, against the float model on the same noise. On a CPU they compute in float32
between the products, elsewhere in bfloat16. Times are of whole chains with random weights, noise to latents; their rows say
what multiplies: the kernels that XLA's program calls by name.

Writes benchmarks/results/fp8.json after every part, each with its own date, commit and hardware; a part that is measured again
replaces the former. The tables are in docs/fp8.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ptq4dit_jax as ptq
from benchmarks import common, sampling
from ptq4dit_jax.devices import default_kind
from ptq4dit_jax.evaluation import NOISE_FLOOR, SQNR_MEAN, SQNR_POOLED, compare
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.terminal import runs_line

PAGE, RESULTS = common.ROOT / "docs" / "fp8.md", common.RESULTS / "fp8.json"
#: What the rows of quality and of time are, by backend.
PRODUCTS = {"auto": "integers", "fp8": "e4m3"}


def quality(name: str, samples: int, seed: int) -> dict[str, Any]:
    """Figures of the models quantized from a shipped one, by widths and products."""
    dit = ptq.load(common.ROOT / "models" / name)
    assert isinstance(dit, ptq.FloatDiT)
    dit = dit.astype(jnp.float32)
    base, dtype = ptq.QuantConfig(), "float32" if default_kind().platform == "cpu" else "bfloat16"
    rows = ptq.sample_trajectories(dit, base.calibration, key=jax.random.key(0))
    models: dict[str, Any] = {}
    for bits in (8, 4):
        config = ptq.QuantConfig.of(weight_bits=bits)
        made = ptq.quantize(dit, config, key=jax.random.key(0), calibration=rows, keep_poor=True).astype(dtype)
        models |= {f"W{bits}A8, {what}": made.replace(backend=backend) for backend, what in PRODUCTS.items()}
        print(f"{name}: W{bits}A8 is quantized", flush=True)
    labels = np.arange(samples) % dit.config.num_classes
    found = compare(dit, models, labels=labels, key=jax.random.key(seed), sampling=base.calibration.sampling)
    table = {
        model: {
            "runs": runs_line(models[model]) if model in models else "",
            "sqnr_mean_db": figures.sqnr_mean_db,
            "sqnr_pooled_db": figures.sqnr_pooled_db,
            "psnr_db": figures.psnr_interval._asdict(),
            "ssim": figures.ssim_interval.mean,
        }
        for model, figures in found.figures.items()
    }
    return {"samples": samples, "dtype": dtype, "sampling": found.settings["steps"], "table": table}


def times(model: str, guided: int, steps: int, repeats: int) -> dict[str, Any]:
    """Times of whole chains of a published size with random weights, by model; one that fails says why."""
    config, table = DiTConfig.preset(model), dict[str, dict[str, Any]]()
    bf16, _ = sampling.load("bf16", config)
    w8a8, _ = sampling.load("w8a8", config)
    w4a8, _ = sampling.load("w4a8", config)
    models: dict[str, Any] = {"bfloat16": bf16}
    for name, made in (("W8A8", w8a8), ("W4A8", w4a8)):
        models |= {f"{name}, {what}": made.replace(backend=backend) for backend, what in PRODUCTS.items()}
    for name, each in models.items():
        try:
            entry, programs = sampling.timed(each, guided, steps, repeats)
        except Exception as error:  # the others are worth measuring all the same
            table[name] = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        else:
            kernels = called(programs[0].hlo_modules()[0].to_string()) if len(programs) == 1 else {}
            table[name] = {**entry, "step_s": min(entry["seconds"]) / steps, "runs": runs_line(each), "kernels": kernels}
        print(f"{name}: {table[name].get('failed') or table[name]['seconds']}", flush=True)
    return {"model": model, "guided": guided, "steps": steps, "repeats": repeats, "table": table}


def called(program: str) -> dict[str, int]:
    """How often each kernel is called in the text of a compiled program: calls by name, and fusions of a kind of their own."""
    names = re.findall(r'custom_call_target="([^"]+)"', program) + re.findall(r'"kind":"(__[a-z0-9_]+)"', program)
    return dict(Counter(names).most_common())


def table_of_quality(part: dict[str, Any]) -> str:
    lines = [
        f"{part['samples']} images, {part['sampling']} steps, {part['dtype']} between products; SQNR of predictions at 25 "
        f"steps; {common.source(part)}.",
        "",
        f"| model, products | {SQNR_MEAN} | {SQNR_POOLED} | PSNR of images, dB (95 %) | SSIM |",
        "|---|---|---|---|---|",
    ]
    for name, row in part["table"].items():
        what = "bfloat16, for comparison" if name == NOISE_FLOOR else name
        lines.append(
            f"| {what} | {row['sqnr_mean_db']:.1f} | {row['sqnr_pooled_db']:.1f} "
            f"| {common.with_interval(row['psnr_db'])} | {row['ssim']:.4f} |"
        )
    return "\n".join(lines)


def table_of_times(part: dict[str, Any]) -> str:
    lines = [
        f"{part['model']}, 256 px, {part['guided']} guided images, {part['steps']} steps, best of {part['repeats']}; "
        f"{common.source(part)}.",
        "",
        "| model, products | ms a step | runs | kernels called by the program |",
        "|---|---|---|---|",
    ]
    for name, row in part["table"].items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed']} | | |")
            continue
        kernels = ", ".join(f"{count} `{kernel}`" for kernel, count in row["kernels"].items())
        lines.append(f"| {name} | {1e3 * row['step_s']:.2f} | {row['runs']} | {kernels} |")
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], RESULTS)
    parser.add_argument("--quality", nargs="*", default=[], choices=["digits", "photos"], help="shipped models to quantize")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1, help="of the noise of the compared images")
    parser.add_argument("--times", action="store_true", help="measure the time of a published size")
    parser.add_argument("--model", default="DiT-XL/2")
    parser.add_argument("--guided", type=int, default=64, help="images, each with its unconditional twin")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table-only", action="store_true", help="only rewrite the tables from the stored results")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if not arguments.table_only:
        run(arguments, document)
    for name, part in document.items():
        text = (table_of_times if name == "times" else table_of_quality)(part)
        print(f"\n{name}\n\n{text}")
        if out == RESULTS:
            common.put_table(PAGE, f"fp8.py, {name}", text)


def run(arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    """Measures the parts that are asked for, and stores each."""
    if not (arguments.quality or arguments.times):
        raise SystemExit("Error: name what to measure, with --quality digits, --quality photos or --times.")
    for name in arguments.quality:
        document[name] = {**common.header(arguments), **quality(name, arguments.samples, arguments.seed)}
        common.write(document, arguments.out)
    if arguments.times:
        measured = times(arguments.model, arguments.guided, arguments.steps, arguments.repeats)
        document["times"] = {**common.header(arguments), **measured}
        common.write(document, arguments.out)


if __name__ == "__main__":
    main()
