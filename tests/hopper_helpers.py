"""What the tests of the kernels for Hopper share: where they run, operands, and Pallas' interpreter, which needs JAX 0.11."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreters import free_of_races
from jax.experimental.pallas import mosaic_gpu as plgpu

from ptq4dit_jax.engine import choice
from ptq4dit_jax.engine.hopper import gemm, nibbles
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor

IS_HOPPER = choice.resolve("auto", "bfloat16").name == "hopper"
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
STATIC = ActQuantizer(scale=jnp.float32(0.03), zero_point=jnp.int32(-90))
pallas: Any = plgpu  # what it has depends on the version of JAX
HAS_INTERPRETER = hasattr(plgpu, "force_gpu_interpret_mode")


@contextmanager
def interpreter(*, may_need_none: bool = False) -> Iterator[None]:
    """Runs kernels on the CPU, and fails if two warpgroups, or one and a copy that it started, touch the same memory unordered.

    A warpgroup is one thread there: what goes on among its own threads is not checked. That none was run fails too, unless a
    call ``may_need_none``.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    mode = pallas.force_gpu_interpret_mode(pallas.InterpretGPUParams(detect_races=True))
    with free_of_races(gpu_callbacks, "GPURaceDetectionState", mode, may_need_none=may_need_none):
        yield


def operands(
    B: int, T: int, K: int, N: int, *, seed: int = 0, bits: int = 8, rows: bool = False
) -> tuple[Encoded, QTensor, Any]:
    """Random codes of the whole range, with results of the order of 1."""
    rng = np.random.default_rng(seed)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (B, T, 1) if rows else ()), jnp.float32)
    values = jnp.asarray(rng.integers(-128, 128, (B, T, K)), jnp.int8)
    low, high = (-127, 128) if bits == 8 else (0, 2**bits)
    zeros = np.zeros(N) if bits == 8 else rng.integers(low, high, N)
    column = jnp.asarray(rng.uniform(0.5, 1.5, N) / (5400 * K**0.5 / 2 ** (8 - bits)), jnp.float32)
    weight = QTensor.from_codes(
        jnp.asarray(rng.integers(low, high, (N, K)), jnp.float32), column, jnp.asarray(zeros, jnp.float32), bits
    )
    return Encoded(values, scale, None), weight, jnp.asarray(rng.normal(size=N), jnp.float32)


def words_of_bytes(ref: Any, *index: Any) -> jax.Array:
    data = ref[0][index]
    return jax.lax.bitcast_convert_type(data.reshape(data.shape[0], -1, 4), jnp.int32)


def bytes_of_words(ref: Any, words: jax.Array, *index: Any) -> None:
    ref[0][index] = jax.lax.bitcast_convert_type(words, jnp.int8).reshape(words.shape[0], -1)


@contextmanager
def interpreted_kernels(*, may_need_none: bool = False) -> Iterator[None]:
    """Runs kernels on the CPU as :func:`interpreter` does; blocks have several tiles, and words are made of bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "core_count", lambda: 3)
        # The interpreter keeps the bytes and the words of the same memory apart; here words are made of bytes.
        patch.setattr(nibbles, "load_words", words_of_bytes)
        patch.setattr(nibbles, "store_words", bytes_of_words)
        with interpreter(may_need_none=may_need_none):
            yield
