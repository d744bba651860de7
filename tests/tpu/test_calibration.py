"""Calibration compiled for a TPU: a program of one chip for each micro-batch, in three bfloat16 passes, and small results."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tpu_helpers
from tpu_helpers import Compiled, attention_products, compiled, exchanged, network, products_of, sizes_of, weights_of

from benchmarks import aot
from ptq4dit_jax.calibration import HISTOGRAM_BINS, MICRO_BATCH, CalibrationData, extremes_of_rows, histograms_of_rows
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.devices import DeviceKind, described
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.numerics import CALIBRATION
from ptq4dit_jax.quantization.choices import integer_sites

pytestmark = tpu_helpers.MARKS

STEPS, GROUPS = 25, 5


def lowered(program: Any, *arguments: Any, config: DiTConfig | None = None, share: int = 1, **static: Any) -> tuple[Any, Any]:
    """The program for one chip of sixteen (or for ``share`` of them that hold the model between them), as calibration deals it
    out, and the shapes of its results."""
    device, *others = aot.devices("v5e", 16)[4 : 4 + share]
    model = dataclasses.replace(aot.float_model(config or network(1), "float32"), precision=CALIBRATION)
    places = aot.Places.on([device, *others], share)
    shape = jax.ShapeDtypeStruct
    rows = CalibrationData(
        x=shape((STEPS, MICRO_BATCH, *model.config.image_shape), jnp.float32),  # type: ignore[arg-type]
        t=shape((STEPS,), jnp.int32),  # type: ignore[arg-type]
        y=shape((STEPS, MICRO_BATCH), jnp.int32),  # type: ignore[arg-type]
    )
    placed = places.of_model(model), *aot.placed((rows, *arguments), places.whole)
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


@pytest.fixture(scope="module")
def xl_at_512() -> tuple[DiTConfig, dict[int, Compiled]]:
    """Statistics of all 28 blocks over 1,024 tokens, by one chip and by four that hold the model between them."""
    config = DiTConfig.preset("DiT-XL/2", input_size=64)
    sites = tuple(config.site_features)
    return config, {share: compiled(lowered(extremes_of_rows, config=config, share=share, sites=sites)[0]) for share in (1, 4)}


def test_xl_at_512_pixels_fits_into_a_chip_of_16_gigabytes(xl_at_512: tuple[DiTConfig, dict[int, Compiled]]) -> None:
    config, programs = xl_at_512
    assert 4 * config.num_parameters <= programs[1].argument_bytes < programs[1].peak_bytes < 16e9


def test_four_chips_hold_a_quarter_of_the_weights_each(xl_at_512: tuple[DiTConfig, dict[int, Compiled]]) -> None:
    """No weight is gathered; a float sum of four parts each goes around behind proj and fc2."""
    config, programs = xl_at_512
    cut = programs[4]
    weights = sum(math.prod((linear.N, linear.K, *linear.place.lead)) for linear in config.spec.linears.values())
    assert cut.argument_bytes < 4 * (weights / 4 + (config.num_parameters - weights)) + 100e6
    assert cut.peak_bytes < programs[1].peak_bytes
    gathered = [array for array in exchanged(cut.module, "all-gather") if array.size in weights_of(config)]
    assert not gathered
    assert len(exchanged(cut.module, "all-reduce")) >= 2
