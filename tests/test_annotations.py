"""What annotations say of arrays: everywhere, and truly. The whole suite runs with them held against what passes."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import annotation_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import AbstractArray

import ptq4dit_jax as ptq
from ptq4dit_jax.engine import xla
from ptq4dit_jax.engine.backends import Backend
from ptq4dit_jax.networks.ops import Network, Ops
from ptq4dit_jax.quantizers import ActQuantizer, QTensor


def shapeless(hint: Any) -> bool:
    """Whether an annotation names an array without saying its shape."""
    if hint == ArrayLike or hint in (jax.Array, np.ndarray):
        return True
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return False
    if isinstance(hint, typing.TypeVar):
        return False
    origin = typing.get_origin(hint)
    if origin is Callable or (isinstance(origin, type) and issubclass(origin, struct.PyTreeNode)):  # of other arrays than these
        return False
    return any(map(shapeless, typing.get_args(hint)))


def public_methods(kind: type) -> Iterator[types.FunctionType]:
    yield from (method for name, method in vars(kind).items() if inspect.isfunction(method) and not name.startswith("_"))


F = jnp.float32
FUNCTIONS = [
    *(function for function in map(ptq.__dict__.get, ptq.__all__) if inspect.isfunction(function)),
    *(method for kind in (Backend, Ops, Network, ptq.FloatDiT, ptq.QuantizedDiT) for method in public_methods(kind)),
]


@pytest.mark.parametrize("kind", annotation_checks.pytrees("ptq4dit_jax"), ids=lambda kind: kind.__qualname__)
def test_fields_of_pytrees_say_their_shapes(kind: type) -> None:
    assert not [name for name, hint in annotation_checks._fields(kind).items() if shapeless(hint)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_public_functions_operations_and_verbs_say_shapes(function: Callable[..., Any]) -> None:
    # Labels may be a list or a number of images; what they are is checked where they are read.
    hints = {name: hint for name, hint in typing.get_type_hints(function).items() if name != "labels"}
    assert not [name for name, hint in hints.items() if shapeless(hint)]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: QTensor(jnp.zeros((4, 8), jnp.int8), jnp.ones(5, F), None, 8), r"QTensor: scale is float32\[5\]"),
        (lambda: QTensor(jnp.zeros((4, 8), F), jnp.ones(4, F), None, 8), r"QTensor: values is float32\[4, 8\]"),
        (lambda: ActQuantizer(jnp.ones(3, F), jnp.zeros(2, jnp.int32)), r"ActQuantizer: zero_point is int32\[2\]"),
        (lambda: ActQuantizer(jnp.ones((), F), jnp.zeros((), F)), r"ActQuantizer: zero_point is float32\[\]"),
        (lambda: jax.jit(lambda x: ActQuantizer(x, x))(jnp.ones(3, F)), r"ActQuantizer: zero_point is float32\[3\]"),
    ],
)
def test_a_pytree_that_is_not_what_its_fields_say(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(annotation_checks.Disagreement, match=named):
        make()


def test_operations_are_held_to_one_size_per_axis() -> None:
    a, b = jnp.zeros((1, 2, 3, 8), jnp.int8), jnp.zeros((1, 2, 4, 8), jnp.int8)
    assert xla.BACKEND.batched(a, b).shape == (1, 2, 3, 4)
    wrong = annotation_checks.checked(lambda self, a, b: jnp.zeros((1, 2, 4, 3), jnp.int32), Backend.batched)
    with pytest.raises(annotation_checks.Disagreement, match=r"Backend.batched: what it returns is int32\[1, 2, 4, 3\]"):
        wrong(None, a, b)


def test_trees_of_shapes_and_answers_are_no_states() -> None:
    weight = QTensor(jnp.zeros((4, 8), jnp.int8), jnp.ones(4), None, 8)
    assert jax.tree.map(jnp.shape, weight).scale == (4,)
    assert jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), weight).scale
    assert jax.eval_shape(lambda w: w, weight).values.shape == (4, 8)
    assert "ptq4dit_jax.quantizers.QTensor" in annotation_checks.SEEN
