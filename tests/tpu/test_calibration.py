"""Calibration compiled for a TPU: a program of one chip for each micro-batch, in three bfloat16 passes, and small results."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tpu_helpers
from jax.sharding import SingleDeviceSharding
from tpu_helpers import Compiled, attention_products, compiled, network, products_of, sizes_of

from benchmarks import aot
from ptq4dit_jax.calibration import HISTOGRAM_BINS, MICRO_BATCH, CalibrationData, extremes_of_rows, histograms_of_rows
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.devices import DeviceKind, described
from ptq4dit_jax.numerics import CALIBRATION
from ptq4dit_jax.quantization.choices import integer_sites

pytestmark = tpu_helpers.MARKS

STEPS, GROUPS = 25, 5


def lowered(program: Any, *arguments: Any, **static: Any) -> tuple[Any, Any]:
    """The program for one chip of sixteen, as calibration deals it out, and the shapes of its results."""
    device = aot.devices("v5e", 16)[5]
    model = dataclasses.replace(aot.float_model(network(1), "float32"), precision=CALIBRATION)
    shape = jax.ShapeDtypeStruct
    rows = CalibrationData(
        x=shape((STEPS, MICRO_BATCH, *model.config.image_shape), jnp.float32),  # type: ignore[arg-type]
        t=shape((STEPS,), jnp.int32),  # type: ignore[arg-type]
        y=shape((STEPS, MICRO_BATCH), jnp.int32),  # type: ignore[arg-type]
    )
    placed = aot.placed((model, rows, *arguments), SingleDeviceSharding(device))
    with described(DeviceKind.of(device)):
        return program.lower(*placed, **static), jax.eval_shape(lambda *args: program(*args, **static), *placed)


@pytest.fixture(scope="module")
def extremes() -> tuple[Compiled, Any]:
    low, results = lowered(extremes_of_rows, sites=tuple(network(1).site_features))
    return compiled(low), results


@pytest.fixture(scope="module")
def histograms() -> tuple[Compiled, Any]:
    config, spec = QuantConfig().for_network(network(1)), network(1).spec
    static = [name for name in integer_sites(config, spec) if name not in (config.activations.dynamic_sites or ())]
    assert static
    edge = {name: jax.ShapeDtypeStruct((GROUPS, *spec.sites[name].place.lead), jnp.float32) for name in static}
    ranges = {name: (shape, shape) for name, shape in edge.items()}
    low, results = lowered(histograms_of_rows, jax.ShapeDtypeStruct((STEPS,), jnp.int32), ranges, num_groups=GROUPS)
    return compiled(low), results


@pytest.mark.parametrize("name", ["extremes", "histograms"])
def test_products_are_as_exact_as_calibration_asks(name: str, request: pytest.FixtureRequest) -> None:
    program, _ = request.getfixturevalue(name)
    module, config = program.module, network(1)
    assert len(attention_products(module, config, MICRO_BATCH)) >= 2
    for layer in ("qkv", "proj", "fc1"):  # nothing is observed behind the last fc2
        assert products_of(module, sizes_of(config, MICRO_BATCH, config.spec.linears[f"blocks.{layer}"])), layer
    assert {product.types for product in module.products} == {"f32 = f32 x f32 (high)"}
    assert not any(product.one_pass for product in module.products)
    assert not module.kinds & {"bf16", "f64"}


@pytest.mark.parametrize("name", ["extremes", "histograms"])
def test_chips_say_nothing_to_each_other(name: str, request: pytest.FixtureRequest) -> None:
    """Rows of other chips would have to be gathered; programs of several chips would show it (test_sampler.py)."""
    program, _ = request.getfixturevalue(name)
    assert not program.module.collectives


def test_statistics_are_small(extremes: tuple[Compiled, Any], histograms: tuple[Compiled, Any]) -> None:
    """Nothing of size (tokens, channels) leaves the loop over the steps."""
    config = network(1)
    features = config.site_features
    for name, seen in extremes[1].items():
        lead = config.spec.sites[name].place.lead
        assert {leaf.shape for leaf in jax.tree.leaves(seen)} == {(STEPS, *lead, *features[name])}
    for counted in histograms[1].values():
        assert counted.counts.shape[-1] == HISTOGRAM_BINS
        assert counted.counts.size <= GROUPS * config.depth * HISTOGRAM_BINS
