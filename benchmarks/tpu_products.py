"""Says what holds fc1 of DiT-XL/2 back on a TPU, by the compiler's estimate: its product, or what follows it.

    python -m benchmarks.tpu_products        # a minute on two cores; needs libtpu, the extra ``tpu``

The same product is compiled with more and more behind it, in int8 and in bfloat16. What a kernel of ours could gain is at most
the way from a row to the product's own bound, its flops over the chip's published peak. Whether one gained it, the estimate
cannot say: it counts nothing for kernels. Writes the table in docs/tpu.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks import aot, common, hlo, hlo_schedule, tpu
from ptq4dit_jax.engine.xla.linear import accumulate
from ptq4dit_jax.networks.dit import DiTConfig

RESULTS = common.RESULTS / "tpu_products.json"
#: 64 guided images are two rows each.
ROWS = 128


def _codes(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(x), -128, 127).astype(jnp.int8)


def _shifted(x: jax.Array, weight: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """The least that makes codes of sums."""
    return jnp.clip(accumulate(x, weight) >> 8, -128, 127).astype(jnp.int8)


def _scaled(x: jax.Array, weight: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return _codes(accumulate(x, weight).astype(jnp.float32) * scale + bias)


def _gelu(x: jax.Array, weight: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return _codes(jax.nn.gelu(accumulate(x, weight).astype(jnp.float32) * scale + bias, approximate=True) / 0.03)


def _floats(x: jax.Array, weight: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.einsum("btk,nk->btn", x, weight)


def _floats_gelu(x: jax.Array, weight: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.nn.gelu(_floats(x, weight, scale, bias) + bias.astype(x.dtype), approximate=True)


#: What is compiled, by its name in the table, with the type of its operands.
PROGRAMS: dict[str, tuple[Callable[..., jax.Array], Any]] = {
    "int8, sums shifted to codes": (_shifted, jnp.int8),
    "int8, scaled, codes": (_scaled, jnp.int8),
    "int8, scaled, GELU, codes (as W8A8)": (_gelu, jnp.int8),
    "bfloat16, no more": (_floats, jnp.bfloat16),
    "bfloat16, bias, GELU": (_floats_gelu, jnp.bfloat16),
}


def milliseconds(generation: str, name: str, network: DiTConfig) -> float:
    """Returns the estimate for fc1 of one block over 64 guided images."""
    program, dtype = PROGRAMS[name]
    K, N = network.hidden_size, network.mlp_size
    place = SingleDeviceSharding(aot.devices(generation, 1)[0])
    shape = lambda sides, dtype: jax.ShapeDtypeStruct(sides, dtype, sharding=place)
    arguments = shape((ROWS, network.num_tokens, K), dtype), shape((N, K), dtype)
    epilogue = shape((N,), jnp.float32), shape((N,), jnp.float32)
    text = jax.jit(program, keep_unused=True).lower(*arguments, *epilogue).compile().as_text()
    cycles = sum(operation.cycles for operation in hlo_schedule.operations(hlo.parse(str(text))))
    return 1e3 * cycles / tpu.CLOCKS[generation]


def bound(generation: str, name: str, network: DiTConfig) -> float:
    """Returns the milliseconds of the product alone at the chip's published peak."""
    flops = 2 * ROWS * network.num_tokens * network.hidden_size * network.mlp_size
    return 1e3 * flops / (tpu.PEAKS[generation][0] * (2 if PROGRAMS[name][1] is jnp.int8 else 1))


def table(document: dict[str, Any]) -> str:
    generations = list(document["rows"])
    lines = [
        f"fc1 of one block of DiT-XL/2, 64 guided images, ms; {common.source(document)}, libtpu {document['libtpu']}.",
        "",
        f"| | {' | '.join(f'{generation}, estimate (product at the peak)' for generation in generations)} |",
        "|---" * (1 + len(generations)) + "|",
    ]
    for name in PROGRAMS:
        found = (document["rows"][generation][name] for generation in generations)
        cells = [f"{row['estimate_ms']:.2f} ({row['bound_ms']:.2f})" for row in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> None:
    if reason := aot.missing():
        raise SystemExit(f"Error: {reason}.")
    network = DiTConfig.preset("DiT-XL/2")
    arguments.hardware = arguments.hardware or tpu.NEVER_RUN
    rows = {
        generation: {
            name: {"estimate_ms": milliseconds(generation, name, network), "bound_ms": bound(generation, name, network)}
            for name in PROGRAMS
        }
        for generation in tpu.CLOCKS
    }
    document = {**common.header(arguments), "libtpu": aot.libtpu_version(), "rows": rows}
    common.write(document, arguments.out)
    text = table(document)
    print(text)
    if arguments.out == RESULTS:
        common.put_table(tpu.PAGE, "tpu_products.py", text)


if __name__ == "__main__":
    main(common.parser(__doc__.splitlines()[0], RESULTS).parse_args())
