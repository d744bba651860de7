"""Lists the backends, and resolves names of them, including ``auto``."""

from __future__ import annotations

from typing import NamedTuple

from ptq4dit_jax.devices import default_kind
from ptq4dit_jax.engine import fp8, hopper, tpu, xla
from ptq4dit_jax.engine.backends import Arithmetic
from ptq4dit_jax.engine.dispatch import AnyBackend, Dispatch
from ptq4dit_jax.errors import Ptq4ditError

#: In the order in which ``auto`` tries those that multiply the stored integers. The last is the reference, which runs
#: everywhere and covers everything.
BACKENDS: tuple[AnyBackend, ...] = (fp8.BACKEND, hopper.BACKEND, tpu.BACKEND, xla.BACKEND)
AUTO = "auto"
#: Names that backends had in earlier versions.
_FORMER = {"mosaic_gpu": hopper.BACKEND.name}


class Choice(NamedTuple):
    """The backend that runs, why no faster one does (if there is one for this device), and what to know of it here."""

    backend: AnyBackend
    why: str = ""

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def dispatch(self) -> Dispatch:
        """The backend, with the reference as the fallback if it takes the same operands."""
        reference = BACKENDS[-1]
        alone = self.backend is reference or self.backend.arithmetic is not reference.arithmetic
        return Dispatch((self.backend,) if alone else (self.backend, reference))


def names() -> list[str]:
    """Returns the names that a user may ask for."""
    return [AUTO, *(backend.name for backend in reversed(BACKENDS))]


def checked(name: str) -> str:
    """Returns the present name of the backend that a user asked for.

    Raises:
      Ptq4ditError: there is no such backend; lists those that exist.
    """
    present = _FORMER.get(name, name)
    if present not in names():
        raise Ptq4ditError(f"Unknown backend {name!r}; the backends are {', '.join(names())}.")
    return present


def named(name: str) -> AnyBackend | None:
    """Returns the backend of that name, or None for ``auto``. Raises as :func:`checked` does."""
    present = checked(name)
    return next((backend for backend in BACKENDS if backend.name == present), None)


def resolve(name: str, dtype: str) -> Choice:
    """Returns the backend for a model that computes in ``dtype`` on the default device.

    ``auto`` takes the first that runs there and multiplies the stored integers. For any other name, the device is not checked.

    Raises:
      Ptq4ditError: there is no such backend, or it does not compute in that type.
    """
    device = default_kind()
    if backend := named(name):
        if backend.dtypes is not None and dtype not in backend.dtypes:
            types = " or ".join(backend.dtypes)
            raise Ptq4ditError(
                f"The backend {backend.name} computes in {types}, not in {dtype}; use {types}, or the backend auto or xla."
            )
        return Choice(backend, "" if backend.unfit(device) else backend.note(device))
    advice = [backend.advice(device) for backend in BACKENDS]
    reasons: list[str] = []
    for backend in BACKENDS:
        if backend.arithmetic is not Arithmetic.INT8 or backend.platform not in (None, device.platform):
            continue
        if not (reason := backend.why_not(device, dtype)):
            return Choice(backend, "; ".join(filter(None, [*reasons, backend.note(device), *advice])))
        reasons.append(reason)
    raise AssertionError("the reference runs everywhere")
