"""Figures hold the data they claim, and grids the pixels."""

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from PIL import Image

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import grids, plots
from ptq4dit_jax.sampling import to_uint8


def _drawn(figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return Image.open(buffer)


def test_step_figure(comparison):
    figure = plots.step_sqnr_figure(comparison)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["bfloat16 (noise floor)", "W8A8", "W4A8"]
    np.testing.assert_array_equal(lines["W4A8"].get_ydata(), comparison.figures["W4A8"].step_sqnr_db)
    np.testing.assert_array_equal(lines["W4A8"].get_xdata(), comparison.timesteps)
    assert lines["bfloat16 (noise floor)"].get_linestyle() == "--"
    assert lines["W8A8"].get_color() != lines["W4A8"].get_color()
    left, right = axes.get_xlim()
    assert left > right
    assert _drawn(figure).width == 400


def test_infinite_figures_leave_gaps(comparison):
    perfect = dataclasses.replace(
        comparison.figures["W8A8"], step_sqnr_db=np.full(5, np.inf), psnr_db=np.full(4, np.inf), psnr_interval=(np.inf,) * 3
    )
    comparison = dataclasses.replace(comparison, figures={"bfloat16": perfect, "W8A8": perfect})
    assert np.isnan(plots.step_sqnr_figure(comparison).axes[0].lines[1].get_ydata()).all()
    figure = plots.psnr_figure(comparison)
    assert figure.axes[0].get_yticklabels()[1].get_text() == "W8A8\n4 identical"
    for drawn in (figure, plots.step_sqnr_figure(comparison)):
        _drawn(drawn)


def test_layer_figure_has_a_panel_per_site(comparison):
    figure = plots.layer_sqnr_figure(comparison)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "q",
        "k",
        "attention projection",
        "fc1",
        "fc2",
        "block output",
    ]
    np.testing.assert_array_equal(
        figure.axes[3].lines[2].get_ydata(), comparison.figures["W4A8"].layer_sqnr_db["blocks.fc1_out"]
    )
    _drawn(figure)


def test_reconstruction_figure_has_a_curve_and_a_dot_per_unit():
    names = ["embed image", "embed condition", *(f"block {i}" for i in range(5)), "head"]
    units: dict[str, Any] = {
        name: {"before": 2.0, "after": 1.0 + i, "curve": [1.0, np.nan, 0.5 + i]} for i, name in enumerate(names)
    }
    figure = plots.reconstruction_figure(units)
    (axes,) = figure.axes
    curves = {line.get_label(): line for line in axes.lines if len(np.asarray(line.get_ydata())) == 3}
    assert list(curves) == names
    np.testing.assert_array_equal(curves["block 3"].get_ydata(), units["block 3"]["curve"])
    dots = [np.asarray(line.get_ydata())[0] for line in axes.lines if line.get_marker() == "o"]
    assert dots == [unit["after"] / 2 for unit in units.values()]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["embed image", "embed condition", "block 0", "block 4", "head"]
    assert _drawn(figure).width == 400


def test_psnr_figure_shows_every_image(comparison):
    (axes,) = plots.psnr_figure(comparison).axes
    dots = [collection for collection in axes.collections if isinstance(collection, PathCollection)]
    np.testing.assert_array_equal(np.asarray(dots[1].get_offsets())[:, 0], comparison.figures["W8A8"].psnr_db)


def test_salience_figure(comparison):
    activation, weight = np.array([1.0, 30.0, 2.0, 0.0]), np.array([0.1, 0.2, 0.3, 0.1])
    figure = plots.salience_figure((activation, weight), (activation / 2, weight * 2), title="blocks.0.fc1")
    assert figure.get_suptitle() == "blocks.0.fc1"
    texts = [axes.texts[0].get_text() for axes in figure.axes]
    assert texts[0] == "largest / median = 20.0"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    _drawn(figure)
    with pytest.raises(Ptq4ditError, match=r"\(K,\), not the shape \(2, 4\)"):
        plots.salience_figure((np.ones((2, 4)), weight), (activation, weight))


def test_salience_figure_of_dead_layers_is_drawn():
    _drawn(plots.salience_figure((np.zeros(3), np.zeros(3)), (np.zeros(3), np.zeros(3))))


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_pixels(channels):
    images = np.random.default_rng(0).uniform(-1.2, 1.2, (5, 8, 8, channels)).astype(np.float32)
    grid = np.asarray(grids.image_grid(images, columns=2, cell=20, gap=2))
    assert grid.shape == (3 * 24 + 2 * 2, 2 * 24 + 2, 3)
    third = grid[26:50, :24]
    np.testing.assert_array_equal(third[::3, ::3], np.broadcast_to(to_uint8(images[2]), (8, 8, 3)))
    np.testing.assert_array_equal(third[2::3, 2::3], third[::3, ::3])
    assert (grid[52:, 26:] == 255).all()  # the sixth place is empty
    assert (grid[24:26] == 255).all()


@pytest.mark.parametrize(("count", "across", "down"), [(1, 1, 1), (3, 2, 2), (10, 4, 3), (16, 4, 4)])
def test_image_grid_is_near_square(count, across, down):
    assert grids.image_grid(np.zeros((count, 64, 64, 1))).size == (across * 66 - 2, down * 66 - 2)


def test_large_images_are_not_enlarged():
    assert grids.image_grid(np.zeros((1, 100, 120, 3))).size == (120, 100)


def test_sample_grid_has_a_row_per_model(comparison):
    grid = np.asarray(grids.sample_grid(comparison.images, comparison.labels, columns=3))
    height, width = 28 + 4 * 68, 3 * 64 + 2 * 4
    assert grid.shape[0] == height
    for row, images in enumerate(comparison.images.values()):
        pixels = grid[28 + row * 68 : 28 + row * 68 + 64, -4 - width : -4]
        np.testing.assert_array_equal(pixels[::8, 68 : 68 + 64 : 8, 0], to_uint8(images[1])[..., 0])
        caption = grid[28 + row * 68 : 28 + row * 68 + 64, : -4 - width]
        assert (caption < 128).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grids.image_grid(np.zeros((2, 8, 8, 4))), "4 channels are latents.*npz"),
        (lambda: grids.image_grid(np.zeros((0, 8, 8, 1))), "N at least 1"),
        (lambda: grids.image_grid(np.zeros((8, 8, 1))), r"not \(8, 8, 1\)"),
        (lambda: grids.image_grid(np.zeros((2, 8, 8, 1)), columns=0), "at least one column, not 0"),
        (lambda: grids.sample_grid({}, [0]), "at least one model"),
        (lambda: grids.sample_grid({"a": np.zeros((1, 8, 8, 1)), "b": np.zeros((2, 8, 8, 1))}, [0, 1]), "same number"),
    ],
)
def test_errors(call, message):
    with pytest.raises(Ptq4ditError, match=message):
        call()
