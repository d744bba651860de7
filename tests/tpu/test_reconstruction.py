"""Reconstruction compiled for chips that share a batch: one exchange per iteration, and rows that stay where they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tpu_helpers
from tpu_helpers import Compiled, network, of_program

from benchmarks import aot
from ptq4dit_jax import sharding
from ptq4dit_jax.config import QuantConfig, Reconstruction
from ptq4dit_jax.devices import DeviceKind, described
from ptq4dit_jax.engine import QuantizedDiT
from ptq4dit_jax.engine.quantized_dit import site_quantizers
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.reconstruction import optimize
from ptq4dit_jax.reconstruction.learning import LearningWalk, _compiled
from ptq4dit_jax.reconstruction.optimize import Learning, Rows, Task, Variables
from ptq4dit_jax.reconstruction.units import Unit

pytestmark = tpu_helpers.MARKS

CHIPS, BATCH, SIZE = 16, 32, 5
SETTINGS = Reconstruction(iterations=100, batch_size=BATCH)


def unit_of(unit: Unit, folded: FloatDiT, quantized: QuantizedDiT) -> tuple[Task, Variables]:
    """What is fixed and what is learned in a block; the rows of a walk are not needed for that."""
    walk = object.__new__(LearningWalk)
    walk.folded, walk.quantized, walk.acts = folded, quantized, site_quantizers(quantized)
    return walk.task(unit)


@pytest.fixture(scope="module")
def block() -> Compiled:
    """Learning of a block of DiT-XL/2, on the chips that share each batch."""
    config, devices = network(1), aot.devices("v5e", CHIPS)
    models = aot.float_model(config, "float32"), aot.quantized_model(config, QuantConfig.of(weight_bits=4), "float32")
    [unit] = [Unit(kind) for kind in config.spec.kinds if kind.stack is not None]
    task, variables = jax.eval_shape(partial(unit_of, unit), *models)
    state = jax.eval_shape(lambda variables: optimize.start(variables, SETTINGS), variables)
    shape: Any = jax.ShapeDtypeStruct
    hidden = shape((SIZE, BATCH, config.num_tokens, config.hidden_size), jnp.bfloat16)
    rows = Rows[Any](
        inputs=(hidden, shape((SIZE, BATCH, config.hidden_size), jnp.bfloat16)),
        target=hidden,
        group=shape((SIZE, BATCH), jnp.int32),
        weight=shape((SIZE, BATCH), jnp.float32),
    )
    others = shape((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0)), shape((), jnp.int32)
    leaves, structure = jax.tree.flatten((state, task, rows, *others))
    chunks = SETTINGS.resolved_chunks("tpu")
    with described(DeviceKind.of(devices[0])):
        how = Learning(config, unit.kind, SETTINGS, "bfloat16", chunks)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        return of_program(_compiled(structure, shapes, sharding.data_mesh(devices), how, False))


def test_an_iteration_has_one_exchange(block: Compiled) -> None:
    """The gradients' sum, of all layers together. Nothing is gathered: each chip draws from the rows that it holds."""
    assert dict(block.module.collectives) == {"all-reduce": 1}


def test_each_chip_holds_its_share_of_the_rows(block: Compiled) -> None:
    """Inputs and targets; besides, for each weight a code of one byte, its variable in float32, and Adam's two moments."""
    config = network(1)
    rows = 2 * SIZE * BATCH * config.num_tokens * config.hidden_size * 2
    weights = 18 * config.hidden_size**2
    assert block.argument_bytes == pytest.approx((1 + 3 * 4) * weights + rows / CHIPS, rel=0.01)
