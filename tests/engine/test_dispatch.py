"""Backends asked in turn: their order, the reasons of those that refuse, and the names that users give."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import HOPPER, PLAIN, XLA, random_inputs, tiny_model
from jax.typing import DTypeLike

import ptq4dit_jax as ptq
from ptq4dit_jax import terminal
from ptq4dit_jax.devices import DeviceKind, JaxVersions, described
from ptq4dit_jax.engine import choice, hopper, xla
from ptq4dit_jax.engine.backends import IntegerBackend, NotCovered, require
from ptq4dit_jax.engine.dispatch import Dispatch, Refusal, watched
from ptq4dit_jax.engine.stacks import OfLayer
from ptq4dit_jax.quantizers import ActQuantizer, Encoded, QTensor

T = jnp.array([500])


class Toy(IntegerBackend[jax.Array]):
    """Multiplies two-dimensional codes by weights of 8 bits, in floats, and does nothing else."""

    name = "toy"
    needs = "a CPU"
    dtypes = ("float32",)

    def unfit(self, device: DeviceKind) -> str:
        return "" if device.platform == "cpu" else "it counts on a CPU"

    def linear(self, x: Encoded, weight: QTensor, bias: jax.Array, dtype: DTypeLike) -> jax.Array:
        require(not weight.packed, "weights are packed")
        require(x.values.ndim == 2, f"the input has {x.values.ndim} axes")
        product = x.values.astype(jnp.float32) @ weight.values.astype(jnp.float32).T
        return (product * x.scale * weight.scale[None] + bias[None]).astype(dtype)


class Answers(IntegerBackend[jax.Array]):
    """Answers with a number, or refuses with a reason."""

    def __init__(self, answer: float | str) -> None:
        self.answer = answer

    name = "answers"

    def batched(self, a: jax.Array, b: jax.Array) -> jax.Array:
        if isinstance(self.answer, str):
            raise NotCovered(self.answer)
        return jnp.full(a.shape, self.answer)


def layer(bits: int = 8, lead: tuple[int, ...] = (2,)) -> tuple[Encoded, QTensor, jax.Array]:
    """Codes (*lead, 16), a weight (6, 16) and a bias."""
    rng = np.random.default_rng(0)
    low, high = (-127, 128) if bits == 8 else (0, 16)
    codes = jnp.asarray(rng.integers(low, high, (6, 16)), jnp.float32)
    weight = QTensor.from_codes(codes, jnp.full(6, 0.01, jnp.float32), jnp.zeros(6), bits)
    values = jnp.asarray(rng.integers(-128, 128, (*lead, 16)), jnp.int8)
    return Encoded(values, jnp.float32(0.5), None), weight, jnp.arange(6, dtype=jnp.float32)


def test_the_first_that_covers_a_call_runs_it_and_the_reasons_of_the_others_are_kept() -> None:
    x = jnp.zeros((1, 1, 2, 3))
    first, second, third, last = chain = Answers("too small"), IntegerBackend[jax.Array](), Answers(3), Answers(4)
    with watched() as ran:
        np.testing.assert_array_equal(Dispatch(chain).batched(x, x), 3)
        np.testing.assert_array_equal(Dispatch((last, first)).batched(x, x), 4)
    assert [call.backend for call in ran] == [third, last]
    assert ran[0].refusals == (Refusal(first, "too small"), Refusal(second, "there is no kernel for batched"))
    assert [call.why for call in ran] == ["too small; there is no kernel for batched", ""]


def test_what_no_backend_covers_names_the_reason_of_each() -> None:
    x = jnp.zeros((1, 1, 2, 3))
    with watched() as ran, pytest.raises(NotCovered, match="answers: too small; answers: too large"):
        Dispatch((Answers("too small"), Answers("too large"))).batched(x, x)
    assert ran == []


def test_only_a_refusal_hands_a_call_over() -> None:
    class Broken(Answers):
        def batched(self, a: jax.Array, b: jax.Array) -> jax.Array:
            raise NotImplementedError("a fault of its own")

    x = jnp.zeros((1, 1, 2, 3))
    with pytest.raises(NotImplementedError, match="a fault of its own"):
        Dispatch((Broken(1), Answers(2))).batched(x, x)


@pytest.mark.parametrize(("bits", "lead", "why"), [(8, (2,), ""), (4, (2,), "packed"), (8, (2, 3), "3 axes")])
def test_a_backend_runs_what_it_covers_and_hands_over_the_rest(bits: int, lead: tuple[int, ...], why: str) -> None:
    dispatch, operands = Dispatch((Toy(), xla.BACKEND)), layer(bits, lead)
    assert dispatch.covers(dispatch.linear, *operands, jnp.float32) == (not why)
    with watched() as ran:
        got = dispatch.linear(*operands, jnp.float32)
    np.testing.assert_allclose(got, XLA.linear(*operands, jnp.float32), rtol=1e-5)
    assert ran[0].backend.name == ("xla" if why else "toy")
    assert why in ran[0].why


def test_layers_are_cut_out_for_whoever_does_not_read_stacks() -> None:
    x, weight, bias = layer()
    stacked = jax.tree.map(lambda leaf: OfLayer(jnp.stack([0 * leaf, leaf]), jnp.int32(1)), (x.scale, weight, bias))
    seen: list[type] = []

    class Looks(IntegerBackend[Any]):
        name = "looks"

        def linear(self, x: Encoded, weight: QTensor, bias: Any, dtype: DTypeLike) -> jax.Array:
            seen.extend(type(leaf) for leaf in (x.scale, weight.values, bias))
            raise NotCovered("it only looks")

    class Reads(Looks):
        reads_stacks = True

    scale, in_stack, offset = stacked
    for looks in (Reads(), Looks()):
        dispatch = Dispatch((looks, xla.BACKEND))
        got = dispatch.linear(x._replace(scale=scale), in_stack, offset, jnp.float32)
        np.testing.assert_array_equal(got, XLA.linear(x, weight, bias, jnp.float32))
    assert seen[:3] == [OfLayer] * 3
    assert OfLayer not in seen[3:]


def test_derivatives_through_a_kernel_are_refused_in_a_sentence(raises_sentence: Any) -> None:
    x, weight, bias = layer()
    value = lambda dispatch: lambda bias: dispatch.linear(x, weight, bias, jnp.float32).sum()
    np.testing.assert_array_equal(jax.grad(value(XLA))(bias), np.full(6, 2.0))
    with raises_sentence("reference(model, straight_through=True)"):
        jax.grad(value(Dispatch((Toy(), xla.BACKEND))))(bias)


@pytest.fixture(scope="module")
def quantized() -> ptq.QuantizedDiT:
    config = ptq.QuantConfig.of(**PLAIN, policy="edges8", steps=2, calib_steps=2, calib_rows=2)
    return ptq.quantize(jax.tree.map(jnp.asarray, tiny_model()), config, key=jax.random.key(0))


@pytest.fixture
def with_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "BACKENDS", (Toy(), *choice.BACKENDS))


@pytest.mark.usefixtures("with_toy")
def test_a_model_runs_by_a_backend_of_one_operation(quantized: ptq.QuantizedDiT) -> None:
    x, y = random_inputs(quantized.config, 2)
    toy, reference = (quantized.replace(backend=name) for name in ("toy", "xla"))
    np.testing.assert_allclose(toy.apply(x, T, y), reference.apply(x, T, y), rtol=1e-3, atol=1e-3)
    rows = {row.layer: row for row in ptq.describe(toy)}
    assert rows["time_fc1"].backend == "toy, codes by xla"
    assert rows["time_fc1"].why == "there is no kernel for encode"
    assert rows["patch_embed"].why == "there is no kernel for encode; the input has 3 axes"
    assert rows["blocks.qkv"].backend == rows["blocks.q @ k"].backend == "xla"
    assert rows["blocks.fc1"].why == "there is no kernel for modulate_encode; there is no kernel for linear_gelu"
    assert rows["blocks.q @ k"].why == "there is no kernel for attention"
    assert rows["blocks.q @ k"].integer


@pytest.mark.usefixtures("with_toy")
def test_a_new_backend_is_listed_and_chosen_where_it_fits(raises_sentence: Any) -> None:
    assert choice.names() == ["auto", "xla", "tpu", "hopper", "fp8", "toy"]
    with raises_sentence("toy", "float32", "bfloat16"):
        choice.resolve("toy", "bfloat16")
    with described(DeviceKind("cpu")):
        assert choice.resolve("auto", "float32").name == "toy"
    with described(DeviceKind("gpu", (9, 0))):
        assert choice.resolve("auto", "bfloat16") == (hopper.BACKEND, "it counts on a CPU")


def test_an_unknown_name_is_refused_at_once(quantized: ptq.QuantizedDiT, raises_sentence: Any) -> None:
    for asked in (
        lambda: quantized.replace(backend="cutlass"),
        lambda: choice.resolve("cutlass", "float32"),
        lambda: choice.named("cutlass"),
    ):
        with raises_sentence("'cutlass'", "auto, xla, tpu, hopper, fp8"):
            asked()


def test_the_former_name_of_hopper_is_still_taken(quantized: ptq.QuantizedDiT) -> None:
    assert quantized.replace(backend="mosaic_gpu").backend == "hopper"
    with described(DeviceKind("gpu", (9, 0))):
        assert terminal.to_run(quantized, "auto", "mosaic_gpu").backend == "hopper"
    assert choice.named("mosaic_gpu") is hopper.BACKEND
    assert "mosaic_gpu" not in choice.names()


def test_the_versions_of_a_range() -> None:
    versions = JaxVersions((0, 10, 2), (0, 11))
    assert str(versions) == "0.10.2 to 0.11"
    assert [version in versions for version in ((0, 10, 1), (0, 10, 2), (0, 11, 0), (0, 11, 7), (0, 12, 0))] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_what_hopper_has_no_kernel_for_is_the_reference_s() -> None:
    pairs = jnp.ones((1, 1, 2, 3), jnp.int8)
    with watched() as ran:
        np.testing.assert_array_equal(HOPPER.batched(pairs, pairs), 3)
        HOPPER.encode(jnp.zeros((2, 3)), ActQuantizer(jnp.float32(1), jnp.int32(0)))
    assert [call.why for call in ran] == ["there is no kernel for batched", "the input has shape (2, 3), not (B, T, K)"]
