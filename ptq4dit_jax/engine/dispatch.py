"""Asks backends in turn: the first that covers a call runs it, and the reasons of those before it are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from ptq4dit_jax.engine.backends import Backend, NotCovered
from ptq4dit_jax.engine.stacks import Leaf, materialize
from ptq4dit_jax.float8 import Operand, Weight
from ptq4dit_jax.quantizers import QTensor, undifferentiable

#: A backend, whatever it reads and multiplies.
AnyBackend: TypeAlias = Backend[Any, Any, Any]
#: Operations as they are called, before a backend is found.
_Operations: TypeAlias = Backend[Leaf, Operand, Weight]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")


class Kind(enum.Enum):
    """The purpose of an operation."""

    WEIGHTS = enum.auto()  # prepares them
    LINEAR = enum.auto()  # multiplies by them
    CODES = enum.auto()  # quantizes a layer's input
    ATTENTION = enum.auto()  # multiplies activations with one another


class Refusal(NamedTuple):
    """A backend that did not cover a call, and the reason."""

    backend: AnyBackend
    reason: str


class Ran(NamedTuple):
    """One call of an operation: its kind and name, the backend that ran it, and the earlier backends that refused."""

    kind: Kind
    operation: str
    backend: AnyBackend
    refusals: tuple[Refusal, ...] = ()

    @property
    def why(self) -> str:
        """Why the first backend did not run it; empty if it did."""
        return "; ".join(refusal.reason for refusal in self.refusals)

    @property
    def runs_on(self) -> str:
        """The name of the backend that computes, or of the library that it calls."""
        library = self.backend.attention_library if self.operation == "attention" else None
        return library or self.backend.name


_RAN: ContextVar[list[Ran] | None] = ContextVar("ran", default=None)


@contextlib.contextmanager
def watched() -> Iterator[list[Ran]]:
    """Records the operations that are traced inside the block, in order: they are what the program will run."""
    ran: list[Ran] = []
    token = _RAN.set(ran)
    try:
        yield ran
    finally:
        _RAN.reset(token)


def _in_turn(method: Callable[Concatenate[_Operations, _P], _R], kind: Kind) -> Callable[Concatenate[Dispatch, _P], _R]:
    """Returns the method of :class:`Dispatch` that asks its backends for an operation of :class:`Backend`."""

    def run(self: Dispatch, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        refusals: list[Refusal] = []
        for backend in self.chain:
            # The backend's own version of the method.
            operation = cast(Callable[_P, _R], getattr(backend, method.__name__))
            fitted_args, fitted_kwargs = _fitted(backend, (args, kwargs))
            try:
                out = operation(*fitted_args, **fitted_kwargs)
            except NotCovered as refusal:
                refusals.append(Refusal(backend, str(refusal)))
                continue
            if (ran := _RAN.get()) is not None:
                ran.append(Ran(kind, method.__name__, backend, tuple(refusals)))
            return out
        raise NotCovered("; ".join(f"{backend.name}: {reason}" for backend, reason in refusals))

    return cast(Callable[Concatenate["Dispatch", _P], _R], functools.update_wrapper(run, method))


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """The operations of :class:`~ptq4dit_jax.engine.backends.Backend`, each run by the first backend that covers the call.

    A backend that does not read stacks receives layers cut out of them. Derivatives through a backend that JAX cannot
    differentiate are refused.

    Attributes:
      chain: backends from the fastest to the reference. The first also determines how blocks are run.

    Raises:
      NotCovered: none of them covers the call; the message says why for each.
    """

    chain: tuple[AnyBackend, ...]

    def prepare(self, weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
        """Returns the weights of all quantized layers in the form that the first backend reads fastest."""
        return self.chain[0].prepare(weights)

    def prepare_for_floats(self, weights: Mapping[str, QTensor]) -> Mapping[str, QTensor]:
        """Does the same for layers that multiply floats by dequantized weights."""
        return self.chain[0].prepare_for_floats(weights)

    unpack_ahead = _in_turn(_Operations.unpack_ahead, Kind.WEIGHTS)
    linear = _in_turn(_Operations.linear, Kind.LINEAR)
    linear_parts = _in_turn(_Operations.linear_parts, Kind.LINEAR)
    linear_each = _in_turn(_Operations.linear_each, Kind.LINEAR)
    linear_gelu = _in_turn(_Operations.linear_gelu, Kind.LINEAR)
    linear_residual = _in_turn(_Operations.linear_residual, Kind.LINEAR)
    batched = _in_turn(_Operations.batched, Kind.ATTENTION)
    encode = _in_turn(_Operations.encode, Kind.CODES)
    modulate_encode = _in_turn(_Operations.modulate_encode, Kind.CODES)
    attention = _in_turn(_Operations.attention, Kind.ATTENTION)
    attention_codes = _in_turn(_Operations.attention_codes, Kind.ATTENTION)

    @property
    def scans_blocks(self) -> bool:
        """Whether blocks run in a loop over their stacks. If not, one function is called for each block in turn."""
        return self.chain[0].scans_blocks

    @property
    def attends_on_codes(self) -> bool:
        """Whether the first backend's :meth:`attention` multiplies integer codes."""
        return self.chain[0].attends_on_codes

    def covers(self, operation: Callable[..., object], *args: object) -> bool:
        """Returns whether the first backend runs an ``operation`` of this object for arguments like these.

        Arrays may be ``jax.ShapeDtypeStruct``. The call is traced, so that only one place says what a backend covers.
        """
        leaves, tree = jax.tree.flatten(args)
        is_array = [isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) for leaf in leaves]

        def call(*arrays: jax.Array) -> object:
            given = iter(arrays)
            filled = [next(given) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
            return operation(*jax.tree.unflatten(tree, filled))

        with watched() as ran:
            try:
                jax.eval_shape(call, *(leaf for leaf, array in zip(leaves, is_array, strict=True) if array))
            except NotCovered:
                return False
        return ran[-1].backend is self.chain[0]


def _fitted(backend: AnyBackend, args: _T) -> _T:
    """Returns a tree of arguments in the form that the backend takes."""
    if not backend.reads_stacks:
        args = materialize(args)
    return args if backend.differentiable else _without_derivatives(args)


def _without_derivatives(args: _T) -> _T:
    """Returns the arguments with derivatives refused. JAX has none for kernels, and its message would differ from the
    reference's."""
    leaves, tree = jax.tree.flatten(args)
    floats = [isinstance(leaf, (jax.Array, np.ndarray)) and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    guarded = iter(undifferentiable([leaf for leaf, is_float in zip(leaves, floats, strict=True) if is_float]))
    filled = [next(guarded) if is_float else leaf for leaf, is_float in zip(leaves, floats, strict=True)]
    return cast(_T, jax.tree.unflatten(tree, filled))
