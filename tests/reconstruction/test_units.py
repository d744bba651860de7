"""The units put together are the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_inputs, tiny_model

from ptq4dit_jax.reconstruction.units import apply_unit, units


def params_of(model, unit):
    if unit.kind.stack is not None:
        return jax.tree.map(lambda leaf: leaf[unit.index], model.params["blocks"])
    return {name: model.params[name] for name in (*unit.layers, *unit.tables) if name in model.params}


def test_every_linear_layer_and_site_belongs_to_one_unit(tiny_config):
    found = units(tiny_config)
    assert [unit.name for unit in found] == ["embed image", "embed condition", "block 0", "block 1", "block 2", "head"]
    layers = [name for unit in found for name in unit.layers.values()]
    assert set(layers) == set(tiny_config.linear_shapes)
    assert len(layers) == len(set(layers)) + 2 * 5  # three blocks share the stacked names
    assert {name for unit in found for name in unit.sites.values()} == set(tiny_config.site_features)


@pytest.mark.parametrize("tables", [{}, {"position_table": True, "num_classes": 0, "null_class": False}])
def test_in_a_row_they_are_the_network(tables):
    model = tiny_model(**tables)
    config = model.config
    x, y = random_inputs(config, 4)
    t = np.array([0, 10, 500, 999])
    run = lambda unit, *inputs: apply_unit(config, unit.kind, params_of(model, unit), {}, inputs, jnp.float32)
    image, condition, *blocks, head = units(config)
    hidden, c = run(image, x), run(condition, t, y)
    for block in blocks:
        hidden = run(block, hidden, c)
    np.testing.assert_allclose(run(head, hidden, c), model.apply(x, t, y), rtol=2e-5, atol=2e-5)


def test_quantizers_act_at_the_sites_of_a_unit(tiny_model, tiny_config):
    unit, seen = units(tiny_config)[3], []
    assert unit.name == "block 1"
    inputs = jnp.ones((2, tiny_config.num_tokens, 32), jnp.float32), jnp.ones((2, 32), jnp.float32)

    def watch(name):
        def see(x):
            seen.append((name, x.shape))
            return x

        return jax.tree_util.Partial(see)

    apply_unit(
        tiny_config, unit.kind, params_of(tiny_model, unit), {site: watch(site) for site in unit.sites}, inputs, jnp.float32
    )
    assert [name for name, _ in seen] == ["adaLN_in", "qkv_in", "q", "k", "v", "probs", "proj_in", "fc1_in", "fc2_in"]
    assert dict(seen)["fc2_in"] == (2, tiny_config.num_tokens, 128)


def test_of_depth_takes_the_slice_of_a_block_only(tiny_config):
    *_, block, head = units(tiny_config)
    assert (block.name, head.name) == ("block 2", "head")
    stacked = {"a": jnp.arange(12).reshape(4, 3)}
    np.testing.assert_array_equal(block.of_depth(stacked)["a"], [6, 7, 8])
    np.testing.assert_array_equal(head.of_depth(stacked)["a"], stacked["a"])
