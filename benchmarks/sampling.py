"""Images per second of DiT-XL/2: our bfloat16, W8A8 and W4A8 beside what else one would use, on one GPU.

    python -m benchmarks.sampling --hardware "one NVIDIA H200"
    python -m benchmarks.sampling --hardware "one NVIDIA H200" --engines qwix torchao-int8 --out part.json
    python -m benchmarks.sampling --join benchmarks/results/sampling.json part.json

Every engine runs in a process of its own, one after another, on the same shapes, steps and guidance, with random weights (their
values do not change the time). Times are of whole chains, noise to latents; the first call, which compiles, is told apart.
PyTorch's and Qwix's engines need the extra ``peers``; one that fails is reported, and what it had measured before stays.

Peak memory is that of sampling, without compiling, tuning and quantization. JAX's counter cannot be reset, so there it is what
the compiled chain takes: arguments (the weights), results, and the buffer for all between, which XLA plans beforehand and
allocates in one piece. PyTorch's counter can, and counts the same at run time: weights, and what lives beside them.

Writes benchmarks/results/sampling.json (256 px; sampling_512.json with --input-size 64) after every measurement, and the tables
in README.md and docs/kernels.md with the picture docs/speed.png.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from os import killpg
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ptq4dit_jax as ptq
from benchmarks import common, sampling_tables
from benchmarks.sampling_tables import ENGINES
from ptq4dit_jax.networks.dit import DiTConfig


def load(engine: str, config: DiTConfig) -> tuple[Any, dict[str, Any]]:
    """The model of a JAX engine with random weights, and what is worth knowing about it."""
    dit = ptq.FloatDiT.init(config, key=jax.random.key(0))
    if engine == "bf16":
        return dit.astype(jnp.bfloat16), {}
    if engine == "qwix":
        from benchmarks.peers import qwix_dit

        quantized = qwix_dit.quantize(dit)
        products = qwix_dit.integer_products(quantized)
        if products != len(qwix_dit.LAYERS):
            raise RuntimeError(f"Qwix made {products} integer products of a block's {len(qwix_dit.LAYERS)} linear layers.")
        return quantized, {"software": {"Qwix": importlib.metadata.version("qwix")}}
    settings = ptq.QuantConfig.of(
        weight_bits=int(engine[1]),
        steps=4,
        calib_steps=2,
        calib_rows=4,
        step_groups=2,
        range_search="minmax",
        balance="csb+ssc",
        rounding="nearest",
    )
    model = ptq.quantize(dit, settings, key=jax.random.key(1)).astype(jnp.bfloat16)
    return model, {"backend": model.backend_choice.name}


def measure(engine: str, config: DiTConfig, guided: list[int], steps: int, repeats: int) -> Iterator[dict[str, Any]]:
    """One entry for each number of guided images; runs in the engine's own process."""
    if engine.startswith("torch"):
        yield from _measure_torch(engine, config, guided, steps, repeats)
        return
    model, facts = load(engine, config)
    facts["weights_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    for count in guided:
        entry, programs = timed(model, count, steps, repeats)
        yield {**entry, "sampling_bytes": _bytes(programs[0]) if len(programs) == 1 else None, **facts}


def timed(model: Any, guided: int, steps: int, repeats: int, **more: Any) -> tuple[dict[str, Any], list[Any]]:
    """One entry: the times of whole chains, the first of which compiles; and the compiled chains that this made. The sampler
    takes ``more`` arguments."""
    labels = np.arange(guided) % model.config.num_classes
    others, times = _samplers(), []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        ptq.sample(model, labels, key=jax.random.key(2), steps=steps, cfg_scale=1.5, **more)
        times.append(time.perf_counter() - started)
    made = [program for program in _samplers() if program not in others]
    return {"guided": guided, "first_s": times[0], "seconds": times[1:]}, made


def _measure_torch(engine: str, config: DiTConfig, guided: list[int], steps: int, repeats: int) -> Iterator[dict[str, Any]]:
    from benchmarks.peers import torch_dit

    recipe: dict[str, Any] = {"options": torch_dit.GRAPHS if engine == "torch-graphs" else None}
    if engine.startswith("torchao"):
        from benchmarks.peers import torchao_dit

        recipe = torchao_dit.RECIPES[engine]
    yield from torch_dit.measure(config, guided, steps, repeats, **recipe)


def _samplers() -> list[Any]:
    """The compiled chains that are alive: asked for afterwards, the program that ran need not be compiled a second time."""
    programs = jax.devices()[0].client.live_executables()
    return [program for program in programs if program.hlo_modules()[0].name == "jit_sample_batch"]


def _bytes(program: Any) -> int:
    """What a program takes while it runs."""
    stats = program.get_compiled_memory_stats()
    taken = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return taken - stats.alias_size_in_bytes


def child(arguments: argparse.Namespace) -> int:
    """Measures one engine and prints each entry as a line of JSON, or the error."""
    config = DiTConfig.preset(arguments.model, input_size=arguments.input_size)
    try:
        for entry in measure(arguments.child, config, arguments.guided, arguments.steps, arguments.repeats):
            print(json.dumps(entry), flush=True)
    except Exception as error:
        traceback.print_exc()
        reason = str(error).strip().partition("\n")[0]  # what follows an error's first line is advice
        print(json.dumps({"failed": f"{type(error).__name__}: {reason}"}), flush=True)
        return 1
    return 0


def entries(engine: str, options: list[str], limit: float) -> Iterator[dict[str, Any]]:
    """What the engine's process prints, as it comes; ``{"failed": reason}`` at the end if it does not end well."""
    command = [sys.executable, "-m", "benchmarks.sampling", "--child", engine, *options]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, process_group=0)

        def stop() -> None:  # with the workers that torch.compile starts
            with suppress(ProcessLookupError):
                killpg(process.pid, signal.SIGKILL)

        timer, reason = threading.Timer(limit, stop), ""
        timer.start()
        try:
            assert process.stdout is not None
            for line in filter(lambda line: line.startswith("{"), process.stdout):
                entry = json.loads(line)
                reason = entry.get("failed", "")
                if not reason:
                    yield entry
            status, late = process.wait(), not timer.is_alive()
        finally:
            timer.cancel()
            if process.poll() is None:
                stop()
        if status:
            errors.seek(0)
            told = errors.read().strip().splitlines()[-20:]
            print("\n".join(told), file=sys.stderr)
            last = told[-1] if told else f"exit status {status}"
            yield {"failed": f"took longer than {limit:g} s" if late else reason or last}


