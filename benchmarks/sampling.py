"""Images per second of DiT-XL/2: our bfloat16, W8A8 and W4A8 beside compiled PyTorch, one GPU, one process tree.

    python -m benchmarks.sampling --hardware "one NVIDIA H200"

Every engine runs in a process of its own, one after another, on the same shapes, steps and guidance, with random weights (their
values do not change the time). Times are of whole chains, noise to latents; the first call, which compiles, is told apart.
Writes benchmarks/results/sampling.json and the table in README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ptq4dit_jax as ptq
from benchmarks import common
from ptq4dit_jax.dit import DiTConfig

PAGE = common.ROOT / "README.md"
RESULTS = common.RESULTS / "sampling.json"
ENGINES = {
    "bf16": "bfloat16, JAX with cuDNN attention",
    "w8a8": "**W8A8**",
    "w4a8": "**W4A8**",
    "torch": "bfloat16, PyTorch, torch.compile",
    "torch-graphs": "bfloat16, PyTorch, torch.compile with CUDA graphs",
}


def load(engine: str, config: DiTConfig) -> Any:
    """The model of one of our engines, with random weights."""
    dit = ptq.FloatDiT.init(config, jax.random.key(0))
    if engine == "bf16":
        return dit.astype(jnp.bfloat16)
    settings = ptq.QuantConfig(weight_bits=int(engine[1]), steps=4, calib_steps=2, calib_rows=4, step_groups=2)
    return ptq.quantize(dit, settings, key=jax.random.key(1)).astype(jnp.bfloat16)


def measure(engine: str, config: DiTConfig, guided: list[int], steps: int, repeats: int) -> list[dict[str, Any]]:
    """One entry for each number of guided images; runs in the engine's own process."""
    if engine.startswith("torch"):
        from benchmarks.peers import torch_dit

        return torch_dit.measure(config, guided, steps, repeats, "reduce-overhead" if engine == "torch-graphs" else None)
    model = load(engine, config)
    facts = {"weights_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model))}
    if isinstance(model, ptq.QuantizedDiT):
        facts["backend"] = model.backend_choice.name
    results = []
    for count in guided:
        labels = np.arange(count) % config.num_classes
        chain = lambda labels=labels: ptq.sample(model, labels, jax.random.key(2), steps=steps, cfg_scale=1.5)
        times = []
        for _ in range(1 + repeats):
            started = time.perf_counter()
            chain()
            times.append(time.perf_counter() - started)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        results.append({"guided": count, "first_s": times[0], "seconds": times[1:], "peak_bytes": peak, **facts})
    return results


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def markdown(document: dict[str, Any]) -> str:
    guided = document["guided"]
    lines = [
        f"{document['model']}, {document['input_size'] * 8} px, {document['steps']} DDPM steps, guided (two rows an image), "
        f"best of {document['repeats']}; {common.source(document)}.",
        "",
        "| milliseconds a step (images a second, 50 steps) | weights, GB | " + " | ".join(map(_images, guided)) + " |",
        "|---|---|" + "---|" * len(guided),
    ]
    for engine, entries in document["engines"].items():
        cells = []
        for entry in entries:
            step = min(entry["seconds"]) / document["steps"]
            cells.append(f"{1e3 * step:.1f} ({entry['guided'] / (50 * step):.2f})")
        lines.append(f"| {ENGINES[engine]} | {entries[0]['weights_bytes'] / 1e9:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], RESULTS)
    parser.add_argument("--model", default="DiT-XL/2")
    parser.add_argument("--input-size", type=int, default=32, help="side of the latent; 32 is 256 px, 64 is 512 px")
    parser.add_argument("--guided", type=int, nargs="+", default=[1, 8, 64], help="images, each with its unconditional twin")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--table-only", action="store_true", help="only rewrite the table from the stored results")
    arguments = parser.parse_args()
    if arguments.child:
        config = DiTConfig.preset(arguments.model, input_size=arguments.input_size)
        found = measure(arguments.child, config, arguments.guided, arguments.steps, arguments.repeats)
        print(json.dumps(found))
        return
    if not arguments.table_only:
        run(arguments)
    text = markdown(json.loads(arguments.out.read_text()))
    print(text)
    if arguments.out == RESULTS:
        common.put_table(PAGE, "sampling.py", text)


def run(arguments: argparse.Namespace) -> None:
    """Measures engine by engine, saving after each."""
    settings = {name: getattr(arguments, name) for name in ("model", "input_size", "guided", "steps", "repeats")}
    document: dict[str, Any] = {**common.header(arguments), **settings, "engines": {}}
    options = [
        f"--model={arguments.model}", f"--input-size={arguments.input_size}", f"--steps={arguments.steps}",
        f"--repeats={arguments.repeats}", "--guided", *map(str, arguments.guided),
    ]  # fmt: skip
    for engine in arguments.engines:
        command = [sys.executable, "-m", "benchmarks.sampling", "--child", engine, *options]
        child = subprocess.run(command, cwd=common.ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if child.returncode:
            print(f"{engine} failed; it is left out of the table")
            continue
        document["engines"][engine] = json.loads(child.stdout.splitlines()[-1])
        common.write(document, arguments.out)
        print(
            engine,
            [f"{min(e['seconds']) / arguments.steps * 1e3:.2f} ms a step" for e in document["engines"][engine]],
            flush=True,
        )


if __name__ == "__main__":
    main()
