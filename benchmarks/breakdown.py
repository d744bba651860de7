"""Where a step of W8A8 goes, kernel by kernel, against two floors: bytes moved at the bandwidth, and operations at the rate,
that the same GPU reaches when it does nothing else.

    python -m benchmarks.breakdown --hardware "one NVIDIA H200"

DiT-XL/2 with random weights, profiled while it samples with guidance; bandwidth is that of a large copy, the rates those of
large square products of random numbers through XLA. Writes benchmarks/results/breakdown.json and the table in docs/kernels.md.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ptq4dit_jax as ptq
from benchmarks import common
from benchmarks.sampling import load
from ptq4dit_jax.networks.dit import DiTConfig

PAGE = common.ROOT / "docs" / "kernels.md"
RESULTS = common.RESULTS / "breakdown.json"
REST = "everything else"


class Operation(NamedTuple):
    """What a step does by one kind of kernel: which kernels by name, bytes and operations of a step, on which unit."""

    kernels: str
    bytes_moved: float
    operations: float
    unit: str


def work(config: DiTConfig, rows: int) -> dict[str, Operation]:
    """The operations of a step for that many rows of the batch. Inputs and outputs count once, vectors not at all."""
    L, T, D, F = config.depth, config.num_tokens, config.hidden_size, config.mlp_size
    M = rows * T

    def product(kind: str, N: int, K: int, more: float) -> Operation:
        return Operation(rf"int8_matmul_{kind}_{N}x{K}(?!\d)", L * (M * K + N * K + more), L * 2.0 * M * N * K, "int8")

    codes, floats = M * D, 2 * M * D
    return {
        "norms with modulation and codes": Operation("modulate_quantize", 2 * L * (floats + codes), 0.0, "int8"),
        "qkv": product("store", 3 * D, D, 3 * floats),
        "attention with codes": Operation(r"attention|sdpa|fprop", L * (3 * floats + codes), L * 4.0 * M * T * D, "bfloat16"),
        "proj with gate and residual": product("residual", D, D, 2 * floats),
        "fc1 with GELU and codes": product("gelu", F, D, M * F),
        "fc2 with gate and residual": product("residual", D, F, 2 * floats),
    }


class Ceilings(NamedTuple):
    """Bytes a second of a copy, and operations a second of products of int8 and bfloat16."""

    bandwidth: float
    int8: float
    bfloat16: float

    def floor(self, operation: Operation) -> float:
        """Seconds below which it cannot be done."""
        return max(operation.bytes_moved / self.bandwidth, operation.operations / getattr(self, operation.unit))


def sorted_out(kernels: Iterable[tuple[str, float]], operations: dict[str, Operation]) -> dict[str, tuple[int, float]]:
    """How many kernels each operation ran and their time in all, from (name, seconds); the rest under :data:`REST`."""
    found = dict.fromkeys([*operations, REST], (0, 0.0))
    for name, seconds in kernels:
        kind = next((kind for kind, operation in operations.items() if re.search(operation.kernels, name)), REST)
        count, total = found[kind]
        found[kind] = count + 1, total + seconds
    return found


def ceilings() -> Ceilings:
    """Measured on the default device."""
    size = 8192
    # Floats: bytes of int8 XLA moves at less than half the bandwidth of an H200.
    wide, keys = jnp.zeros(2**28, jnp.float32), jax.random.split(jax.random.key(0), 2)
    bandwidth = 2 * wide.nbytes / _seconds(jax.jit(lambda x: x + 1), wide)

    def rate(dtype: Any, out: Any) -> float:
        a, b = (jax.random.randint(key, (size, size), -127, 127).astype(dtype) for key in keys)
        dot = lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=out)
        return 2.0 * size**3 / _seconds(jax.jit(dot), a, b)

    return Ceilings(bandwidth, rate(jnp.int8, jnp.int32), rate(jnp.bfloat16, jnp.bfloat16))


def _seconds(function: Callable[..., jax.Array], *arguments: jax.Array, repeats: int = 20) -> float:
    function(*arguments).block_until_ready()
    best = np.inf
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(repeats):
            out = function(*arguments)
        out.block_until_ready()
        best = min(best, (time.perf_counter() - started) / repeats)
    return float(best)


def profiled(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Every kernel that runs on a GPU meanwhile, and its seconds. XLA launches them one by one then, not in graphs."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        [trace] = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    lines = (line for plane in planes if "GPU" in plane.name for line in plane.lines if line.name.startswith("Stream"))
    return [(event.name, event.duration_ns / 1e9) for line in lines for event in line.events]


def markdown(document: dict[str, Any]) -> str:
    ceiling = document["ceilings"]
    lines = [
        f"{document['model']}, {document['input_size'] * 8} px, W8A8, microseconds a step in a profile of {document['steps']} "
        f"steps; {common.source(document)}. Floors: {ceiling['bandwidth'] / 1e12:.2f} TB/s, {ceiling['int8'] / 1e12:.0f} TOPS "
        f"of int8, {ceiling['bfloat16'] / 1e12:.0f} TFLOP/s of bfloat16, measured in the same run.",
        "",
        "| | " + " | ".join(f"{entry['guided']} guided" for entry in document["entries"]) + " |",
        "|---|" + "---|" * len(document["entries"]),
    ]
    for kind in [*document["entries"][0]["kernels"], "all kernels", "a step, not profiled"]:
        lines.append(f"| {kind} | " + " | ".join(_cell(entry, kind) for entry in document["entries"]) + " |")
    return "\n".join(lines)


def _cell(entry: dict[str, Any], kind: str) -> str:
    if kind == "all kernels":
        return f"{1e6 * sum(found['seconds'] for found in entry['kernels'].values()):.0f}"
    if kind == "a step, not profiled":
        return f"{1e6 * entry['step_seconds']:.0f}"
    found = entry["kernels"][kind]
    floor = f", floor {1e6 * found['floor']:.0f}" if found["floor"] else ""
    return f"{1e6 * found['seconds']:.0f} in {found['count']:g}{floor}"


def measure(config: DiTConfig, guided: list[int], steps: int) -> tuple[Ceilings, list[dict[str, Any]]]:
    """The ceilings, and for each number of images what the kernels of a step took."""
    ceiling, (model, _) = ceilings(), load("w8a8", config)
    entries = []
    for count in guided:
        labels = np.arange(count) % config.num_classes
        chain = lambda labels=labels: ptq.sample(model, labels, key=jax.random.key(2), steps=steps, cfg_scale=1.5)
        chain()
        started = time.perf_counter()
        chain()
        seconds = time.perf_counter() - started
        operations = work(config, 2 * count)
        kernels = {
            kind: {
                "count": number / steps,
                "seconds": total / steps,
                "floor": ceiling.floor(operations[kind]) if kind in operations else 0.0,
            }
            for kind, (number, total) in sorted_out(profiled(chain), operations).items()
        }
        entries.append({"guided": count, "step_seconds": seconds / steps, "kernels": kernels})
        print(count, {kind: round(1e6 * found["seconds"]) for kind, found in kernels.items()}, flush=True)
    return ceiling, entries


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], RESULTS)
    common.add_sampling_options(parser)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--table-only", action="store_true", help="only rewrite the table from the stored results")
    arguments = parser.parse_args()
    if not arguments.table_only:
        settings = {name: getattr(arguments, name) for name in ("model", "input_size", "guided", "steps")}
        ceiling, entries = measure(
            DiTConfig.preset(arguments.model, input_size=arguments.input_size), arguments.guided, arguments.steps
        )
        document = {**common.header(arguments), **settings, "ceilings": ceiling._asdict(), "entries": entries}
        common.write(document, arguments.out)
    text = markdown(json.loads(arguments.out.read_text()))
    print(text)
    if arguments.out == RESULTS:
        common.put_table(PAGE, "breakdown.py", text)


if __name__ == "__main__":
    main()
