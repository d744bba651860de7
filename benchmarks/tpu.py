"""What the compiler for TPUs makes of DiT-XL/2's sampler, on a machine without a TPU; with --run, times on a machine with one.

    python -m benchmarks.tpu                                                  # all 108 rows, an hour on two cores
    python -m benchmarks.tpu --generations v5e --chips 1 --images 8 --models w8a8 --depth 2 --out quick.json
    python -m benchmarks.tpu --run --hardware "one TPU v5e"                   # needs the TPU

Needs libtpu, the extra ``tpu``; no weights are made. A row says for one step of the chain how many bytes go to and from HBM and
what the compiler estimates, and for the program its peak memory, its collectives and the types of its products;
``benchmarks/hlo_schedule.py`` says how bytes and cycles are counted. An estimate compares two programs for one chip; it is no
time. On GPUs and CPUs there is none.

Writes benchmarks/results/tpu.json after every row, and the table in docs/tpu.md. A run of the same commit, compiler and
settings continues: it compiles the rows that are missing. ``--run`` writes tpu_run.json and the page's other table. Models that
multiply e4m3 are compiled where they are asked for, and go into docs/fp8.md:

    python -m benchmarks.tpu --generations tpu7x --chips 1 --images 1 64 --models bf16 w8a8 w8a8-e4m3 w4a8-e4m3 \\
      --out benchmarks/results/tpu_e4m3.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import ptq4dit_jax as ptq
from benchmarks import aot, common, hlo, hlo_schedule, sampling
from ptq4dit_jax import sharding
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.engine import QuantizedDiT
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig

PAGE = common.ROOT / "docs" / "tpu.md"
RESULTS, RUNS = common.RESULTS / "tpu.json", common.RESULTS / "tpu_run.json"
#: The same with models that multiply e4m3, and the page that shows them.
RESULTS_E4M3, PAGE_E4M3 = common.RESULTS / "tpu_e4m3.json", common.ROOT / "docs" / "fp8.md"
NEVER_RUN = "compiled, never run"
MODELS = {"bf16": "bfloat16", "w8a8": "W8A8", "w4a8": "W4A8", "w8a8-e4m3": "W8A8 as e4m3", "w4a8-e4m3": "W4A8 as e4m3"}
#: Those that no backend but ``fp8`` runs; only where they are asked for.
_E4M3 = "-e4m3"
#: Cycles a second with which an estimate becomes milliseconds: the published peak over what the matrix units do in a cycle. Of
#: Ironwood neither is public enough, so its estimates stay in cycles.
CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
#: Published peaks for bfloat16, flop/s, and of HBM, byte/s, of a chip: what bounds kernels, which the estimate leaves out.
PEAKS = {"v5e": (197e12, 819e9), "v5p": (459e12, 2765e9), "v6e": (918e12, 1640e9)}
#: What identifies a run that may be continued.
_FIXED = ("commit", "jax", "libtpu", "model", "input_size", "depth", "steps")
_FIXED_RUN = ("commit", "jax", "hardware", "devices", "model", "input_size", "depth", "steps", "repeats")


def by_backend(name: str, load: Callable[[str], Any]) -> Any:
    """Returns one of :data:`MODELS`, which ``load`` makes by the name of its integers, run by the backend that it is for."""
    made = load(name.removesuffix(_E4M3))
    return made.replace(backend="fp8") if name.endswith(_E4M3) else made


def abstract(name: str, network: DiTConfig) -> FloatDiT | QuantizedDiT:
    """Returns one of :data:`MODELS` with shapes as leaves, computing in bfloat16 between integer products."""
    if name == "bf16":
        return aot.float_model(network, "bfloat16")
    settings = ptq.QuantConfig.of(weight_bits=int(name[1]))
    return by_backend(name, lambda _: aot.quantized_model(network, settings, "bfloat16"))


def compiled(generation: str, chips: int, name: str, network: DiTConfig, images: int, steps: int) -> dict[str, Any]:
    """Returns the row of one program; ``images`` are guided, on each device."""
    devices = aot.devices(generation, chips)
    lowered = aot.sampler(abstract(name, network), devices, images, Sampling(steps=steps))
    row = {"generation": generation, "chips": chips, "devices": len(devices), "model": name, "images": images}
    started = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if "RESOURCE_EXHAUSTED" not in reason:
            raise
        return {**row, "status": NEVER_RUN, "failed": reason}
    seconds, memory = time.perf_counter() - started, program.memory_analysis()
    return {
        **row,
        "status": NEVER_RUN,
        "compile_s": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        **figures(program.as_text(), steps, generation),
    }


def figures(text: str, steps: int, generation: str) -> dict[str, Any]:
    """Returns what the text of a sampler's program says, of one step where it says so."""
    module = hlo.parse(text)
    ran = hlo_schedule.operations(module)
    loop = hlo_schedule.longest_loop(ran)
    if loop.trips != steps:
        raise ValueError(f"The longest loop runs {loop.trips} times where the chain has {steps} steps.")
    inside = [operation for operation in ran if operation.loops[:1] == (loop,)]
    cycles = sum(operation.cycles for operation in inside)
    return {
        "hbm_bytes_step": sum(operation.bytes for operation in inside) / steps,
        "cycles_step": cycles / steps or None,
        "kernels_step_s": kernel_seconds(inside, generation, steps),
        "collectives": dict(module.collectives),
        "products": dict(Counter(product.types for product in module.products)),
    }


