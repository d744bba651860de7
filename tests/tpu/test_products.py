"""What the compiler estimates of a product is at least its bound, and more follows it for no less."""

from __future__ import annotations

import pytest
import tpu_helpers
from tpu_helpers import network

from benchmarks import tpu_products

pytestmark = tpu_helpers.MARKS


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_an_estimate_is_above_its_bound(generation: str) -> None:
    names = list(tpu_products.PROGRAMS)
    estimates = [tpu_products.milliseconds(generation, name, network()) for name in names]
    bounds = [tpu_products.bound(generation, name, network()) for name in names]
    assert all(bound < estimate < 10 * bound for bound, estimate in zip(bounds, estimates, strict=True))
    shifted, scaled, gelu, floats, floats_gelu = estimates
    assert 0.99 * shifted < scaled < 1.01 * gelu
    assert 0.99 * floats < floats_gelu
    assert bounds[0] == bounds[3] / 2
