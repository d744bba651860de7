"""The tables of e4m3 beside integers, and what a program's text says of its kernels."""

from __future__ import annotations

from typing import Any

from benchmarks import fp8

HEADER = {"date": "2026-11-23", "commit": "abc1234", "jax": "0.11.2", "hardware": "one GPU"}


def test_kernels_are_counted_by_name() -> None:
    program = """
      %a = (f32[4,4], s8[9]) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul$f8", backend_config={}
      %b = (f32[4,4], s8[9]) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul$f8", backend_config={}
      %c = bf16[4,4] fusion(%x, %w), kind=kCustom, calls=%g, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
      %d = bf16[4,4] fusion(%x), kind=kLoop, calls=%h
    """
    assert fp8.called(program) == {"__cublas$lt$matmul$f8": 2, "__triton_gemm": 1}


def test_a_row_says_what_runs_or_why_nothing_did() -> None:
    part: dict[str, Any] = {**HEADER, "model": "DiT-XL/2", "guided": 64, "steps": 20, "repeats": 3}
    ran = {"step_s": 0.0352, "runs": "in bfloat16, integer products by hopper", "kernels": {"mosaic_gpu": 7}}
    part["table"] = {"W8A8, integers": ran, "W8A8, e4m3": {"failed": "RuntimeError: too large"}}
    lines = fp8.table_of_times(part).splitlines()
    assert lines[0].endswith("64 guided images, 20 steps, best of 3; one GPU, 2026-11-23, commit abc1234, JAX 0.11.2.")
    assert lines[4:] == [
        "| W8A8, integers | 35.20 | in bfloat16, integer products by hopper | 7 `mosaic_gpu` |",
        "| W8A8, e4m3 | failed: RuntimeError: too large | | |",
    ]


def test_quality_is_beside_that_of_bfloat16() -> None:
    row = {"sqnr_mean_db": 40.25, "sqnr_pooled_db": 30.0, "psnr_db": {"mean": 35.0, "low": 34.0, "high": 36.0}, "ssim": 0.99}
    part: dict[str, Any] = {**HEADER, "samples": 8, "sampling": 50, "dtype": "float32"}
    part["table"] = {"bfloat16": row, "W8A8, e4m3": row}
    lines = fp8.table_of_quality(part).splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["bfloat16, for comparison", "W8A8, e4m3"]
    assert lines[5] == "| W8A8, e4m3 | 40.2 | 30.0 | 35.0 (34.0 to 36.0) | 0.9900 |"
