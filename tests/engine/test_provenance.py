"""Where a model comes from follows it outside of programs, and is never that of another."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import PLAIN, random_inputs, tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax.engine import Provenance


@pytest.fixture(scope="module")
def models() -> list[ptq.QuantizedDiT]:
    """Two models of one shape with integers and origins of their own."""
    made = []
    for seed, name in enumerate(("first", "second")):
        dit = jax.tree.map(jnp.asarray, tiny_model(seed))
        q = ptq.quantize(
            dit,
            ptq.QuantConfig.of(**PLAIN, steps=2, calib_steps=1, calib_rows=2),
            key=jax.random.key(0),
        )
        made.append(q.replace(provenance=Provenance({"name": name})))
    return made


def name_of(model: Any) -> str | None:
    return model.provenance.facts.get("name")


def test_models_that_a_compiled_function_returns_have_none(models: list[ptq.QuantizedDiT]) -> None:
    seen = []

    @jax.jit
    def doubled(model: Any) -> Any:
        seen.append(name_of(model))
        return model.replace(label_embed=2 * model.label_embed)

    for model in models:
        out = doubled(model)
        assert name_of(out) is None
        assert model.label_embed is not None
        assert (out.label_embed == 2 * model.label_embed).all()
    assert seen == [None], "one program, in which no model has an origin"
    compiled = jax.jit(lambda model, scale: (model, scale)).lower(models[0], 1.0).compile()
    assert name_of(compiled(models[1], 1.0)[0]) is None


@pytest.mark.parametrize(
    "transformed",
    [
        lambda model: jax.lax.scan(lambda carry, _: (carry, None), model, None, length=1)[0],
        lambda model: jax.vmap(lambda _: model.replace(label_embed=model.label_embed + _), out_axes=0)(
            jnp.zeros(2, jnp.float32)
        ),
        lambda model: jax.eval_shape(lambda model: model, model),
    ],
    ids=["scan", "vmap", "eval_shape"],
)
def test_so_have_those_of_other_transformations(transformed: Any, models: list[ptq.QuantizedDiT]) -> None:
    assert [name_of(transformed(model)) for model in models] == [None, None]


def test_outside_of_programs_it_stays(models: list[ptq.QuantizedDiT]) -> None:
    for model, name in zip(models, ("first", "second"), strict=True):
        kept = [
            jax.tree.map(lambda leaf: leaf + 0, model),
            jax.device_put(model),
            jax.device_get(model),
            model.astype("bfloat16"),
            jax.block_until_ready(model),
            jax.tree.map(jax.typeof, model),
            jax.jit(lambda model=model: model)(),
        ]
        assert [name_of(other) for other in kept] == [name] * len(kept)


def test_models_of_one_shape_share_a_program(models: list[ptq.QuantizedDiT]) -> None:
    x, y = random_inputs(models[0].config, 2)
    traced = []

    @jax.jit
    def apply(model: Any, x: Any) -> Any:
        traced.append(model.config)
        return model.apply(x, jnp.array([5]), y)

    outputs = [apply(model, x) for model in models]
    assert len(traced) == 1
    assert (outputs[0] != outputs[1]).any()
