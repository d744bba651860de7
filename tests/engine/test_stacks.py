"""Layers in their stacks: they look like the layers, are cut out for whoever asks, and reach references cut out."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import HOPPER

from ptq4dit_jax.engine.backends import NotCovered
from ptq4dit_jax.engine.stacks import OfLayer, layer_of, lazy_layer, materialize, stack_of
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor


def weights(bits: int) -> list[QTensor]:
    rng = np.random.default_rng(0)
    low, high = (-127, 128) if bits == 8 else (0, 16)
    draw = lambda: jnp.asarray(rng.integers(low, high, (5, 6)), jnp.float32)
    return [
        QTensor.from_codes(draw(), jnp.full(5, 0.1 * i, jnp.float32), jnp.full(5, bits % 8.0, jnp.float32), bits)
        for i in range(1, 4)
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tree_of_stacks_stands_for_one_of_its_layers(bits: int) -> None:
    layers = weights(bits)
    stacks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    for index, layer in enumerate(layers):
        view = lazy_layer(stacks, jnp.int32(index))
        assert view.shape == layer.shape == (5, 6)
        assert (view.scale.shape, view.scale.ndim, view.scale.dtype) == ((5,), 1, jnp.float32)
        np.testing.assert_array_equal(jax.jit(lambda view: cast(QTensor, materialize(view)).codes())(view), layer.codes())
        assert layer_of(None, view).tolist() == [index]
        assert stack_of(view.values) is view.values.stack


def test_other_leaves_stay_and_are_stacks_of_one() -> None:
    array, act = jnp.arange(3), ActQuantizer(jnp.float32(1), jnp.int32(0))
    assert materialize((array, 3, "name", jnp.float32, None, {"a": act})) == (array, 3, "name", jnp.float32, None, {"a": act})
    assert stack_of(array).shape == (1, 3)
    assert layer_of(array, act, None).tolist() == [0]


def test_the_reference_is_given_layers_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuses(x: Encoded, weight: QTensor, *_: Any) -> jax.Array:
        asked.append(type(weight.values))
        raise NotCovered("nothing")

    monkeypatch.setattr("ptq4dit_jax.engine.hopper.linear.linear", refuses)
    layers = weights(4)
    x = Encoded(jnp.asarray(np.arange(12).reshape(2, 6), jnp.int8), jnp.float32(0.5), None)
    view = lazy_layer(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), jnp.int32(1))
    got, want = (HOPPER.linear(x, w, jnp.zeros(5), jnp.float32) for w in (view, layers[1]))
    np.testing.assert_array_equal(got, want)
    assert asked[0] is OfLayer
