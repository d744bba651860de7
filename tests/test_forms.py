"""Forms: what decides a program besides values, and the first difference between two."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from ptq4dit_jax.forms import ArrayForm, Difference, Form


class Color(enum.Enum):
    RED = "r"


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int = 3
    ratio: float = 0.1
    pair: tuple[float, ...] = (1.5, 2.0)
    note: str = dataclasses.field(default="", compare=False)


class Leaf(struct.PyTreeNode):
    values: Any
    bits: int = struct.field(pytree_node=False, default=8)


class Tree(struct.PyTreeNode):
    layers: Any
    table: Any = None
    settings: Any = struct.field(pytree_node=False, default=Settings())
    dtype: Any = struct.field(pytree_node=False, default=np.dtype("float32"))
    color: Any = struct.field(pytree_node=False, default=Color.RED)

    @property
    def shape(self) -> tuple[int, ...]:
        """Like an array's, which makes no array of it."""
        return ()


def tree(**changes: Any) -> Tree:
    leaf = Leaf(jnp.zeros((2, 3), jnp.bfloat16))
    return Tree(**{"layers": {"b": leaf, "a": [np.zeros(4, np.int8), leaf]}, **changes})


def test_a_form_has_all_arrays_and_static_fields() -> None:
    form = Form.of([tree(), {"x": jax.ShapeDtypeStruct((5,), jnp.int32)}], {"images": 2})
    assert form.settings == {
        "images": 2,
        "layers/a/1": "Leaf",
        "layers/a/1/bits": 8,
        "layers/b": "Leaf",
        "layers/b/bits": 8,
        "settings": "Settings",
        "settings/width": 3,
        "settings/ratio": 0.1,
        "settings/pair": "2 values",
        "settings/pair/0": 1.5,
        "settings/pair/1": 2.0,
        "dtype": "float32",
        "color": "RED",
    }
    assert form.arrays == (
        ArrayForm("layers/a/0", "int8", (4,)),
        ArrayForm("layers/a/1/values", "bfloat16", (2, 3)),
        ArrayForm("layers/b/values", "bfloat16", (2, 3)),
        ArrayForm("x", "int32", (5,)),
    )
    assert [(array.shape, array.dtype) for array in form.arrays[:3]] == [
        (leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(tree())
    ]
    assert form.difference(Form.of([tree(), {"x": jnp.zeros(5, jnp.int32)}], {"images": 2})) is None
    assert json.loads(json.dumps(form.settings)) == form.settings


@pytest.mark.parametrize(
    ("changes", "what", "second"),
    [
        ({"settings": Settings(width=4)}, "settings/width", "4"),
        ({"settings": Settings(ratio=np.nextafter(0.1, 1).item())}, "settings/ratio", "0.10000000000000002"),
        ({"settings": Settings(pair=(1.5,))}, "settings/pair", "1 values"),
        ({"dtype": np.dtype("float16")}, "dtype", "float16"),
        ({"layers": {"b": Leaf(jnp.zeros((2, 3), jnp.bfloat16), bits=4)}}, "layers/a/1", "absent"),
        ({"table": np.zeros(2, np.float32)}, "table", "float32 (2,)"),
        ({"settings": None}, "settings", "none"),
    ],
)
def test_the_first_difference_is_named(changes: Any, what: str, second: str) -> None:
    found = Form.of([tree()], {}).difference(Form.of([tree(**changes)], {}))
    assert found is not None
    assert (found.what, found.second) == (what, second)


def test_settings_come_before_arrays_and_in_their_order() -> None:
    one, other = Form.of([tree()], {"a": True, "b": None, "c": 1}), Form.of([np.zeros(2)], {"a": True, "b": 2, "c": 3})
    assert one.difference(other) == Difference("b", "none", "2")
    assert Form.of([], {"a": True}).difference(Form.of([], {"a": False})) == Difference("a", "yes", "no")


def test_the_order_of_arrays_counts() -> None:
    """Two arrays of one shape that changed places would be taken for each other in silence."""
    arrays = tuple(ArrayForm(name, "int8", (4,)) for name in "ab")
    found = Form({}, arrays).difference(Form({}, arrays[::-1]))
    assert found is not None
    assert found.what == "order of arrays"


def test_what_does_not_count_where_values_are_compared_does_not_count_here() -> None:
    assert Form.of([tree(settings=Settings(note="x"))], {}).difference(Form.of([tree(settings=Settings(note="y"))], {})) is None
    assert Form.of([tree(settings=Settings(width=3))], {}).difference(Form.of([tree(settings=Settings(width=3.0))], {})) is None  # type: ignore[arg-type]


def test_what_no_file_can_say_is_refused(raises_sentence: Any) -> None:
    for changes in ({"settings": print}, {"layers": {"a": jax.tree_util.Partial(print)}}):
        with raises_sentence("cannot be exported", "a builtin_function" if "settings" in changes else "a Partial"):
            Form.of([tree(**changes)], {})
