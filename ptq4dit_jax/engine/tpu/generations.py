"""Which TPUs the kernels are for, and what their matrix units multiply."""

from __future__ import annotations

from typing import NamedTuple

from ptq4dit_jax.devices import default_kind
from ptq4dit_jax.engine.backends import require


class Generation(NamedTuple):
    """``integer_rate``: peak rate of int8 products relative to bfloat16, by Google's published figures; 1 means that int8 saves
    memory, not time. ``vmem``: bytes of vector memory that a kernel may take."""

    integer_rate: int
    vmem: int


#: By the name that JAX gives a device.
GENERATIONS = {
    "TPU v4": Generation(1, 16 << 20),
    "TPU v5 lite": Generation(2, 96 << 20),  # v5e
    "TPU v5": Generation(2, 48 << 20),  # v5p
    "TPU v6 lite": Generation(2, 96 << 20),  # v6e, Trillium
    "TPU7x": Generation(1, 48 << 20),  # Ironwood: its integer products are emulated; it has float8 units
}


def vector_memory(needed: int, what: str) -> int:
    """Returns the bytes of vector memory that a kernel may take on the default device; on no TPU, the least that one has.

    Raises:
      NotCovered: ``what`` needs more; both are named.
    """
    generation = GENERATIONS.get(default_kind().model)
    vmem = min(each.vmem for each in GENERATIONS.values()) if generation is None else generation.vmem
    require(needed <= vmem, f"{what} take {needed >> 20} MiB of vector memory, of {vmem >> 20}")
    return vmem
