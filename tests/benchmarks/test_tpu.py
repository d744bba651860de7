"""The benchmark for TPUs: figures of a step, the table, runs that continue, what bad options say, and times on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import aot, tpu
from ptq4dit_jax.networks.dit import DiTConfig

#: Three steps of a chain: one product of 4 x 8 by 8 x 8 codes, all in HBM, and a copy before.
PROGRAM = """\
HloModule jit_sample_batch, is_scheduled=true

%body (state: (s32[], s8[4,8], s8[8,8])) -> (s32[], s8[4,8], s8[8,8]) {
  %state = (s32[], s8[4,8]{1,0}, s8[8,8]{1,0}) parameter(0)
  %x = s8[4,8]{1,0} get-tuple-element(%state), index=1
  %w = s8[8,8]{1,0} get-tuple-element(%state), index=2
  %y = s32[4,8]{1,0} dot(%x, %w), rhs_contracting_dims={1}, backend_config={"window_config":{"estimated_cycles":"50"}}
  %kernel = s8[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"cost_estimate":{"flops":"197000000000","transcendentals":"9","bytes_accessed":"64"}}}
  %other = s8[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"cost_estimate":{"flops":"1","transcendentals":"9","bytes_accessed":"819000000"}}}
  ROOT %next = (s32[], s8[4,8]{1,0}, s8[8,8]{1,0}) tuple(%state)
}

