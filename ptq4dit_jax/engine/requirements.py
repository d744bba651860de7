"""Requirements on arguments that several kernels share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ptq4dit_jax.engine.backends import require
from ptq4dit_jax.quantizers import ActQuantizer


def require_axes(shape: tuple[int, ...], axes: str = "(B, T, K)") -> None:
    """Requires three axes, none of size 0."""
    require(len(shape) == 3 and 0 not in shape, f"the input has shape {shape}, not {axes}")


def require_alike(*parts: jax.Array) -> None:
    """Requires q, k and v to have the same type and the same shape (B, T, D), with no axis of size 0."""
    alike = len({(part.shape, part.dtype) for part in parts}) == 1
    require(alike, "q, k and v differ in shape or type")
    require_axes(parts[0].shape, "(B, T, D)")


def require_bfloat16(dtype: DTypeLike) -> None:
    require(dtype == jnp.bfloat16, f"it computes in {jnp.dtype(dtype)}")


def require_one_group(act: ActQuantizer) -> None:
    """Requires static ranges, if any, to be of one group of steps for all rows."""
    require(act.dynamic or np.ndim(act.static_range.scale) == 0, "its rows are of several groups of steps")


def require_static(act: ActQuantizer) -> None:
    """Requires one range for all rows, found beforehand."""
    require(not act.dynamic, "its codes are scaled per token")
    require_one_group(act)
