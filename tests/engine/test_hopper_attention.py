"""The attention kernel for Hopper: lowered for CUDA anywhere, run by Pallas' interpreter (JAX 0.11), and on such a GPU compared
with NumPy in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_helpers import HAS_INTERPRETER, interpreter, on_hopper
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from operation_contracts import attended

from ptq4dit_jax.engine.hopper import attention as kernel
from ptq4dit_jax.engine.hopper import common
from ptq4dit_jax.engine.hopper.attention import Round

#: Images, tokens, heads and their width: strangers among the columns or none, one or several rounds of the ring, tiles that
#: share keys and tiles that do not.
CASES = [(3, 256, 4, 72), (1, 128, 4, 72), (1, 256, 2, 64), (1, 512, 2, 72), (1, 128, 2, 40), (1, 128, 4, 56)]
ROUND = Round(jnp.asarray([99, -3], jnp.int32), jnp.asarray([1], jnp.int32), -128, 127)


def drawn(images: int, tokens: int, heads: int, d: int, size: float = 1.0) -> list[jax.Array]:
    """Queries, keys and values; some rows are far more certain than others, one column is large."""
    rng = np.random.default_rng(images * tokens * d)
    shape = images * tokens, heads * d
    q, k, v = (rng.normal(size=shape) for _ in range(3))
    q *= rng.choice([0.0, 1.0, 8.0], (shape[0], 1))
    v[:, 3] *= 4
    return [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v * size)]


def exact(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int, heads: int) -> np.ndarray:
    """In float64."""
    of_images = lambda x: x.reshape(-1, tokens, x.shape[-1])
    return attended(of_images(q), of_images(k), of_images(v), heads).reshape(q.shape)


def check(images: int, tokens: int, heads: int, d: int) -> None:
    """Probabilities are rounded to bfloat16 (2^-9 of each), sums of them are not; then the output is, or becomes a code."""
    q, k, v = drawn(images, tokens, heads, d)
    run = jax.jit(partial(kernel.attention, tokens=tokens, heads=heads))
    spread = np.abs(np.asarray(v, np.float64)).max()
    want = exact(q, k, v, tokens, heads)
    np.testing.assert_allclose(np.asarray(run(q, k, v), np.float64), want, rtol=2**-8, atol=2**-9 * spread)

    q, k, v = drawn(images, tokens, heads, d, 30.0)
    codes = jax.jit(partial(kernel.attention, tokens=tokens, heads=heads, finish=ROUND))(q, k, v)
    assert codes.dtype == jnp.int8
    value = exact(q, k, v, tokens, heads)
    off = np.abs(np.asarray(codes, int) - np.clip(np.round(value) - 3, -128, 127))
    assert off.max() <= 1
    to_tie = np.abs(value - np.floor(value) - 0.5)
    assert np.all(to_tie[off > 0] < 2**-9 * np.abs(np.asarray(v, np.float64)).max())


@pytest.mark.parametrize("case", [*CASES, (2, 256, 16, 72), (128, 256, 16, 72), (16, 1024, 16, 72)], ids=str)
@pytest.mark.parametrize("finish", [None, ROUND], ids=["bfloat16", "codes"])
def test_it_lowers(case: tuple[int, int, int, int], finish: Round | None) -> None:
    images, tokens, heads, d = case
    x = jax.ShapeDtypeStruct((images * tokens, heads * d), jnp.bfloat16)
    assert kernel.covers(tokens, heads, d)
    run = jax.jit(partial(kernel.attention, tokens=tokens, heads=heads, finish=finish))
    text = run.trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("d", range(32, 81, 8))
def test_fetches_begin_at_whole_tiles(d: int) -> None:
    """What a bulk copy does with another place, the interpreter does not show."""
    plan = kernel._Plan(images=1, tokens=256, heads=6, d=d, codes=None, cores=132)
    tiling, _ = common.swizzled(plan.aligned, jnp.bfloat16)
    tile = tiling.tiling[-1]
    assert plan.width % tile == 0
    for head in range(6):
        first = head // 2 * 2 * d + head % 2 * d - plan.lead(head % 2)
        assert first % tile == 0
        assert first <= head * d
        assert head * d + d <= first + plan.width


@pytest.mark.parametrize(("tokens", "heads", "d"), [(64, 16, 72), (256, 3, 72), (256, 16, 70), (256, 16, 96), (256, 16, 24)])
def test_what_it_does_not_cover(tokens: int, heads: int, d: int) -> None:
    assert not kernel.covers(tokens, heads, d)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter has no products with an operand in registers: that one function is NumPy's here."""
    if not HAS_INTERPRETER:
        pytest.skip("needs Pallas' GPU interpreter")

    def product(a, b, init=None, then=lambda: None):
        made = lax.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))
        plgpu.commit_smem()  # which reads by wgmma do not need before a bulk copy takes the place
        then()
        return made if init is None else init + made

    monkeypatch.setattr(kernel, "product", product)
    with interpreter():
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cores", [3, 132], ids=["units in turn", "a unit a core"])
def test_interpreted(case: tuple[int, int, int, int], cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "core_count", lambda: cores)
    check(*case)


@on_hopper
@pytest.mark.parametrize("case", [*CASES, (2, 256, 16, 72), (40, 256, 16, 72), (3, 1024, 16, 72), (20, 256, 6, 64)], ids=str)
def test_on_hopper(case: tuple[int, int, int, int]) -> None:
    check(*case)
