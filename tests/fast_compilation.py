"""The environment in which XLA compiles fast for CPUs. JAX reads it when it starts, so it is imported later here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator

#: The older emitter of fusions, with little splitting of programs, takes half the time to compile. JAX 0.11 no longer has it.
_OLDER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=2"


@contextlib.contextmanager
def as_users_compile() -> Iterator[None]:
    """Has programs that are lowered and compiled by hand compiled by the emitter that users have, for comparisons of bits."""
    import jax

    compiled = jax.stages.Lowered.compile
    newer: dict[str, str | bool] | None = (
        {"xla_cpu_use_fusion_emitters": True} if _OLDER in os.environ.get("XLA_FLAGS", "") else None
    )
    jax.stages.Lowered.compile = lambda lowered: compiled(lowered, newer)  # type: ignore[assignment, method-assign, misc]
    try:
        yield
    finally:
        jax.stages.Lowered.compile = compiled  # type: ignore[method-assign]


def environment(devices: int | None = None) -> dict[str, str]:
    """Returns variables for a process that compiles with few optimizations, with that many virtual devices if given.

    The flags are added to those that are set. Numbers of such a process can be compared with those of its like only.
    """
    set_flags = os.environ.get("XLA_FLAGS", "")
    flags = [] if devices is None else [f"--xla_force_host_platform_device_count={devices}"]
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11) and _OLDER not in set_flags:
        flags.append(_OLDER)
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": " ".join([set_flags, *flags]).strip()}
