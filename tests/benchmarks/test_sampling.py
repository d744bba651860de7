"""The speed benchmark's tables, its joining of partial results, and what it does with an engine that fails."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from benchmarks import sampling, sampling_tables


def entry(guided: int, step_ms: float, **facts: Any) -> dict[str, Any]:
    chain = 20 * step_ms / 1e3
    return {"guided": guided, "first_s": chain + 5, "seconds": [2 * chain, chain], "weights_bytes": 1_350_000_000, **facts}


@pytest.fixture
def document() -> dict[str, Any]:
    """Of a run before peak memory was measured, but for one engine."""
    return {
        "date": "2026-11-23",
        "commit": "abc1234",
        "jax": "0.11.2",
        "hardware": "one GPU",
        "model": "DiT-XL/2",
        "input_size": 32,
        "guided": [1, 8],
        "steps": 20,
        "repeats": 2,
        "engines": {
            "bf16": [entry(1, 4.0), entry(8, 10.0)],
            "torch": [entry(1, 5.0), entry(8, 12.0)],
            "w8a8": [entry(1, 2.0, sampling_bytes=1_480_000_000, software={"Qwix": "0.1.8"}), entry(8, 5.0)],
        },
    }


def test_the_compact_table_has_a_row_an_engine_in_a_fixed_order(document: dict[str, Any]) -> None:
    lines = sampling_tables.compact(document).splitlines()
    assert lines[0].endswith("best of 2; one GPU, 2026-11-23, commit abc1234, JAX 0.11.2, Qwix 0.1.8.")
    assert lines[2].endswith("| weights, GB | 1 image | 8 images |")
    assert lines[4:] == [
        "| **W8A8** | 1.35 | 2.00 (10.0) | 5.00 (32.0) |",
        "| bfloat16, JAX with cuDNN attention | 1.35 | 4.00 (5.0) | 10.00 (16.0) |",
    ]


def test_the_full_table_leaves_cells_empty_that_were_not_measured(document: dict[str, Any]) -> None:
    document["guided"].append(64)
    rows = sampling_tables.full(document).splitlines()[4:]
    assert len(rows) == 9
    assert rows[0] == "| 1 | **W8A8** | 2.00 | 10.00 | 1.35 | 1.48 | 5 |"
    assert rows[3] == "| 8 | **W8A8** | 5.00 | 32.00 | 1.35 |  | 5 |"
    assert rows[6] == "| 64 | **W8A8** |  |  | 1.35 |  |  |"


def widths(axes: Axes) -> list[float]:
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    assert len(bars) == len(axes.patches)
    return [bar.get_width() for bar in bars]


def test_the_picture_shows_images_a_second_of_what_was_measured(document: dict[str, Any]) -> None:
    document["engines"]["bf16"].pop()
    one, eight = sampling_tables.figure(document).axes
    assert [label.get_text() for label in one.get_yticklabels()] == ["W8A8", "bfloat16, JAX"]
    assert widths(one) == pytest.approx([10, 5])
    assert widths(eight) == pytest.approx([32])


def test_partial_results_are_joined_by_engine_and_number_of_images(document: dict[str, Any]) -> None:
    part = {
        **document,
        "guided": [8, 64],
        "engines": {"qwix": [entry(64, 50.0)], "bf16": [entry(8, 9.0), entry(64, 60.0)]},
        "failed": {"w8a8": "too late", "torchao-fp8": "no such product"},
    }
    whole = sampling_tables.joined([document, part])
    assert whole["guided"] == [1, 8, 64]
    assert whole["engines"].keys() == {"bf16", "torch", "w8a8", "qwix"}
    assert [(e["guided"], min(e["seconds"])) for e in whole["engines"]["bf16"]] == [(1, 0.08), (8, 0.18), (64, 1.2)]
    assert whole["failed"] == {"w8a8": "too late", "torchao-fp8": "no such product"}  # no document has W8A8 for 64 images
    assert sampling_tables.joined([whole, {**part, "engines": {"w8a8": [entry(64, 30.0)]}}])["failed"].keys() == {"torchao-fp8"}
    assert "fp8" not in sampling_tables.full(whole)


@pytest.mark.parametrize("other", [{"commit": "fff0000"}, {"hardware": "another"}, {"steps": 50, "input_size": 64}])
def test_results_of_different_runs_are_not_joined(document: dict[str, Any], other: dict[str, Any]) -> None:
    with pytest.raises(SystemExit) as caught:
        sampling_tables.joined([document, {**document, **other}])
    names = ", ".join(key for key in ("commit", "hardware", "input_size", "steps") if key in other)
    assert str(caught.value) == f"Error: {names} differ; join results of one commit, hardware and setting only."


@pytest.fixture
def engine_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts a shell script in the place of an engine's process."""

    def replace(script: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sampling.sys, "executable", str(program))

    return replace


def test_measurements_are_read_as_they_come(engine_process: Any) -> None:
    engine_process("""echo '{"guided": 1}'; echo a warning; echo '{"guided": 8}'""")
    assert list(sampling.entries("bf16", [], 30)) == [{"guided": 1}, {"guided": 8}]


def test_what_an_engine_measured_before_it_failed_stays(engine_process: Any, tmp_path: Path) -> None:
    engine_process("""echo '{"guided": 1, "seconds": [1.0], "first_s": 2.0}'; exit 3""")
    arguments = argparse.Namespace(
        engines=["bf16"],
        guided=[1, 8],
        model="DiT-S/2",
        input_size=32,
        steps=2,
        repeats=1,
        limit=30,
        hardware="none",
        commit="0",
    )
    sampling.run(arguments, tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text())
    assert [entry["guided"] for entry in document["engines"]["bf16"]] == [1]
    assert document["failed"] == {"bf16": "exit status 3"}


@pytest.mark.parametrize(
    ("script", "limit", "reason"),
    [
        ("""echo '{"failed": "ValueError: no"}'; echo advice >&2; exit 1""", 30, "ValueError: no"),
        ("echo Traceback >&2; echo killed by the system >&2; exit 137", 30, "killed by the system"),
        ("exit 3", 30, "exit status 3"),
        ("sleep 20", 0.2, "took longer than 0.2 s"),
    ],
)
def test_a_failing_engine_is_reported_with_its_error(engine_process: Any, script: str, limit: float, reason: str) -> None:
    engine_process(f"""echo '{{"guided": 1}}'; {script}""")
    assert list(sampling.entries("bf16", [], limit)) == [{"guided": 1}, {"failed": reason}]
