"""The report folder: complete, consistent with the figures, and written whole or not at all."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ptq4dit_jax.engine import ActRanges, LayerReport
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import Interval, plots, write_report

ROWS = [
    {"layer": "blocks.qkv", "weight bits": 4, "runs": "int8 x int8 -> int32"},
    {"layer": "patch_embed", "weight bits": 8, "runs": "float", "why": "policy | edges"},
]
ARGUMENTS: dict[str, Any] = {
    "title": "digits, W4A8",
    "describe_rows": ROWS,
    "settings": {"quantization": {"weight_bits": 4, "balance": "csb"}},
}


def _table(page: str, heading: str) -> list[list[str]]:
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if "---" not in line]


def test_everything_is_there(tmp_path, comparison):
    folder = write_report(tmp_path / "new" / "report", comparison, **ARGUMENTS)
    assert sorted(path.name for path in folder.iterdir()) == [
        "psnr.png",
        "report.json",
        "report.md",
        "samples.png",
        "sqnr_layers.png",
        "sqnr_steps.png",
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report"]
    page = (folder / "report.md").read_text()
    pictures = re.findall(r"!\[.+\]\((.+)\)", page)
    assert len(pictures) == 4
    for picture in pictures:
        with Image.open(folder / picture) as image:
            image.verify()


def test_layers_may_be_what_describe_gives(tmp_path, comparison):
    report = LayerReport(
        layer="blocks.fc1",
        lead=(2,),
        size=(32, 128),
        heads=None,
        weight_bits=4,
        act_bits=8,
        ranges=ActRanges(dynamic=False, groups=3, balanced=True),
        dtype="float32",
        backend="xla",
        why="",
    )
    folder = write_report(tmp_path / "report", comparison, **ARGUMENTS | {"describe_rows": [report]})
    [heading, row] = _table((folder / "report.md").read_text(), "What each layer runs")
    shown = dict(zip(heading, row, strict=True))
    assert (shown["shape"], shown["ranges"]) == ("2 x 32 -> 128", "per tensor, 3 groups of steps, balanced")
    assert json.loads((folder / "report.json").read_text())["layers"] == [report.words()]


def test_tables_hold_the_figures(tmp_path, comparison):
    page = (write_report(tmp_path / "report", comparison, **ARGUMENTS) / "report.md").read_text()
    assert page.startswith("# digits, W4A8\n")
    quality = _table(page, "Quality")
    assert [row[0] for row in quality[1:]] == ["bfloat16 (noise floor)", "W8A8", "W4A8"]
    assert quality[0][1:3] == ["SQNR, mean over steps (dB)", "SQNR, pooled over steps (dB)"]
    assert quality[3][1:] == ["22.0", "21.5", "21.5 [20.0, 23.0]", "20.0", "0.9000 [0.9000, 0.9000]", "0.02"]
    sizes = _table(page, "Sizes")
    assert sizes[1] == ["float32", "120,000", "0.11", "1.00 x"]
    assert sizes[4] == ["W4A8", "20,000", "0.02", "6.00 x"]
    layers = _table(page, "What each layer runs")
    assert layers[0] == ["layer", "weight bits", "runs", "why"]
    assert layers[1] == ["blocks.qkv", "4", "int8 x int8 -> int32", ""]
    assert layers[2][3] == "policy \\| edges"
    assert ["quantization.weight_bits", "4"] in _table(page, "Settings")
    assert ["sampler", "ddpm"] in _table(page, "Settings")
    assert "jax" in [row[0] for row in _table(page, "Provenance")]


def test_json_holds_the_same(tmp_path, comparison):
    document = json.loads((write_report(tmp_path / "report", comparison, **ARGUMENTS) / "report.json").read_text())
    assert document["models"]["W4A8"]["step_sqnr_db"] == comparison.figures["W4A8"].step_sqnr_db.tolist()
    assert document["layers"] == ROWS
    assert document["settings"]["quantization"] == {"weight_bits": 4, "balance": "csb"}
    assert document["settings"]["steps"] == 5
    assert {"date", "devices", "python", "jax"} <= set(document["provenance"])


def test_reconstruction_is_drawn_and_tabulated(tmp_path, comparison):
    units = {name: {"before": 0.25, "after": 0.125, "curve": [1.0, 0.6, 0.5]} for name in ("embed image", "block 0", "block 1")}
    folder = write_report(tmp_path / "report", comparison, **ARGUMENTS, reconstruction=units)
    page = (folder / "report.md").read_text()
    assert _table(page, "Reconstruction")[2] == ["block 0", "0.25", "0.125", "0.500"]
    with Image.open(folder / "reconstruction.png") as image:
        image.verify()
    assert "(reconstruction.png)" in page
    assert json.loads((folder / "report.json").read_text())["reconstruction"] == units
    plain = (write_report(tmp_path / "plain", comparison, **ARGUMENTS) / "report.md").read_text()
    assert "Reconstruction" not in plain


def test_perfect_and_broken_models(tmp_path, comparison):
    figures = {
        name: dataclasses.replace(
            comparison.figures["W8A8"],
            sqnr_mean_db=value,
            sqnr_pooled_db=value,
            step_sqnr_db=np.full(5, value),
            psnr_db=np.full(4, value),
            psnr_interval=Interval(*[value] * 3),
        )
        for name, value in {"same": np.inf, "broken": np.nan}.items()
    }
    folder = write_report(
        tmp_path / "report", dataclasses.replace(comparison, figures={**comparison.figures, **figures}), **ARGUMENTS
    )
    rows = {row[0]: row for row in _table((folder / "report.md").read_text(), "Quality")}
    assert rows["same"][1:5] == ["identical"] * 4
    assert rows["broken"][1:5] == ["not finite"] * 4
    assert json.loads((folder / "report.json").read_text())["models"]["broken"]["psnr_db"] == [None] * 4


def test_one_identical_step_makes_no_identical_model(tmp_path, comparison):
    figures = dataclasses.replace(
        comparison.figures["W8A8"], sqnr_mean_db=np.inf, step_sqnr_db=np.array([30, 20, np.inf, 30, 20])
    )
    folder = write_report(tmp_path / "report", dataclasses.replace(comparison, figures={"W8A8": figures}), **ARGUMENTS)
    assert _table((folder / "report.md").read_text(), "Quality")[1][1:3] == ["infinite", "31.5"]


def test_latents_have_no_sample_picture(tmp_path, comparison):
    latents = {name: np.zeros((4, 8, 8, 4), np.float32) for name in comparison.images}
    folder = write_report(tmp_path / "report", dataclasses.replace(comparison, images=latents), **ARGUMENTS)
    assert not (folder / "samples.png").exists()
    page = (folder / "report.md").read_text()
    assert "samples.png" not in page
    assert "4 latents" in page


def test_overwriting(tmp_path, comparison):
    folder = tmp_path / "report"
    write_report(folder, comparison, **ARGUMENTS)
    (folder / "stale.png").touch()
    with pytest.raises(Ptq4ditError, match="exists; choose another folder"):
        write_report(folder, comparison, **ARGUMENTS)
    assert (folder / "stale.png").exists()
    write_report(folder, comparison, **{**ARGUMENTS, "title": "second"}, overwrite=True)
    assert (folder / "report.md").read_text().startswith("# second")
    assert not (folder / "stale.png").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_report_is_never_replaced(tmp_path, comparison, kind):
    target = tmp_path / "precious"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.tex").touch()
    else:
        target.touch()
    with pytest.raises(Ptq4ditError, match="is not a report, so it is not replaced"):
        write_report(target, comparison, **ARGUMENTS, overwrite=True)
    assert target.is_file() or (target / "thesis.tex").exists()


def test_an_empty_folder_is_filled(tmp_path, comparison):
    (tmp_path / "report").mkdir()
    write_report(tmp_path / "report", comparison, **ARGUMENTS, overwrite=True)
    assert (tmp_path / "report" / "report.md").exists()


def test_unwritable_parent(tmp_path, comparison):
    (tmp_path / "file").touch()
    with pytest.raises(Ptq4ditError, match=r"Cannot write .*report \(.*exists\); check its permissions"):
        write_report(tmp_path / "file" / "report", comparison, **ARGUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing(tmp_path, comparison, monkeypatch, error):
    def fail(_):
        assert list(tmp_path.rglob("sqnr_steps.png"))  # some of it was on disk
        raise error

    monkeypatch.setattr(plots, "layer_sqnr_figure", fail)
    with pytest.raises(Ptq4ditError if isinstance(error, OSError) else KeyboardInterrupt):
        write_report(tmp_path / "new" / "report", comparison, **ARGUMENTS)
    assert not list(tmp_path.iterdir())


CANNOT_BE: tuple[dict[str, Any], ...] = (
    {"before": 0},
    {"before": "1"},
    {"after": float("nan")},
    {"curve": []},
    {"curve": ["a"]},
    {"curve": 1},
)


@pytest.mark.parametrize(
    "facts",
    [
        5,
        "x",
        [1],
        {"block 0": 3},
        *({"block 0": {"before": 1.0, "after": 0.5, "curve": [1.0], **change}} for change in CANNOT_BE),
    ],
)
def test_what_a_models_file_says_of_its_reconstruction_cannot_lose_a_comparison(facts, tmp_path, comparison):
    folder = write_report(tmp_path / "report", comparison, **ARGUMENTS, reconstruction=facts)
    assert json.loads((folder / "report.json").read_text())["reconstruction"] == {}
    assert not (folder / "reconstruction.png").exists()


ROUNDED = {
    "embed image": {"before": 0.5, "after": 0.25, "layers": {"patch_embed": 0.5}},
    **{f"block {i}": {"before": 0.2, "after": 0.05, "layers": {"qkv": 0.5, "fc2": 0.125 * (i + 1)}} for i in range(2)},
}
BALANCED = {
    "blocks.qkv_in": {"chosen": ["rms 0.5", "none"], "to_none": [0.81, 1.0], "to_paper": [0.9, 0.7]},
    "blocks.fc2_in": {"chosen": ["csb", "csb"], "to_none": [0.5, 0.6], "to_paper": [1.0, 0.99]},
}


def test_rounding_and_balancing_are_tabulated_by_layer(tmp_path, comparison):
    folder = write_report(tmp_path / "report", comparison, **ARGUMENTS, rounding=ROUNDED, balancing=BALANCED)
    page = (folder / "report.md").read_text()
    assert _table(page, "Rounding in closed form")[3] == ["block 1", "0.2", "0.05", "0.250", "qkv 0.500, fc2 0.250"]
    assert _table(page, "Balancing chosen by measurement")[:2] == [
        ["block", "qkv_in", "fc2_in"],
        ["0", "rms 0.5 (0.81, 0.90)", "csb (0.50, 1.00)"],
    ]
    with Image.open(folder / "rounding.png") as image:
        image.verify()
    assert "(rounding.png)" in page
    document = json.loads((folder / "report.json").read_text())
    assert (document["rounding"], document["balancing"]) == (ROUNDED, BALANCED)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("rounding", 5),
        ("rounding", {"block 0": {"before": 1.0, "after": 0.5}}),
        ("rounding", {"block 0": {"before": 1.0, "after": 0.5, "layers": {}}}),
        ("rounding", {"block 0": {"before": 1.0, "after": 0.5, "layers": {"qkv": "x"}}}),
        ("balancing", [1]),
        ("balancing", {"blocks.qkv_in": {"chosen": 3}}),
        ("balancing", {"blocks.qkv_in": {**BALANCED["blocks.qkv_in"], "to_none": [1.0]}}),
        ("balancing", {"blocks.qkv_in": {**BALANCED["blocks.qkv_in"], "to_paper": [1.0, float("nan")]}}),
        ("balancing", {**BALANCED, "blocks.fc1_in": {"chosen": ["csb"], "to_none": [1.0], "to_paper": [1.0]}}),
    ],
)
def test_what_a_models_file_says_of_its_rounding_and_balancing_cannot_lose_it_either(name, facts, tmp_path, comparison):
    folder = write_report(tmp_path / "report", comparison, **ARGUMENTS, **{name: facts})
    assert json.loads((folder / "report.json").read_text())[name] == {}
    assert not (folder / "rounding.png").exists()
