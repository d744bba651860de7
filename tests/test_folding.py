"""Folding changes parameters, never the function: every subset of balanced sites, on a model with salient channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from helpers import random_inputs, relative_error, structure, tiny_config, tiny_model

from benchmarks.salient import salient_model
from ptq4dit_jax.folding import fold
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.quantizers import ChannelScale
from ptq4dit_jax.salience import balancing_factors, weight_salience

#: From nothing to everything that can be balanced.
SUBSETS = (
    (),
    ("qkv_in", "fc1_in"),
    ("qkv_in", "fc1_in", "proj_in"),
    ("qkv_in", "fc1_in", "proj_in", "fc2_in"),
    ("qkv_in", "fc1_in", "proj_in", "fc2_in", "v"),
    ("v",),
    ("fc2_in",),
)
all_subsets = pytest.mark.parametrize("sites", SUBSETS, ids=lambda sites: "+".join(sites) or "none")


@struct.dataclass
class Extremes:
    """Observer of the largest magnitude per channel of the one batch that it sees."""

    largest: jax.Array

    def observe(self, x: jax.Array) -> Extremes:
        return Extremes(abs(x).reshape(-1, x.shape[-1]).max(0))


apply = jax.jit(lambda model, x, t, y: model.apply(x, t, y))
observe = jax.jit(lambda model, observers, x, t, y: model.observe(observers, x, t, y))


def block_extremes(model: FloatDiT, sites: tuple[str, ...], rows: int = 4) -> dict[str, np.ndarray]:
    """Largest magnitudes (L, K) at block sites."""
    x, y = random_inputs(model.config, rows)
    observers = {"blocks": {name: Extremes(jnp.zeros(model.config.depth)) for name in sites}}
    _, seen = observe(model, observers, x, np.array([500]), y)
    return {name: np.asarray(seen["blocks"][name].largest) for name in sites}


def random_factors(model: FloatDiT, sites: tuple[str, ...], seed: int = 0) -> dict[str, Any]:
    """Factors over almost two decades, one set per layer."""
    rng, config = np.random.default_rng(seed), model.config
    width = lambda name: config.mlp_size if name == "fc2_in" else config.hidden_size
    return {name: np.exp(rng.normal(size=(config.depth, width(name)))).astype(np.float32) for name in sites}


def fold_blocks(blocks: Any, factors: Mapping[str, jax.Array]) -> tuple[dict[str, Any], dict[str, Any]]:
    """:func:`fold` of the blocks alone, factors and what remains by the sites' names inside them."""
    params, residual = fold(tiny_config(), {"blocks": blocks}, {f"blocks.{name}": factor for name, factor in factors.items()})
    return params["blocks"], {name.removeprefix("blocks."): factor for name, factor in residual.items()}


def folded_model(model: FloatDiT, factors: Mapping[str, jax.Array]) -> FloatDiT:
    blocks, residual = fold_blocks(model.params["blocks"], factors)
    quantizers = {"blocks": {name: ChannelScale(factor) for name, factor in residual.items()}} if residual else {}
    return dataclasses.replace(model, params={**model.params, "blocks": blocks}, quantizers=quantizers)


@pytest.fixture(scope="module")
def plain() -> FloatDiT:
    return tiny_model()


@pytest.fixture(scope="module")
def salient(plain: FloatDiT) -> FloatDiT:
    return salient_model(plain)


@pytest.mark.parametrize("t", [0, 1, 250, 500, 999])
def test_salient_channels_leave_the_function_unchanged(plain: FloatDiT, salient: FloatDiT, t: int) -> None:
    x, y = random_inputs(plain.config, 6)
    assert relative_error(apply(salient, x, np.array([t]), y), apply(plain, x, np.array([t]), y)) < 1e-5


def test_salient_channels_are_salient(plain: FloatDiT, salient: FloatDiT) -> None:
    sites = ("qkv_in", "fc1_in", "proj_in", "fc2_in")
    before, after = block_extremes(plain, sites), block_extremes(salient, sites)
    for name, layer in (("qkv_in", "qkv"), ("fc1_in", "fc1"), ("proj_in", "proj")):
        gains = after[name] / before[name]
        columns = slice(2 * plain.config.hidden_size)  # of qkv only q and k: its v columns were made larger themselves
        new, old = (np.abs(model.params["blocks"][layer]["kernel"][..., columns]).max(-1) for model in (salient, plain))
        rows = new / old
        for gain, row in zip(gains, rows, strict=True):  # one channel of 32 in every layer
            np.testing.assert_allclose(np.sort(gain), [1] * 31 + [30], rtol=1e-3)
            assert np.argmax(gain) == np.argmin(row)
            assert row.min() == pytest.approx(1 / 30, rel=1e-5)
    np.testing.assert_allclose(after["fc2_in"], before["fc2_in"], rtol=1e-3, atol=1e-5)


