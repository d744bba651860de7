"""Products of float32 and e4m3 say how exact they are, in every program that a user runs: a TPU would take one bfloat16 pass,
and a Hopper GPU would drop low bits of sums of e4m3."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import ptq4dit_jax as ptq
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.vae import VAEConfig, VAEDecoder

PACKAGE = str(Path(ptq.__file__).parent)
pytestmark = pytest.mark.slow


class Product(NamedTuple):
    """A traced product: the type of its operands, its precision, and the line of the package that asked for it."""

    dtype: str
    precision: Any
    where: str


def _asked_at() -> str:
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
    return f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}" if frames else "outside"


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Product]]:
    """The products that are traced during a test; what was traced before is forgotten."""
    found: list[Product] = []
    for primitive in (lax.dot_general_p, lax.conv_general_dilated_p):

        def bind(*args: Any, whole: Any = primitive.bind, **params: Any) -> Any:
            found.append(Product(jnp.result_type(args[0]).name, params["precision"], _asked_at()))
            return whole(*args, **params)

        monkeypatch.setattr(primitive, "bind", bind)
    jax.clear_caches()
    yield found
    jax.clear_caches()


def unchosen(products: list[Product]) -> set[Product]:
    """Products whose precision nobody chose: of float32, if they may be less exact than the statistics of calibration, and of
    e4m3, if their sums may be less exact than float32."""
    high, highest = ((precision,) * 2 for precision in (lax.Precision.HIGH, lax.Precision.HIGHEST))
    enough = {"float32": (high, highest), "float8_e4m3fn": (highest,)}
    return {product for product in products if product.dtype in enough and product.precision not in enough[product.dtype]}


def test_every_product_says_its_precision(products: list[Product]) -> None:
    key, labels = jax.random.key(0), np.array([0, 2])
    model = helpers.tiny_model(depth=1, input_size=8)
    chain = {"calib_steps": 2, "calib_rows": 4, "steps": 3}
    learned = ptq.Reconstruction(iterations=2, batch_size=8)
    settings = {
        "default": ptq.QuantConfig.of(weight_bits=4, **chain),
        "learned": ptq.QuantConfig.of(weight_bits=4, balance="csb+ssc", reconstruction=learned, **chain),
        "paper": ptq.QuantConfig.paper(8, **chain),
    }
    models = {name: ptq.quantize(model, config, key=key, keep_poor=True) for name, config in settings.items()}
    vae = VAEDecoder.init(
        VAEConfig(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=3, layers_per_block=1), key=key
    )
    ptq.sample(models["default"], labels, key=key, steps=2, decoder=vae)
    e4m3 = models["default"].replace(backend="fp8")
    jax.eval_shape(lambda q: q.prepared().apply(jnp.zeros((2, *q.config.image_shape)), jnp.array([10]), labels), e4m3)
    ptq.compare(model, models, labels=labels, key=key, sampling=Sampling(steps=2))
    assert len(products) > 100
    assert {product.dtype for product in products} >= {"float32", "int8", "float64", "float8_e4m3fn"}
    modules = {product.where.split(":")[0] for product in products}
    assert modules >= {
        "networks/float_network.py",
        "networks/parts.py",
        "engine/layers.py",
        "engine/xla/linear.py",
        "gptq.py",
        "ranges.py",
        "balance_search.py",
        "vae.py",
    }
    assert not unchosen(products)


def test_a_product_that_does_not_say_is_noticed(products: list[Product]) -> None:
    a = jnp.ones((2, 2), jnp.float32)
    jnp.dot(a, a)
    jnp.dot(a, a, precision=lax.Precision.DEFAULT)
    jnp.dot(a, a, precision=lax.Precision.HIGHEST)
    narrow = a.astype(jnp.float8_e4m3fn)
    for precision in (None, lax.Precision.HIGH, lax.Precision.HIGHEST):
        jnp.dot(narrow, narrow, precision=precision, preferred_element_type=jnp.float32)
    assert len(unchosen(products)) == 4
