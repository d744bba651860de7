"""Which implementation of the integer operations runs, and the seam through which it is called.

Every operation is a folder (:mod:`~ptq4dit_jax.engine.matmul`, ``encode``, ``attention``) with ``xla.py``, the reference that
runs everywhere, and a module for each accelerated backend that covers it. A backend raises NotImplementedError for a case that
it does not cover; the reference runs then, on layers cut out of their stacks (:mod:`~ptq4dit_jax.engine.stacks`).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple

import jax

from ptq4dit_jax.devices import default_device
from ptq4dit_jax.engine import stacks
from ptq4dit_jax.errors import Ptq4ditError

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
    """What ``auto`` means on the default device for a model that computes in ``dtype``; any other name is taken at its word."""
    if check(name) != "auto":
        return Choice(name)
    device = default_device()
    if device.platform != "gpu":
        return Choice("xla")
    if device.capability != (9, 0):
        found = ".".join(map(str, device.capability))
        return Choice("xla", f"the kernels are for GPUs of compute capability 9.0 (Hopper) and this one has {found}")
    if not _TESTED[0] <= jax.__version_info__ < _TESTED[1]:
        return Choice("xla", f"the kernels are for JAX 0.10.2 to 0.11 and this is {jax.__version__}")
    if dtype != "bfloat16":
        return Choice("xla", f"the kernels compute in bfloat16 between the products and the model in {dtype}")
    return Choice("mosaic_gpu")


def run(package: str, operation: str, backend: str, *args: Any) -> Any:
    """Calls ``operation`` of the package's module for the backend, or of its reference where that does not cover the case."""
    function = _of_backend(package, operation, backend)
    if function is not None:
        try:
            return function(*args)
        except NotImplementedError:
            pass
    return getattr(importlib.import_module(f"{package}.xla"), operation)(*stacks.taken(args))


def covers(package: str, operation: str, backend: str, *args: Any) -> bool:
    """Whether the backend itself, and not the reference in its place, runs the operation for arguments like these; arrays may
    be ``jax.ShapeDtypeStruct``. Nothing runs: the operation is traced, so that there is one place that knows what it covers."""
    function = _of_backend(package, operation, backend)
    if function is None:
        return backend == "xla"
    leaves, tree = jax.tree.flatten(args)
    arrays = [leaf for leaf in leaves if hasattr(leaf, "dtype")]

    def traced(*given: Any) -> Any:
        replaced = iter(given)
        return function(*jax.tree.unflatten(tree, [next(replaced) if hasattr(leaf, "dtype") else leaf for leaf in leaves]))

    try:
        jax.eval_shape(traced, *arrays)
    except NotImplementedError:
        return False
    return True


def _of_backend(package: str, operation: str, backend: str) -> Any:
    """The backend's own function for the operation, or None where there is none or the reference is asked for."""
    check(backend)
    if backend == "xla" or importlib.util.find_spec(f"{package}.{backend}") is None:
        return None
    return getattr(importlib.import_module(f"{package}.{backend}"), operation, None)
