"""The speed benchmark's peers stay close to bfloat16 in the types that they claim; skipped where they are not installed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

import ptq4dit_jax as ptq
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig


@pytest.mark.slow
def test_qwix_multiplies_integers_and_samples_by_our_chain(tiny_model: FloatDiT) -> None:
    pytest.importorskip("qwix")
    from benchmarks.peers import qwix_dit

    model = qwix_dit.quantize(tiny_model)
    assert qwix_dit.integer_products(model) == len(qwix_dit.LAYERS)
    kernel = model.params["blocks"]["fc1"]["kernel"].array
    L, D = tiny_model.config.depth, tiny_model.config.hidden_size
    assert (kernel.qvalue.dtype, kernel.qvalue.shape, kernel.scale.shape) == (jnp.int8, (L, D, 4 * D), (L, 1, 4 * D))
    image = jax.random.normal(jax.random.key(0), (2, *tiny_model.config.image_shape))
    inputs = image, jnp.array([500]), jnp.array([1, 10])
    assert 0 < relative_error(model.apply(*inputs), tiny_model.astype(jnp.bfloat16).apply(*inputs)) < 0.03
    assert ptq.sample(model, np.array([1, 2]), key=jax.random.key(0), steps=2).shape == (2, *tiny_model.config.image_shape)


@pytest.fixture
def torch_model(tiny_config: DiTConfig) -> Any:
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchao")
    from benchmarks.peers import torch_dit

    with torch.no_grad():
        yield torch_dit.build(tiny_config, "cpu")


def test_torchao_converts_the_layers_and_stays_close_to_bfloat16(torch_model: Any) -> None:
    from benchmarks.peers import torch_dit, torchao_dit

    D, L = torch_model.config.hidden_size, torch_model.config.depth
    before = sum(map(torch_dit.nbytes, torch_model.parameters()))
    facts = torchao_dit.int8(torch_model)
    assert facts["quantized_layers"] == 4 * L
    assert 0 < facts["relative_error"] < 0.03
    weights, scales = L * (3 + 1 + 4 + 4) * D * D, L * (3 + 1 + 4 + 1) * D
    assert sum(map(torch_dit.nbytes, torch_model.parameters())) <= before - weights + 8 * scales


def test_torchao_refuses_to_pass_off_another_model_as_quantized(torch_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.peers import torchao_dit

    monkeypatch.setattr(torchao_dit, "quantize_", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="quantized 0 linear layers where 12"):
        torchao_dit.int8(torch_model)
    monkeypatch.undo()
    monkeypatch.setattr(torchao_dit, "TOLERANCE", 1e-6)
    with pytest.raises(RuntimeError, match="differs from bfloat16's"):
        torchao_dit.int8(torch_model)


def test_torchao_takes_fp8_for_whole_tensors_where_rows_do_not_run(torch_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization import PerRow, quant_api

    from benchmarks.peers import torch_dit, torchao_dit

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    again = torch_dit.build(torch_model.config, "cpu")
    by_rows = torchao_dit.fp8(torch_model)
    assert (by_rows["granularity"], by_rows["quantized_layers"]) == ("row", 5 * torch_model.config.depth)

    convert = torchao_dit.quantize_

    def only_tensors(module: Any, config: Any, **kwargs: Any) -> None:
        if isinstance(config.granularity[0], PerRow):
            raise RuntimeError("no such product\nand advice")
        convert(module, config, **kwargs)

    monkeypatch.setattr(torchao_dit, "quantize_", only_tensors)
    facts = torchao_dit.fp8(again)
    assert (facts["granularity"], facts["row_failed"]) == ("tensor", "no such product")
    assert np.isfinite(facts["relative_error"])