def kernel_seconds(ran: list[hlo_schedule.Operation], generation: str, steps: int) -> float | None:
    """Returns the least time of the kernels in one step, by the chip's published peaks; None where these are not public."""
    if generation not in PEAKS:
        return None
    costs = [(operation.times, hlo_schedule.KernelCost.of(operation.instruction)) for operation in ran]
    return sum(times * cost.seconds(*PEAKS[generation]) for times, cost in costs if cost is not None) / steps


def measured(name: str, network: DiTConfig, images: int, steps: int, repeats: int) -> dict[str, Any]:
    """Returns the row of times of whole chains on this process's devices; ``images`` are guided, on each device."""
    devices = jax.devices()
    mesh = sharding.data_mesh(devices) if len(devices) > 1 else None
    model, count = by_backend(name, lambda name: sampling.load(name, network)[0]), images * len(devices)
    times, _ = sampling.timed(model, count, steps, repeats, batch_size=count, mesh=mesh)
    chain = statistics.median(times["seconds"])
    row = {"model": name, "images": images, "devices": len(devices), "status": f"run on {devices[0].device_kind}"}
    seconds = {key: times[key] for key in ("first_s", "seconds")}
    return {**row, **seconds, "step_s": chain / steps, "image_s": chain / count}


def table(document: dict[str, Any]) -> str:
    """A row a program, in the order of generations, chips, images and models."""
    columns = [
        "chips",
        "guided images a device",
        "model",
        "to and from HBM, GB a step",
        "estimate, million cycles a step (ms)",
        "and the kernels, ms",
        "peak memory, GB",
        "collectives",
        "products in the text",
        "compiling, s",
        "",
    ]
    lines = [
        f"{_setting(document)}, libtpu {document['libtpu']}.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for row in sorted(document["rows"].values(), key=_place):
        cells = [f"{row['chips']} {row['generation']}", str(row["images"]), MODELS[row["model"]]]
        if "failed" in row:
            cells += ["", "", "", "does not fit", "", "", "", row["status"]]
        else:
            cells += [f"{row['hbm_bytes_step'] / 1e9:.2f}", _estimate(row), _kernels(row), f"{row['peak_bytes'] / 1e9:.2f}"]
            cells += [_counted(row["collectives"]) or "none", _counted(row["products"], "`")]
            cells += [f"{row['compile_s']:.0f}", row["status"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_runs(document: dict[str, Any]) -> str:
    """A row for each model and number of images that has run."""
    lines = [
        f"{_setting(document)}, median of {document['repeats']}.",
        "",
        "| guided images a device | model | devices | ms a step | ms an image | first call, s | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(document["rows"].values(), key=_place):
        lines.append(
            f"| {row['images']} | {MODELS[row['model']]} | {row['devices']} | {1e3 * row['step_s']:.2f} | "
            f"{1e3 * row['image_s']:.1f} | {row['first_s']:.0f} | {row['status']} |"
        )
    return "\n".join(lines)


def _counted(counts: dict[str, int], quote: str = "") -> str:
    return ", ".join(f"{count} {quote}{name}{quote}" for name, count in sorted(counts.items(), reverse=True))


def _setting(document: dict[str, Any]) -> str:
    depth = f", {document['depth']} blocks only" if document["depth"] else ""
    return f"{document['model']}{depth}, {document['input_size'] * 8} px, {document['steps']} steps; {common.source(document)}"


def _place(row: dict[str, Any]) -> tuple[int, ...]:
    generations = list(aot.TOPOLOGIES)
    generation = generations.index(row["generation"]) if "generation" in row else 0
    return generation, row.get("chips", 0), row["images"], list(MODELS).index(row["model"])


def _estimate(row: dict[str, Any]) -> str:
    if row["cycles_step"] is None:
        return "none"
    clock = CLOCKS.get(row["generation"])
    milliseconds = "" if clock is None else f" ({1e3 * row['cycles_step'] / clock:.1f})"
    return f"{row['cycles_step'] / 1e6:.1f}{milliseconds}"


def _kernels(row: dict[str, Any]) -> str:
    seconds = row.get("kernels_step_s")
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def run(arguments: argparse.Namespace) -> None:
    """Makes the rows that the results lack."""
    network = DiTConfig.preset(
        arguments.model, input_size=arguments.input_size, **({"depth": arguments.depth} if arguments.depth else {})
    )
    settings = {key: getattr(arguments, key) for key in ("model", "input_size", "depth", "steps")}
    wanted: dict[str, tuple[Any, ...]]
    if arguments.run:
        _check_devices(arguments.out)
        settings |= {"repeats": arguments.repeats, "devices": len(jax.devices())}
        wanted = {f"{name}|{images}": (name, images) for images, name in itertools.product(arguments.images, arguments.models)}
    else:
        if arguments.steps < 2:
            raise SystemExit(f"Error: --steps must be at least 2, not {arguments.steps}: one step is no loop to read.")
        if reason := aot.missing():
            raise SystemExit(f"Error: {reason}.")
        arguments.hardware = arguments.hardware or NEVER_RUN
        settings["libtpu"] = aot.libtpu_version()
        cells = itertools.product(arguments.generations, arguments.chips, arguments.images, arguments.models)
        wanted = {"|".join(map(str, cell)): cell for cell in cells}
    document: dict[str, Any] = {**common.header(arguments), **settings, "rows": {}}
    document, other = common.continued(document, arguments.out, _FIXED_RUN if arguments.run else _FIXED)
    if other:
        print(f"{arguments.out} holds results of another {', '.join(other)}, which this run replaces.", flush=True)
    missing = {name: cell for name, cell in wanted.items() if name not in document["rows"]}
    for number, (name, cell) in enumerate(missing.items(), 1):
        print(f"{number} of {len(missing)}: {name.replace('|', ', ')} ...", flush=True)
        if arguments.run:
            model, images = cell
            row = measured(model, network, images, arguments.steps, arguments.repeats)
            told = f"{1e3 * row['step_s']:.2f} ms a step"
        else:
            generation, chips, images, model = cell
            row = compiled(generation, chips, model, network, images, arguments.steps)
            told = row.get("failed") or f"{row['hbm_bytes_step'] / 1e9:.2f} GB a step, compiled in {row['compile_s']:.0f} s"
        print(f"  {told}", flush=True)
        document["rows"][name] = row
        common.write(document, arguments.out)


def _check_positive(arguments: argparse.Namespace) -> None:
    """Ends the program at a number that is none of anything."""
    for name in ("images", "steps", "depth", "repeats", "input_size"):
        given = getattr(arguments, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise SystemExit(f"Error: --{name.replace('_', '-')} must be positive, not {number}.")


def _check_devices(out: Path) -> None:
    """Ends the program where this process does not drive all devices, or where times of others would pass for a TPU's."""
    if jax.process_count() > 1:
        raise SystemExit(f"Error: {jax.process_count()} processes share the devices; run on a TPU of one host, by one process.")
    if (platform := jax.devices()[0].platform) == "tpu":
        return
    if out == RUNS:
        raise SystemExit(f"Error: these devices are no TPUs but {platform}s; name a file for their times with --out.")
    print(f"These devices are no TPUs but {platform}s, whose compiler writes no estimate to compare these times with.")


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], None)
    parser.add_argument("--model", default="DiT-XL/2", help="a published size")
    parser.add_argument("--input-size", type=int, default=32, help="side of the latent; 32 is 256 px, 64 is 512 px")
    parser.add_argument("--depth", type=int, help="blocks, for a quick look; by default all of the model's")
    integers = [name for name in MODELS if not name.endswith(_E4M3)]
    parser.add_argument("--models", nargs="+", default=integers, choices=MODELS)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8, 64], help="on each device, guided: two rows an image")
    parser.add_argument("--generations", nargs="+", default=list(aot.TOPOLOGIES), choices=aot.TOPOLOGIES)
    parser.add_argument("--chips", type=int, nargs="+", default=[1, 16, 64], choices=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--run", action="store_true", help="measure times on the devices of this machine instead")
    parser.add_argument("--repeats", type=int, default=5, help="measured chains, after one that compiles; with --run")
    parser.add_argument("--table-only", action="store_true", help="only rewrite the tables from the stored results")
    arguments = parser.parse_args()
    _check_positive(arguments)
    arguments.out = (arguments.out or (RUNS if arguments.run else RESULTS)).resolve()
    if arguments.table_only and not arguments.out.exists():
        raise SystemExit(f"Error: there are no results in {arguments.out}; leave out --table-only to make them.")
    if not arguments.table_only:
        try:
            run(arguments)
        except Ptq4ditError as error:
            raise SystemExit(f"Error: {error}") from None
    text = (table_of_runs if arguments.run else table)(json.loads(arguments.out.read_text()))
    print(text)
    if arguments.out == RESULTS:
        common.put_table(PAGE, "tpu.py", text)
    elif arguments.out == RUNS:
        common.put_table(PAGE, "tpu.py, run", text)
    elif arguments.out == RESULTS_E4M3:
        common.put_table(PAGE_E4M3, "tpu.py, e4m3", text)


if __name__ == "__main__":
    main()