@all_subsets
@pytest.mark.parametrize("t", [0, 500, 999])
def test_folding_leaves_the_output_unchanged(salient: FloatDiT, sites: tuple[str, ...], t: int) -> None:
    x, y = random_inputs(salient.config, 6)
    folded = folded_model(salient, random_factors(salient, sites))
    expected = apply(salient, x, np.array([t]), y)
    assert relative_error(apply(folded, x, np.array([t]), y), expected) < 1e-5


@all_subsets
def test_folding_under_jit_equals_folding_plain(salient: FloatDiT, sites: tuple[str, ...]) -> None:
    factors = random_factors(salient, sites)
    plain_result = fold_blocks(salient.params["blocks"], factors)
    compiled = jax.jit(fold_blocks)(salient.params["blocks"], factors)
    assert structure(compiled) == structure(plain_result)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), compiled, plain_result)


def test_folding_and_the_forward_pass_fit_in_one_program(salient: FloatDiT) -> None:
    x, y = random_inputs(salient.config, 4)
    t = np.array([0, 250, 500, 999])

    @jax.jit
    def run(model: FloatDiT, factors: dict[str, jax.Array]) -> jax.Array:
        return folded_model(model, factors).apply(x, t, y)

    assert relative_error(run(salient, random_factors(salient, SUBSETS[4])), apply(salient, x, t, y)) < 1e-5


def test_channels_reach_their_layers_multiplied(salient: FloatDiT) -> None:
    """What the layers receive is ``b x``: the balance takes place, it does not cancel before it matters."""
    sites = ("qkv_in", "proj_in", "fc1_in", "fc2_in")
    factors = random_factors(salient, (*sites, "v"))
    before, after = block_extremes(salient, sites), block_extremes(folded_model(salient, factors), sites)
    for name in sites:
        np.testing.assert_allclose(after[name], before[name] * factors[name], rtol=2e-3, atol=1e-5)


def test_kernels_are_divided_and_v_is_multiplied(salient: FloatDiT) -> None:
    factors = random_factors(salient, SUBSETS[4])
    old = jax.tree.map(np.asarray, salient.params["blocks"])
    new, residual = fold_blocks(old, factors)
    for layer in ("proj", "fc1", "fc2"):
        np.testing.assert_allclose(new[layer]["kernel"], old[layer]["kernel"] / factors[f"{layer}_in"][:, :, None], rtol=1e-6)
        np.testing.assert_array_equal(new[layer]["bias"], old[layer]["bias"])
    width = salient.config.hidden_size
    columns = np.ones((salient.config.depth, 3 * width), np.float32)
    columns[:, 2 * width :] = factors["v"]
    kernel = old["qkv"]["kernel"] / factors["qkv_in"][:, :, None] * columns[:, None]
    np.testing.assert_allclose(new["qkv"]["kernel"], kernel, rtol=1e-6)
    np.testing.assert_allclose(new["qkv"]["bias"], old["qkv"]["bias"] * columns, rtol=1e-6)
    assert set(residual) == {"proj_in", "fc2_in"}
    np.testing.assert_allclose(residual["proj_in"], factors["proj_in"] / factors["v"], rtol=1e-6)
    np.testing.assert_array_equal(residual["fc2_in"], factors["fc2_in"])


def test_gates_are_not_touched(salient: FloatDiT) -> None:
    width = salient.config.hidden_size
    old = salient.params["blocks"]["adaLN"]
    new = fold_blocks(salient.params["blocks"], random_factors(salient, ("qkv_in", "fc1_in")))[0]["adaLN"]
    for gate in (2, 5):
        columns = slice(gate * width, (gate + 1) * width)
        np.testing.assert_array_equal(new["kernel"][..., columns], old["kernel"][..., columns])
        np.testing.assert_array_equal(new["bias"][..., columns], old["bias"][..., columns])


def test_nothing_to_fold_returns_the_parameters(salient: FloatDiT) -> None:
    blocks, residual = fold_blocks(salient.params["blocks"], {})
    assert residual == {}
    jax.tree.map(np.testing.assert_array_equal, blocks, dict(salient.params["blocks"]))


def test_fold_does_not_change_what_it_is_given(salient: FloatDiT) -> None:
    blocks = jax.tree.map(np.array, salient.params["blocks"])
    kept = jax.tree.map(np.copy, blocks)
    fold_blocks(blocks, random_factors(salient, SUBSETS[4]))
    jax.tree.map(np.testing.assert_array_equal, blocks, kept)


def test_balancing_flattens_the_salient_channels(salient: FloatDiT) -> None:
    """The whole point: after CSB the input channels and the kernel rows of a layer have the same extremes."""
    sites = ("qkv_in", "proj_in", "fc1_in", "fc2_in")
    kernels = salient.params["blocks"]
    before = block_extremes(salient, sites)
    factors = {
        name: balancing_factors(jnp.asarray(before[name]), weight_salience(kernels[name.removesuffix("_in")]["kernel"]))
        for name in sites
    }
    folded = folded_model(salient, factors)
    after = block_extremes(folded, sites)
    for name in sites:
        rows = np.abs(folded.params["blocks"][name.removesuffix("_in")]["kernel"]).max(-1)
        np.testing.assert_allclose(after[name], rows, rtol=5e-3)