%condition (state: (s32[], s8[4,8], s8[8,8])) -> pred[] {
  %all = (s32[], s8[4,8]{1,0}, s8[8,8]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (state: (s32[], s8[4,8], s8[8,8])) -> (s32[], s8[4,8], s8[8,8]) {
  %given = (s32[], s8[4,8]{1,0}, s8[8,8]{1,0}) parameter(0)
  %noise = f32[1000]{0} custom-call(), custom_call_target="noise"
  ROOT %loop = (s32[], s8[4,8]{1,0}, s8[8,8]{1,0}) while(%given), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


def row(generation: str, model: str, **facts: Any) -> dict[str, Any]:
    memory = {"compile_s": 40.4, "argument_bytes": 1, "temporary_bytes": 1, "peak_bytes": 1_530_000_000}
    found = {
        "hbm_bytes_step": 85.28e9,
        "cycles_step": 613.8e6,
        "kernels_step_s": 6.04e-3,
        "collectives": {},
        "products": {"s32 = s8 x s8": 7},
    }
    place = {"generation": generation, "chips": 16, "devices": 16, "model": model, "images": 64, "status": tpu.NEVER_RUN}
    return {**place, **memory, **found, **facts}


@pytest.fixture
def document() -> dict[str, Any]:
    header = {"date": "2026-11-30", "commit": "abc1234", "jax": "0.10.2", "hardware": tpu.NEVER_RUN, "libtpu": "0.0.42.1"}
    return {**header, "model": "DiT-XL/2", "input_size": 32, "depth": None, "steps": 50, "rows": {}}


def test_e4m3_is_compiled_where_it_is_asked_for() -> None:
    network = DiTConfig.preset("DiT-S/8", depth=1)
    assert {name: getattr(tpu.abstract(name, network), "backend", None) for name in tpu.MODELS} == {
        "bf16": None,
        "w8a8": "auto",
        "w4a8": "auto",
        "w8a8-e4m3": "fp8",
        "w4a8-e4m3": "fp8",
    }


def test_figures_are_of_one_step_and_leave_out_what_comes_before() -> None:
    assert tpu.figures(PROGRAM, 3, "v5e") == {
        "hbm_bytes_step": 4 * 8 + 8 * 8 + 4 * 4 * 8 + 2 * (4 * 8 + 4 * 8),
        "cycles_step": 50,
        "kernels_step_s": pytest.approx(2e-3),  # one is bound by the matrix units, the other by memory, 1 ms each
        "collectives": {},
        "products": {"s32 = s8 x s8": 1},
    }


def test_there_is_no_estimate_where_the_compiler_gives_none() -> None:
    text = PROGRAM.replace(', backend_config={"window_config":{"estimated_cycles":"50"}}', "")
    assert tpu.figures(text, 3, "v5e")["cycles_step"] is None
    assert tpu.figures(text, 3, "tpu7x")["kernels_step_s"] is None


def test_a_program_whose_loop_is_not_the_chain_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^The longest loop runs 3 times where the chain has 50 steps\.$"):
        tpu.figures(PROGRAM, 50, "v5e")


def test_every_row_says_that_it_never_ran(document: dict[str, Any]) -> None:
    document["rows"] = {
        "c": row("tpu7x", "w4a8", collectives={"all-reduce": 2}, kernels_step_s=None),
        "b": row("v5e", "w8a8"),
        "d": row("v6e", "bf16", failed="RESOURCE_EXHAUSTED: too large"),
        "a": row("v5e", "bf16", products={"s32 = s8 x s8": 7, "f32 = f32 x f32 (highest)": 3}),
    }
    lines = tpu.table(document).splitlines()
    assert lines[0] == (
        "DiT-XL/2, 256 px, 50 steps; compiled, never run, 2026-11-30, commit abc1234, JAX 0.10.2, libtpu 0.0.42.1."
    )
    end = "40 | compiled, never run |"
    assert lines[4:] == [
        "| 16 v5e | 64 | bfloat16 | 85.28 | 613.8 (409.2) | 6.0 | 1.53 | none | "
        "7 `s32 = s8 x s8`, 3 `f32 = f32 x f32 (highest)` | " + end,
        "| 16 v5e | 64 | W8A8 | 85.28 | 613.8 (409.2) | 6.0 | 1.53 | none | 7 `s32 = s8 x s8` | " + end,
        "| 16 v6e | 64 | bfloat16 |  |  |  | does not fit |  |  |  | compiled, never run |",
        "| 16 tpu7x | 64 | W4A8 | 85.28 | 613.8 |  | 1.53 | 2 all-reduce | 7 `s32 = s8 x s8` | " + end,
    ]
    assert {line.count("|") for line in lines[2:]} == {12}


def test_the_page_has_the_table_of_the_stored_results() -> None:
    stored = json.loads(tpu.RESULTS.read_text())
    assert tpu.table(stored) in tpu.PAGE.read_text()
    assert {found["status"] for found in stored["rows"].values()} == {tpu.NEVER_RUN}
    for name, found in stored["rows"].items():
        assert name == "|".join(str(found[key]) for key in ("generation", "chips", "images", "model"))


def options(out: Path, **changed: Any) -> argparse.Namespace:
    given = {"model": "DiT-S/8", "input_size": 8, "depth": 1, "steps": 3, "images": [1], "models": ["bf16", "w8a8"]}
    cells = {"generations": ["v5e"], "chips": [1], "run": False, "repeats": 1, "hardware": None, "commit": "abc1234"}
    return argparse.Namespace(**{**given, **cells, "out": out, **changed})


def test_a_run_continues_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[str, str]] = []

    def compiled(generation: str, chips: int, name: str, *_: Any) -> dict[str, Any]:
        if len(made) == 2 and name == "w8a8":
            raise KeyboardInterrupt
        made.append((generation, name))
        return row(generation, name, chips=chips)

    monkeypatch.setattr(tpu, "compiled", compiled)
    monkeypatch.setattr(aot, "missing", lambda: "")
    monkeypatch.setattr(aot, "libtpu_version", lambda: "0.0.42.1")
    out = tmp_path / "tpu.json"
    tpu.run(options(out))
    with pytest.raises(KeyboardInterrupt):
        tpu.run(options(out, generations=["v5e", "v6e"], models=["w8a8", "bf16"]))
    assert made == [("v5e", "bf16"), ("v5e", "w8a8")]
    made.append(("", ""))
    tpu.run(options(out, generations=["v5e", "v6e"], models=["w8a8", "bf16"]))
    assert made[3:] == [("v6e", "w8a8"), ("v6e", "bf16")]
    stored = json.loads(out.read_text())
    assert set(stored["rows"]) == {"v5e|1|1|bf16", "v5e|1|1|w8a8", "v6e|1|1|bf16", "v6e|1|1|w8a8"}
    assert (stored["hardware"], stored["libtpu"], stored["depth"]) == (tpu.NEVER_RUN, "0.0.42.1", 1)
    assert "replaces" not in capsys.readouterr().out
    tpu.run(options(out, depth=2, models=["bf16"]))
    assert f"{out} holds results of another depth, which this run replaces." in capsys.readouterr().out
    assert set(json.loads(out.read_text())["rows"]) == {"v5e|1|1|bf16"}


def test_without_the_compiler_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SystemExit, match=r"^Error: libtpu, the compiler for TPUs, is not installed; install the extra tpu.*\.$"
    ):
        tpu.run(options(tmp_path / "tpu.json"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--images", "1", "0"], r"--images must be positive, not 0\."),
        (["--depth", "-2"], r"--depth must be positive, not -2\."),
        (["--steps", "1"], r"--steps must be at least 2, not 1: one step is no loop to read\."),
        (["--table-only"], r"there are no results in .*out\.json; leave out --table-only to make them\."),
        (["--run", "--model", "DiT-Q/2"], r"Unknown DiT preset 'DiT-Q/2'; the presets are .*\."),
        (["--run", "--steps", "2000", "--model", "DiT-S/8", "--depth", "1"], r".*2000.*\."),
    ],
)
def test_bad_options_get_a_sentence(given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tpu", *given, "--out", str(tmp_path / "out.json"), "--commit", "abc1234"])
    with pytest.raises(SystemExit, match=f"^Error: {said}$"):
        tpu.main()


def test_times_of_other_devices_do_not_pass_for_a_tpus() -> None:
    with pytest.raises(SystemExit, match=r"^Error: these devices are no TPUs but [cg]pus; name a file .* with --out\.$"):
        tpu.run(options(tpu.RUNS, run=True))
    assert not tpu.RUNS.exists()


@pytest.mark.slow
def test_times_are_those_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.json"
    tpu.run(options(out, run=True, repeats=3, models=["bf16", "w8a8"]))
    assert "These devices are no TPUs but " in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert set(document["rows"]) == {"bf16|1", "w8a8|1"}
    for found in document["rows"].values():
        assert found["devices"] == jax.device_count()
        assert found["status"] == f"run on {jax.devices()[0].device_kind}"
        assert len(found["seconds"]) == 3
        assert min(found["seconds"]) <= 3 * found["step_s"] <= max(found["seconds"]) < found["first_s"]
        assert found["image_s"] * jax.device_count() == pytest.approx(3 * found["step_s"])
    table = tpu.table_of_runs(document).splitlines()
    assert table[0].startswith(f"DiT-S/8, 1 blocks only, 64 px, 3 steps; {jax.devices()[0].device_kind}, ")
    assert table[4].startswith("| 1 | bfloat16 | ")
    assert table[5].endswith(f"| run on {jax.devices()[0].device_kind} |")
