"""Which TPUs the kernels are for, and what their matrix units multiply."""

from __future__ import annotations

from typing import NamedTuple

import jax

from ptq4dit_jax.devices import DeviceKind, JaxVersions, default_kind


class Generation(NamedTuple):
    """``integer_rate`` and ``float8_rate``: peak rate of int8 and e4m3 products relative to bfloat16, by Google's published
    figures; 1 means that they save memory, not time. ``vmem``: bytes of vector memory that a kernel may take."""

    integer_rate: int
    vmem: int
    float8_rate: int = 1


#: By the name that JAX gives a device.
GENERATIONS = {
    "TPU v4": Generation(1, 16 << 20),
    "TPU v5 lite": Generation(2, 96 << 20),  # v5e
    "TPU v5": Generation(2, 48 << 20),  # v5p
    "TPU v6 lite": Generation(2, 96 << 20),  # v6e, Trillium
    "TPU7x": Generation(1, 48 << 20, float8_rate=2),  # Ironwood: its integer products are emulated
}


#: Whose Mosaic accepted the kernels.
JAX_VERSIONS = JaxVersions((0, 10, 2), (0, 12))


def unfit(device: DeviceKind) -> str:
    """Returns why the kernels are not for a device; empty if they are."""
    if device.model in GENERATIONS:
        return ""
    return f"the kernels are for {', '.join(GENERATIONS)} and this is {device.model or device.platform}"


def available() -> bool:
    """Returns whether the default device, with this JAX, runs the kernels."""
    return not unfit(default_kind()) and jax.__version_info__ in JAX_VERSIONS


def vector_memory() -> int:
    """Returns the bytes of vector memory that a kernel may take on the default device; on no TPU, the least that one has."""
    generation = GENERATIONS.get(default_kind().model)
    return min(each.vmem for each in GENERATIONS.values()) if generation is None else generation.vmem


def too_large(needed: int, what: str) -> str:
    """Returns why ``what`` does not fit into vector memory, if it needs more bytes than there are; empty if it fits."""
    vmem = vector_memory()
    return "" if needed <= vmem else f"{what} take {needed >> 20} MiB of vector memory, of {vmem >> 20}"
