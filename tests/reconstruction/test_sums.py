"""The sum that does not hang on the order: against float64, and the same bits for every permutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq4dit_jax.reconstruction.sums import order_free_sum


@pytest.mark.parametrize("shape", [(3, 7), (2, 16, 128), (1, 1), (2, 1024, 1152)])
def test_it_is_the_sum(shape):
    """To half a unit of each term: 2^-22 of twice the largest, 2^-18 for a million terms."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    axes = tuple(range(1, x.ndim))
    got = np.asarray(jax.jit(lambda x: order_free_sum(x, axes))(x))
    assert got.shape == (shape[0],) + (1,) * (x.ndim - 1)
    terms = x[0].size
    unit = 2.0 ** -(22 if terms <= 2**19 else 18)
    bound = np.abs(x).max(axes, keepdims=True) * 2 * unit * 3 * np.sqrt(terms)
    want = x.astype(np.float64).sum(axes, keepdims=True)
    assert np.all(np.abs(got - want) <= bound + 2.0**-23 * np.abs(want))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.integers(-120, 110), spread=st.integers(0, 60))
def test_every_order_gives_the_same_bits(seed, scale, spread):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((2, 300)) * 2.0 ** rng.integers(-spread, 1, (2, 300)) * 2.0**scale).astype(np.float32)
    one, other = (np.asarray(order_free_sum(jnp.asarray(y), (1,))) for y in (x, rng.permuted(x, axis=1)))
    assert one.tobytes() == other.tobytes()
    exact = x.astype(np.float64).sum(1, keepdims=True)
    assert np.all(np.abs(one - exact) <= 300 * (2.0**-21 * np.abs(x).max(1, keepdims=True) + 2.0**-126))


@pytest.mark.parametrize("x", [np.zeros((2, 5)), np.full((1, 4), 2.0**-140), np.array([[3e38, -3e38, 3e38]])])
def test_extremes_are_finite_and_right(x):
    got = order_free_sum(jnp.asarray(x, jnp.float32), (1,))
    np.testing.assert_allclose(got[:, 0], x.sum(1), rtol=1e-6, atol=2.0**-120)


def test_terms_that_int32_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="too many"):
        jax.eval_shape(lambda x: order_free_sum(x, (0,)), jax.ShapeDtypeStruct((2**30,), jnp.float32))
