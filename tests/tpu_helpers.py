"""What the tests of programs for TPUs share: marks, programs with what can be read off them, and where each layer's product is.

The programs are compiled ahead of time by libtpu, without a TPU, and never run. Widths are DiT-XL/2's, so that tiles and memory
are the true ones; depth is one or two blocks. JAX_DISABLE_MOST_OPTIMIZATIONS, which the tests set, changes nothing here: the
compiler for TPUs makes the same program with and without it.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, TypeAlias

import pytest

from benchmarks import aot, hlo
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.spec import Linear, Role

#: For every module of such tests.
MARKS = [pytest.mark.tpu, pytest.mark.slow, pytest.mark.skipif(bool(aot.missing()), reason=aot.missing() or "libtpu is there")]
#: Guided images on each device, two rows each: numbers that are a size of nothing else.
IMAGES, ROWS = 3, 6


class Compiled(NamedTuple):
    """A program's instructions, and its bytes on a device: at the peak, and of its arguments."""

    module: hlo.Module
    peak_bytes: int
    argument_bytes: int


def compiled(lowered: Any) -> Compiled:
    """Compiles what was lowered for a TPU that is only described."""
    with warnings.catch_warnings():
        # Such programs can be written to JAX's cache and not be read from it.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        return of_program(lowered.compile())


def of_program(program: Any) -> Compiled:
    """What can be read off a compiled program."""
    memory = program.memory_analysis()
    return Compiled(hlo.parse(program.as_text()), memory.peak_memory_in_bytes, memory.argument_size_in_bytes)


def network(depth: int | None = None) -> DiTConfig:
    """DiT-XL/2, all of it or so many blocks."""
    return DiTConfig.preset("DiT-XL/2", **({} if depth is None else {"depth": depth}))


def sampler(model: Any, generation: str, chips: int, images: int = IMAGES, share: int = 1) -> Compiled:
    """The chain of 50 steps for ``images`` on each device; ``share`` devices hold the model between them."""
    return compiled(aot.sampler(model, aot.devices(generation, chips), images, Sampling(steps=50), share))


#: Sizes of a product's operands, in order, and of its result.
Sizes: TypeAlias = tuple[tuple[int, int], int]


def sizes_of(config: DiTConfig, rows: int, linear: Linear, parts: int = 1) -> set[Sizes]:
    """The sizes by which the products of a layer are told. A condition layer before the modulation sees one row, since all
    samples share the time; a modulation sees the rows, for one block or for all at once; any other layer sees all tokens. A
    layer may be cut into ``parts`` products."""
    condition = next(kind for kind in config.spec.kinds if kind.role is Role.CONDITION)
    if linear in condition.linears:
        rows = 1
    elif not linear.modulates:
        rows *= config.num_tokens
    together = {1, config.depth} if linear.modulates and linear.place.stack else {1}
    N = linear.N // parts
    return {(_in_order(n * rows * linear.K, n * N * linear.K), n * rows * N) for n in together}


def _in_order(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)


def products_of(module: hlo.Module, sizes: set[Sizes]) -> list[hlo.Product]:
    """The products of these sizes."""
    return [p for p in module.products if (_in_order(p.left.size, p.right.size), p.result.size) in sizes]


def attention_products(module: hlo.Module, config: DiTConfig, rows: int) -> list[hlo.Product]:
    """Both products of attention where it is no kernel: queries with keys, and probabilities with values."""
    logits = rows * config.num_heads * config.num_tokens**2
    inputs = rows * config.num_tokens * config.hidden_size
    return products_of(module, {((inputs, inputs), logits), (_in_order(logits, inputs), inputs)})


def weights_of(config: DiTConfig) -> set[int]:
    """The sizes of whole weights, in one block and in all."""
    return {
        size for linear in config.spec.linears.values() for size in (linear.N * linear.K, linear.N * linear.K * config.depth)
    }


def exchanged(module: hlo.Module, collective: str) -> list[hlo.Array]:
    """What comes out of a kind of collective, all of the program's text."""
    found = (each for each in module.instructions if each.opcode.removesuffix("-start") == collective)
    return [array for instruction in found for array in instruction.results]
