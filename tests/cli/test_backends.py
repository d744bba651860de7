"""What the commands say and write of a model that is run by another backend than they would choose."""

from pathlib import Path

import helpers
import pytest
from cli_helpers import ROOT, figures, run

import ptq4dit_jax as ptq

W8A8 = ROOT / "tests/golden/quantized/w8a8"
E4M3 = "e4m3 x e4m3 -> float32"


def test_info_shows_what_a_backend_would_run(here, capsys):
    run("info", W8A8, "--backend", "fp8", "--json", "fp8.json")
    assert f"in float32, {E4M3} by fp8" in capsys.readouterr().out
    run("info", W8A8, "--json", "auto.json")
    assert "e4m3" not in capsys.readouterr().out
    runs = lambda name: {row["layer"]: (row["runs"], row["integer"]) for row in figures(name)["layers"]}
    assert runs("fp8.json")["blocks.qkv"] == (E4M3, False)
    assert runs("auto.json")["blocks.qkv"] == ("int8 x int8 -> int32", True)


def test_samples_come_with_what_made_them(here, capsys):
    run("sample", W8A8, "--out", "a.npz", "--labels", "0-1", "--steps", "2", "--backend", "fp8", "--json", "a.json")
    assert figures("a.json")["runs"].startswith(f"in float32, {E4M3} by fp8")
    assert f"{E4M3} by fp8" in capsys.readouterr().out


@pytest.mark.slow
def test_a_report_is_of_what_was_multiplied(here):
    ptq.save(helpers.tiny_model(), "float")
    measure = ["evaluate", W8A8, "--against", "float", "--labels", "0-1", "--repeat", "1", "--steps", "2"]
    run(*measure, "--out", "e4m3", "--backend", "fp8")
    run(*measure, "--out", "integers", "--dtype", "float32")
    e4m3, integers = (figures(f"{name}/report.json") for name in ("e4m3", "integers"))
    assert e4m3["settings"]["runs"].startswith(f"in float32, {E4M3} by fp8")
    assert integers["settings"]["runs"] == "in float32, integer products by xla"
    assert {row["runs"] for row in e4m3["layers"] if row["backend"] == "fp8"} == {E4M3, "float32"}
    for figure in ("sqnr_mean_db", "layer_sqnr_db"):
        assert e4m3["models"]["w8a8"][figure] != integers["models"]["w8a8"][figure]
    page = Path("e4m3/report.md").read_text()
    assert E4M3 in page
    assert "int8" not in page
