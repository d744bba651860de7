"""Code that the Hopper kernels share, and that hides differences between JAX versions."""

from __future__ import annotations

from collections.abc import Callable
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from ptq4dit_jax.devices import default_kind

if TYPE_CHECKING:
    from jax.ref import AbstractRef

    class Ref(AbstractRef):
        """A reference inside a kernel: to an array, a part of one, barriers or an accumulator.

        Pallas's functions take JAX's class. It declares members of a value as the objects that make them, so two overrides
        do not match.
        """

        @property
        def shape(self) -> tuple[int, ...]: ...
        @property
        def at(self) -> _Parts: ...  # type: ignore[override]
        def __getitem__(self, index: Index) -> jax.Array: ...
        def __setitem__(self, index: Index, value: jax.Array) -> None: ...
        def transpose(self, *permutation: int | tuple[int, ...]) -> Ref: ...  # type: ignore[override]

    class _Parts(Protocol):
        def __getitem__(self, index: Index) -> Ref: ...

else:
    Ref = jax.Ref

#: A part of a reference, along one axis and along several.
At: TypeAlias = "int | jax.Array | slice | pl.Slice"
Index: TypeAlias = "At | EllipsisType | tuple[At, ...]"
#: ``plgpu.wgmma``; JAX does not export the type that it takes for an accumulator.
wgmma = cast("Callable[[Ref, jax.Array | Ref, Ref], None]", plgpu.wgmma)
_NEW = jax.__version_info__ >= (0, 11)
#: Added to a float of magnitude below 2^22, it leaves the float, rounded half to even, in the low bits of the sum.
_ROUNDING = 12582912.0


def kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """Returns ``plgpu.kernel``, with its body traced with 32-bit indices and JAX's own promotion, whatever the process has set:
    nothing in it is wider, and under ``JAX_ENABLE_X64`` Pallas's loops would count in int64. ``JAX_CHECK_TRACER_LEAKS`` is off,
    too, because it mistakes what Pallas itself keeps of its loops for a leak."""
    call = plgpu.kernel(body, **options)

    def run(*arguments: jax.Array) -> Any:
        with (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.check_tracer_leaks(False),
        ):
            return call(*arguments)

    return run


def to_codes(x: jax.Array, zero_point: jax.Array | int, low: int, high: int) -> jax.Array:
    """Returns ``clip(round(x) + zero_point, low, high)`` as int8, half to even; ``zero_point`` () int32.

    Once clipped, values can be rounded by one addition, which is cheaper than a conversion. The zero point is added after the
    rounding, as in the reference, so that ties round alike.
    """
    ends = [jnp.asarray(end - zero_point, jnp.float32) for end in (low, high)]
    rounded = lax.bitcast_convert_type(jnp.clip(x, *ends) + _ROUNDING, jnp.int32)
    return (rounded + zero_point).astype(jnp.int8)


def widened(array: jax.Array, size: int, axis: int = -1) -> jax.Array:
    """Pads the array with zeros at the end of an axis that is shorter than ``size``."""
    missing = size - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)


def load_vector(ref: Ref, *index: At) -> jax.Array:
    """Loads a piece of a reference in device memory: every thread reads what it needs, without a bulk copy."""
    load: Callable[..., jax.Array] = plgpu.load  # its signature depends on the version
    return load(ref.at[index], optimized=False) if _NEW else load(ref, index, optimized=False)


def load_of_layer(ref: Ref, layer: jax.Array, *index: At) -> jax.Array:
    """Calls :func:`load_vector` on one layer of a stack (L, ...), or on the only layer of a stack (1, ...)."""
    return load_vector(ref, layer if ref.shape[0] > 1 else 0, *index)


def _views(ref: Ref) -> tuple[Ref, Ref]:
    return cast("tuple[Ref, Ref]", ref)


def bytes_of(ref: Ref) -> Ref:
    """Returns the byte view of a reference to the same memory as bytes and as words."""
    return _views(ref)[0]


def load_words(ref: Ref, *index: At) -> jax.Array:
    """Loads int32 words of four bytes from a reference to the same memory as bytes and as words; ``index`` counts words."""
    return _views(ref)[1][index]


def store_words(ref: Ref, words: jax.Array, *index: At) -> None:
    """Stores words; the inverse of :func:`load_words`."""
    _views(ref)[1][index] = words


def transposed(ref: Ref) -> Ref:
    """Returns the reference with its two axes swapped."""
    return ref.transpose((1, 0)) if _NEW else cast(Ref, plgpu.transpose_ref(ref, (1, 0)))


def core_count() -> int:
    """Returns the number of multiprocessors of the device; an H200's if it does not say, when kernels are only lowered."""
    return default_kind().cores or 132


def swizzled(columns: int, dtype: DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Returns the layout in shared memory of tiles that are copied in bulk."""
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)
