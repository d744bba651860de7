"""Types, precision and keys that do not depend on JAX's switches: the same numbers whatever a process has set.

``JAX_ENABLE_X64`` makes float64 the default type. ``JAX_NUMPY_DTYPE_PROMOTION=strict`` and ``JAX_NUMPY_RANK_PROMOTION=raise``
forbid implicit promotion. ``JAX_DEFAULT_MATMUL_PRECISION`` determines the precision of products that do not state theirs, and
``JAX_DEFAULT_PRNG_IMPL`` the kind of keys. So operands are given equal types and ranks, and products and keys pass through
here.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key, UInt32

from ptq4dit_jax.errors import Ptq4ditError

#: A key of JAX's random numbers, typed or as raw words.
AnyKey: TypeAlias = Key[Array, ""] | UInt32[Array, " words"]
#: For products of integers, and of 16-bit floats, which are always exact.
INTEGER = jax.lax.Precision.DEFAULT
#: For float32 products that are a reference or determine codes: float32 on every device.
EXACT = jax.lax.Precision.HIGHEST
#: For products of e4m3. They are exact, but with less than this XLA lets Hopper's tensor cores keep a sum in an accumulator of
#: fewer bits ("fast accumulation") instead of adding it to float32 from time to time. On TPUs it makes no difference.
FLOAT8 = jax.lax.Precision.HIGHEST
#: For float32 products that only gather statistics: TF32 on GPUs that have it, three bfloat16 passes on a TPU. In float32,
#: calibration of DiT-XL/2 takes twice as long on an H200.
CALIBRATION = jax.lax.Precision.HIGH


def at_least_float32(*dtypes: DTypeLike) -> Any:
    """Returns the common type of operands of these types, and of their sums: float64 if one is float64, else float32."""
    return jnp.float64 if any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes) else jnp.float32


def product_precision(dtype: DTypeLike, precision: jax.lax.Precision = EXACT) -> jax.lax.Precision:
    """Returns the precision for a product of this type: ``precision`` from float32 on; 16-bit floats are always exact."""
    return precision if jnp.dtype(dtype).itemsize >= 4 else INTEGER


def unit_exponent(x: jax.Array, axis: int | tuple[int, ...] | None = -1) -> jax.Array:
    """Returns the exponent (int32) of the power of two just above the largest magnitude along ``axis``, kept with size 1.

    ``jnp.ldexp(x, -exponent)`` lies within +-1 and has the digits of ``x``: float32 cannot hold the squares of values above
    1.8e19 or below 1e-19. The exponent is 0 if the largest magnitude is 0 or not finite.
    """
    largest = jnp.abs(x).max(axis, keepdims=True)
    return jnp.where(jnp.isfinite(largest), jnp.frexp(largest)[1], 0)


def along_last(vector: jax.Array, ndim: int) -> jax.Array:
    """Adds axes of size 1 in front, so that the array lies along the last of ``ndim`` axes; scalars stay."""
    return jnp.expand_dims(vector, range(ndim - vector.ndim)) if vector.ndim else vector


def threefry(key: AnyKey) -> jax.Array:
    """Returns the key as threefry, whatever generator it was made for; keys of one seed become one key.

    Under ``vmap``, XLA's own generators (rbg, unsafe_rbg) draw numbers that depend on the rest of the batch.

    Args:
      key: () from ``jax.random.key``, or the raw uint32 from ``jax.random.PRNGKey``.

    Raises:
      Ptq4ditError: anything else.
    """
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if typed and key.ndim == 0:
        if jax.random.key_impl(key) == "threefry2x32":
            return key
        words = jax.random.key_data(key)
    elif not typed and dtype == jnp.uint32 and key.shape in ((2,), (4,)):
        words = jnp.asarray(key)
    else:
        raise Ptq4ditError(f"A key must be one key, such as jax.random.key(0), not {_described(key)}.")
    # For a seed, an rbg key holds threefry's two words twice.
    return jax.random.wrap_key_data(words[:2], impl="threefry2x32")


def _described(key: object) -> str:
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    return repr(key)[:40] if shape is None else f"an array of {dtype} {tuple(shape)}"


def compute_dtype(stored: DTypeLike, asked: str | None = None) -> DTypeLike:
    """Returns the type to compute in: the one asked for, else the type of the stored parameters, or float32 if that is float16.

    Activations of a network that was trained in another type may exceed 65504, float16's largest number, and become infinite.
    bfloat16 would not hold the weights exactly: it has 8 significant bits, and float16 has 11.
    """
    if asked is not None:
        return jnp.dtype(asked)
    return jnp.dtype(jnp.float32 if jnp.dtype(stored) == jnp.float16 else stored)


def asked_dtype(dtype: DTypeLike) -> str | None:
    """Returns the name of a type that is asked for, or None if :func:`compute_dtype` returns that type anyway."""
    name = jnp.dtype(dtype).name
    return None if compute_dtype(dtype) == name else name
