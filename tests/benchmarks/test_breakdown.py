"""The breakdown's floors by hand, kernels told by their names, and the table."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import breakdown
from benchmarks.breakdown import Ceilings
from ptq4dit_jax.networks.dit import DiTConfig

XL = DiTConfig.preset("DiT-XL/2", input_size=32)


def test_bytes_and_operations_are_those_of_the_shapes() -> None:
    """Two rows of 256 tokens, 28 blocks, 1152 wide."""
    work = breakdown.work(XL, 2)
    assert work["fc1 with GELU and codes"].operations == 28 * 2 * 512 * 1152 * 4608
    assert work["fc1 with GELU and codes"].bytes_moved == 28 * (512 * 1152 + 1152 * 4608 + 512 * 4608)
    assert work["qkv"].bytes_moved == 28 * (512 * 1152 + 3 * 1152 * 1152 + 2 * 512 * 3 * 1152)
    assert work["attention with codes"].operations == 28 * 2 * 16 * 4 * 256 * 256 * 72
    assert work["norms with modulation and codes"].bytes_moved == 28 * 2 * 512 * 1152 * 3


def test_the_floor_is_the_larger_of_both() -> None:
    ceilings = Ceilings(bandwidth=4e12, int8=1.4e15, bfloat16=7e14)
    many = breakdown.work(XL, 128)
    assert ceilings.floor(many["fc2 with gate and residual"]) == pytest.approx(28 * 2 * 32768 * 4608 * 1152 / 1.4e15)
    assert ceilings.floor(many["norms with modulation and codes"]) == pytest.approx(28 * 2 * 32768 * 1152 * 3 / 4e12)
    attention = many["attention with codes"]
    assert ceilings.floor(attention) == pytest.approx(28 * 7 * 32768 * 1152 / 4e12)  # three bfloat16 in, a code out
    assert ceilings._replace(bandwidth=1e13).floor(attention) == pytest.approx(28 * 4 * 32768 * 256 * 1152 / 7e14)


def test_kernels_are_told_by_their_names() -> None:
    names = [
        "int8_matmul_residual_1152x4608_mosaic_gpu_kernel",
        "int8_matmul_residual_1152x1152_mosaic_gpu_kernel",
        "int8_matmul_gelu_4608x1152_mosaic_gpu_kernel",
        "int8_matmul_store_3456x1152_mosaic_gpu_kernel",
        "modulate_quantize_mosaic_gpu_kernel",
        "attention_mosaic_gpu_kernel",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop",
        "loop_add_fusion",
        "modulate_quantize_mosaic_gpu_kernel",
    ]
    found = breakdown.sorted_out([(name, 1e-6) for name in names], breakdown.work(XL, 2))
    assert {kind: count for kind, (count, _) in found.items()} == {
        "norms with modulation and codes": 2,
        "qkv": 1,
        "attention with codes": 2,
        "proj with gate and residual": 1,
        "fc1 with GELU and codes": 1,
        "fc2 with gate and residual": 1,
        breakdown.REST: 1,
    }
    assert found["norms with modulation and codes"][1] == pytest.approx(2e-6)


def test_the_table_has_a_row_an_operation_and_a_column_a_size() -> None:
    def entry(guided: int) -> dict[str, Any]:
        kernels = {
            "qkv": {"count": 28.0, "seconds": 3e-6 * guided, "floor": 2e-6 * guided},
            breakdown.REST: {"count": 30.5, "seconds": 1e-6, "floor": 0.0},
        }
        return {"guided": guided, "step_seconds": 5e-6, "kernels": kernels}

    document = {
        "date": "2026-11-28",
        "commit": "abc1234",
        "jax": "0.11.2",
        "hardware": "one GPU",
        "model": "DiT-XL/2",
        "input_size": 32,
        "steps": 10,
        "ceilings": {"bandwidth": 4.3e12, "int8": 1.4e15, "bfloat16": 7.9e14},
        "entries": [entry(1), entry(8)],
    }
    lines = breakdown.markdown(document).splitlines()
    assert "4.30 TB/s, 1400 TOPS" in lines[0]
    assert lines[2:] == [
        "| | 1 guided | 8 guided |",
        "|---|---|---|",
        "| qkv | 3 in 28, floor 2 | 24 in 28, floor 16 |",
        "| everything else | 1 in 30.5 | 1 in 30.5 |",
        "| all kernels | 4 | 25 |",
        "| a step, not profiled | 5 | 5 |",
    ]


def test_ceilings_and_profiles_work_on_any_device() -> None:
    """Here only that they run: a CPU has no GPU's kernels."""
    assert breakdown.profiled(lambda: breakdown._seconds(lambda x: x + 1, breakdown.jnp.ones(8), repeats=1)) == []
