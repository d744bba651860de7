"""A model that four chips hold between them, compiled for them: what each holds, and what they say to one another."""

from __future__ import annotations

import pytest
import tpu_helpers
from tpu_helpers import IMAGES, Compiled, exchanged, network, sampler, weights_of

from benchmarks import aot
from ptq4dit_jax.config import QuantConfig

pytestmark = tpu_helpers.MARKS

CHIPS, SHARE = 16, 4


@pytest.fixture(scope="module", params=[8, 4], ids=["W8A8", "W4A8"])
def cut(request: pytest.FixtureRequest) -> tuple[int, Compiled]:
    """The sampler of a quantized model of two blocks, and the bits of its weights."""
    model = aot.quantized_model(network(2), QuantConfig.of(weight_bits=request.param), "bfloat16")
    return request.param, sampler(model, "v5e", CHIPS, share=SHARE)


def test_sums_of_integers_are_added_up_as_integers(cut: tuple[int, Compiled]) -> None:
    """Behind proj and fc2, whose contraction is cut: all tokens of the images that four chips share, two rows each."""
    config = network(2)
    rows = 2 * IMAGES * SHARE
    sums = [array for array in exchanged(cut[1].module, "all-reduce") if array.kind == "s32"]
    assert sum(array.size == rows * config.num_tokens * config.hidden_size for array in sums) >= 2


def test_no_weight_is_gathered(cut: tuple[int, Compiled]) -> None:
    gathered = exchanged(cut[1].module, "all-gather")
    assert not [array for array in gathered if array.kind in ("s8", "u8", "s4") and array.size in weights_of(network(2))]


def test_a_chip_holds_a_quarter(cut: tuple[int, Compiled]) -> None:
    """Of the weights of blocks; the rest of the arguments is small."""
    bits, program = cut
    weights = 2 * (3 + 1 + 4 + 4 + 6) * 1152**2
    whole = bits / 8 * weights
    assert whole / SHARE < program.argument_bytes < whole / SHARE + 20e6
