"""Models without weights, from which programs are compiled ahead of time, have the shapes of those that are really made."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PLAIN, structure, tiny_config, tiny_model
from jax.sharding import Mesh

import ptq4dit_jax as ptq
from benchmarks import aot
from ptq4dit_jax.chain import Request


def leaves(model: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(model)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"weight_bits": 8},
        {"weight_bits": 4, "policy": "uniform,final=8,blocks.attention=float", "step_groups": 2},
        {"weight_bits": 4, "policy": "edges8", "balance_fc2": False, "dynamic_sites": ()},
    ],
)
def test_a_quantized_model_without_weights_is_like_one_with_them(settings: dict[str, Any]) -> None:
    config = ptq.QuantConfig.of(
        **{**PLAIN, "range_search": "minmax", "calib_steps": 5, "calib_rows": 2, "steps": 5, **settings}
    )
    made = ptq.quantize(tiny_model(), config, key=jax.random.key(0), keep_poor=True).astype(jnp.bfloat16)
    shapes = aot.quantized_model(tiny_config(), config, "bfloat16")
    assert structure(shapes) == structure(made)
    assert leaves(shapes) == leaves(made)


def test_a_float_model_without_weights_is_like_one_with_them() -> None:
    made = ptq.FloatDiT.init(tiny_config(), key=jax.random.key(0)).astype(jnp.bfloat16)
    shapes = aot.float_model(tiny_config(), "bfloat16")
    assert structure(shapes) == structure(made)
    assert leaves(shapes) == leaves(made)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_sampler_gets_what_users_calls_give_it(devices: int, mesh8: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling, mesh, seen = ptq.Sampling(steps=2), None if devices == 1 else mesh8, []
    original = Request.call

    def call(self: Request, *args: Any, **settings: Any) -> Any:
        seen.append(original(self, *args, **settings))
        return seen[-1]

    monkeypatch.setattr(Request, "call", call)
    labels = np.arange(3 * devices) % 5
    ptq.sample(tiny_model(), labels, key=jax.random.key(0), sampling=sampling, batch_size=len(labels), mesh=mesh)
    shapes, program = aot.arguments(aot.float_model(tiny_config(), "float32"), jax.devices()[:devices], 3, sampling)
    [(given, expected)] = seen
    assert program == expected
    assert structure(shapes) == structure(given)
    assert leaves(shapes) == leaves(given)
    if devices > 1:
        at = lambda tree: [leaf.sharding for leaf in jax.tree.leaves(tree)]
        assert at(shapes) == at(given)
