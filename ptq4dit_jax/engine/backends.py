"""Which implementation of the integer operations runs, and the seam through which it is called.

Every operation is a folder (:mod:`~ptq4dit_jax.engine.matmul`, ``encode``, ``attention``) with ``xla.py``, the reference that
runs everywhere, and a module for each accelerated backend that covers it. A backend raises :class:`NotCovered` for a case that
it does not cover, with the reason, which :func:`ptq4dit_jax.describe` shows. The reference runs then, on layers cut out of
their stacks (:mod:`~ptq4dit_jax.engine.stacks`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from ptq4dit_jax.devices import default_device
from ptq4dit_jax.engine import stacks
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.quantizers import undifferentiable

BACKENDS = ("xla", "mosaic_gpu")
#: Versions of JAX whose Pallas the kernels were written for and tested with.
_TESTED = ((0, 10, 2), (0, 12))


class Choice(NamedTuple):
    """The backend that runs, and why it is not a faster one (empty where there is none for this device)."""

    name: str
    why: str = ""


def check(name: str) -> str:
    """The name itself, or an error that lists those that exist."""
    if name not in (*BACKENDS, "auto"):
        raise Ptq4ditError(f"Unknown backend {name!r}; the backends are auto, {', '.join(BACKENDS)}.")
    return name


def resolve(name: str, dtype: str) -> Choice:
    """What ``auto`` means on the default device for a model that computes in ``dtype``. Any other name is taken at its word
    about the device.

    Raises:
      Ptq4ditError: there is no such backend, or it does not compute in that type.
    """
    if check(name) == "xla":
        return Choice("xla")
    if name == "auto":
        device = default_device()
        if device.platform != "gpu":
            return Choice("xla")
        if device.capability != (9, 0):
            found = ".".join(map(str, device.capability))
            return Choice("xla", f"the kernels are for GPUs of compute capability 9.0 (Hopper) and this one has {found}")
        if not _TESTED[0] <= jax.__version_info__ < _TESTED[1]:
            return Choice("xla", f"the kernels are for JAX 0.10.2 to 0.11 and this is {jax.__version__}")
    if dtype != "bfloat16":
        if name != "auto":
            raise Ptq4ditError(
                f"The backend {name} computes in bfloat16, not in {dtype}; use bfloat16, or the backend auto or xla."
            )
        return Choice("xla", f"the kernels compute in bfloat16 between the products and the model in {dtype}")
    return Choice("mosaic_gpu")


class NotCovered(Exception):
    """Raised by a backend for arguments that its implementation of an operation is not made for; says what of them."""


def require(covered: bool, reason: str) -> None:
    """Raises :class:`NotCovered` with the reason unless ``covered``."""
    if not covered:
        raise NotCovered(reason)


class Ran(NamedTuple):
    """One call of an operation: its package and name, the backend that covered it, and why that is not the one asked for."""

    package: str
    operation: str
    backend: str
    why: str = ""


_RAN: ContextVar[list[Ran] | None] = ContextVar("ran", default=None)


@contextlib.contextmanager
def watched() -> Iterator[list[Ran]]:
    """The calls that are traced meanwhile, in their order: what a program will run, by the code that decides it."""
    ran: list[Ran] = []
    token = _RAN.set(ran)
    try:
        yield ran
    finally:
        _RAN.reset(token)


def run(package: str, operation: str, backend: str, *args: Any) -> Any:
    """Calls ``operation`` of the package's module for the backend, or of its reference where that does not cover the case."""
    out, name, why = _run(package, operation, check(backend), args)
    if (ran := _RAN.get()) is not None:
        ran.append(Ran(package.rpartition(".")[2], operation, name, why))
    return out


def _run(package: str, operation: str, backend: str, args: tuple[Any, ...]) -> tuple[Any, str, str]:
    """The result, the backend that it comes from, and why not from the one asked for."""
    why = ""
    if backend != "xla" and importlib.util.find_spec(f"{package}.{backend}") is not None:
        function = getattr(importlib.import_module(f"{package}.{backend}"), operation, None)
        if function is None:
            why = f"there is no kernel for {operation}"
        else:
            try:
                return function(*_without_derivatives(args)), backend, ""
            except NotCovered as refusal:
                why = str(refusal)
    return getattr(importlib.import_module(f"{package}.xla"), operation)(*stacks.taken(args)), "xla", why


def _without_derivatives(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as kernels take them: JAX knows no derivative of those, and says so in other words than the reference."""
    leaves, tree = jax.tree.flatten(args)
    floats = [isinstance(leaf, (jax.Array, np.ndarray)) and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    guarded = iter(undifferentiable([leaf for leaf, is_float in zip(leaves, floats, strict=True) if is_float]))
    filled = [next(guarded) if is_float else leaf for leaf, is_float in zip(leaves, floats, strict=True)]
    return cast(tuple[Any, ...], jax.tree.unflatten(tree, filled))


def covers(package: str, operation: str, backend: str, *args: Any) -> bool:
    """Whether the backend itself, and not the reference in its place, runs the operation for arguments like these; arrays may
    be ``jax.ShapeDtypeStruct``. Asked by tracing the call, so that what a backend covers is said in one place."""
    leaves, tree = jax.tree.flatten(args)
    is_array = [hasattr(leaf, "dtype") for leaf in leaves]

    def call(*arrays: Any) -> Any:
        given = iter(arrays)
        filled = [next(given) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
        return run(package, operation, backend, *jax.tree.unflatten(tree, filled))

    with watched() as ran:
        jax.eval_shape(call, *(leaf for leaf, array in zip(leaves, is_array, strict=True) if array))
    return ran[-1].backend == backend