def run(arguments: argparse.Namespace, out: Path) -> None:
    """Measures engine by engine, saving after each number of images."""
    settings = {name: getattr(arguments, name) for name in ("model", "input_size", "guided", "steps", "repeats")}
    document: dict[str, Any] = {**common.header(arguments), **settings, "engines": {}, "failed": {}}
    options = [
        f"--model={arguments.model}",
        f"--input-size={arguments.input_size}",
        f"--steps={arguments.steps}",
        f"--repeats={arguments.repeats}",
        "--guided",
        *map(str, arguments.guided),
    ]
    for engine in arguments.engines:
        started = time.perf_counter()
        for entry in entries(engine, options, arguments.limit):
            if "failed" in entry:
                document["failed"][engine] = entry["failed"]
                finished = len(document["engines"].get(engine, []))
                print(f"{engine} failed after {finished} of {len(arguments.guided)} sizes: {entry['failed']}", flush=True)
            else:
                document["engines"].setdefault(engine, []).append(entry)
                step = 1e3 * min(entry["seconds"]) / arguments.steps
                print(f"{engine}, {entry['guided']}: {step:.2f} ms a step, {entry['first_s']:.0f} s the first", flush=True)
            common.write(document, out)
        print(f"{engine}: {time.perf_counter() - started:.0f} s in all", flush=True)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], None)
    common.add_sampling_options(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--limit", type=float, default=400, help="seconds for an engine, after which it counts as failed")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--join", type=Path, nargs="+", help="measure nothing: join these results and rewrite the tables")
    parser.add_argument("--table-only", action="store_true", help="only rewrite the tables from the stored results")
    arguments = parser.parse_args()
    if arguments.child:
        sys.exit(child(arguments))
    out = arguments.out or sampling_tables.results(arguments.input_size)
    if arguments.join:
        document = sampling_tables.joined([json.loads(path.read_text()) for path in arguments.join])
        out = arguments.out or sampling_tables.results(document["input_size"])
        common.write(document, out)
    elif not arguments.table_only:
        run(arguments, out)
    document = json.loads(out.read_text())
    print(sampling_tables.full(document))
    if out == sampling_tables.results(document["input_size"]):
        sampling_tables.put()


if __name__ == "__main__":
    main()
