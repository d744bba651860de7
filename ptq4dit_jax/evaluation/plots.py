"""Figures of the report.

They use only matplotlib's object-oriented interface: no ``pyplot``, so no global state and no display. Colors are Okabe and
Ito's, which color-blind readers can tell apart; every line also has its own marker. This module is imported when the first
figure is drawn, because loading matplotlib takes a fifth as long as loading the whole library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation.compare import NOISE_FLOOR, Comparison
from ptq4dit_jax.evaluation.grids import caption
from ptq4dit_jax.evaluation.metrics import SQNR_POOLED

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vP*"
_GRAY = "#777777"
_WIDTH = 8.0  # inches; 960 pixels at the report's 120 dpi
_STRIP_POINTS = 1000

_SITE_TITLES = {
    "q": "q",
    "k": "k",
    "proj_out": "attention projection",
    "fc1_out": "fc1",
    "fc2_out": "fc2",
    "block_out": "block output",
}


def step_sqnr_figure(comparison: Comparison) -> Figure:
    """Plots the SQNR of the guided prediction at each step, one line per model, sampling from left to right."""
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axes = _style(figure.add_subplot())
    for name, figures in comparison.figures.items():
        axes.plot(comparison.timesteps, _finite(figures.step_sqnr_db), label=caption(name), **_line(comparison, name))
    axes.set(xlabel="timestep (noise on the left, image on the right)", ylabel="SQNR of each step (dB)")
    axes.set_title(f"Predicted {comparison.settings.get('objective', 'noise')} against float32", loc="left")
    if comparison.timesteps[0] >= comparison.timesteps[-1]:  # in some flows, time already runs from noise to image
        axes.invert_xaxis()
    _legend(figure, axes)
    return figure


def layer_sqnr_figure(comparison: Comparison) -> Figure:
    """Plots the SQNR at each site along the depth, one panel per site, all on one scale."""
    sites = list(next(iter(comparison.figures.values())).layer_sqnr_db)
    figure = Figure(figsize=(_WIDTH, 4.8), layout="constrained")
    grid = figure.subplots(2, -(-len(sites) // 2), sharex=True, sharey=True, squeeze=False)
    for index, (axes, site) in enumerate(zip(grid.flat, sites, strict=False)):
        _style(axes)
        for name, figures in comparison.figures.items():
            values = figures.layer_sqnr_db[site]
            axes.plot(np.arange(len(values)), _finite(values), label=caption(name), **_line(comparison, name))
        axes.set_title(_SITE_TITLES.get(site.rpartition(".")[2], site), loc="left", fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if index >= grid.shape[1]:
            axes.set_xlabel("block")
    figure.supylabel(SQNR_POOLED, fontsize="medium")
    _legend(figure, grid[0, 0])
    return figure


def psnr_figure(comparison: Comparison) -> Figure:
    """Plots the PSNR of every image against the reference's on the same noise, with the mean and its interval."""
    names = list(comparison.figures)
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.6 * len(names)), layout="constrained")
    axes = _style(figure.add_subplot())
    jitter = np.random.default_rng(0).uniform(-0.28, 0.28, _STRIP_POINTS)
    labels = []
    for row, name in enumerate(names):
        figures = comparison.figures[name]
        values = figures.psnr_db[:_STRIP_POINTS]
        color = _line(comparison, name)["color"]
        axes.scatter(_finite(values), row + jitter[: len(values)], s=12, color=color, alpha=0.35, linewidths=0)
        mean, low, high = figures.psnr_interval
        if np.isfinite(mean):
            error = [[mean - low], [high - mean]]
            axes.errorbar(mean, row, xerr=error, fmt="o", color="black", markersize=5, capsize=5, linewidth=2, zorder=3)
        identical = int(np.isposinf(figures.psnr_db).sum())
        labels.append(caption(name) + (f"\n{identical} identical" if identical else ""))
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("PSNR (dB); black: mean and 95 % interval")
    axes.set_title(f"Images against float32 on the same noise ({len(comparison.labels)} samples)", loc="left")
    return figure


def _relative_error_axes(title: str) -> tuple[Figure, Axes]:
    """Returns axes for errors relative to rounding to the nearest, with a line at 1."""
    figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
    axes = _style(figure.add_subplot())
    axes.axhline(1, color="black", linewidth=0.8, zorder=2.5)
    axes.set_ylabel("squared error / that of nearest rounding")
    axes.set_title(title, loc="left")
    return figure, axes


def _shades(count: int) -> Any:
    """Returns colors from dark to light, (count, 4)."""
    return colormaps["viridis"](np.linspace(0, 0.9, count))


def reconstruction_figure(units: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plots each unit's error while its rounding was learned, relative to rounding to the nearest; blocks from dark to light.

    Args:
      units: the facts of each unit by its name, from :func:`ptq4dit_jax.reconstruction.reconstruct`: ``before``, ``after`` and
        ``curve``.
    """
    figure, axes = _relative_error_axes("Reconstruction, unit by unit")
    blocks = [name for name in units if name.startswith("block ")]
    looks: dict[str, dict[str, Any]] = {
        name: {"color": shade} for name, shade in zip(blocks, _shades(len(blocks)), strict=True)
    }
    for index, name in enumerate(name for name in units if name not in looks):
        looks[name] = {"color": _GRAY, "linestyle": ("--", ":", "-.")[index % 3]}
    for name, facts in units.items():
        curve = np.asarray(facts["curve"], np.float64)
        done = 100 * (np.arange(len(curve)) + 0.5) / len(curve)
        axes.plot(done, _finite(curve), linewidth=1.4, label=name, **looks[name])
        end = facts["after"] / facts["before"]
        axes.plot(102, end, marker="o", markersize=4, color=looks[name]["color"], clip_on=False)
    axes.set(xlim=(0, 102), xlabel="iterations done (%); dots: after the last, all weights rounded", ylim=(0, None))
    handles, labels = axes.get_legend_handles_labels()
    shown = [i for i, name in enumerate(labels) if name not in blocks[1:-1]]
    figure.legend(
        [handles[i] for i in shown],
        [labels[i] for i in shown],
        loc="outside lower center",
        ncols=min(5, len(shown)),
        frameon=False,
    )
    return figure


def rounding_figure(units: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plots the errors of blocks and their layers rounded in closed form, relative to rounding to the nearest, along the depth.

    Args:
      units: the facts of each unit by its name, from :func:`ptq4dit_jax.reconstruction.round_closed_form`: ``before``,
        ``after`` and ``layers``.
    """
    figure, axes = _relative_error_axes("Rounding in closed form, layer by layer")
    blocks = [facts for name, facts in units.items() if name.startswith("block ")]
    layers = list(dict.fromkeys(layer for facts in blocks for layer in facts["layers"]))
    for layer, shade in zip(layers, _shades(len(layers)), strict=True):
        errors = [facts["layers"].get(layer, np.nan) for facts in blocks]
        axes.plot(errors, color=shade, linewidth=1.4, marker="o", markersize=4, label=layer)
    whole = [facts["after"] / facts["before"] for facts in blocks]
    axes.plot(whole, color="black", linewidth=2, marker="s", markersize=5, label="output of the block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="block", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=len(layers) + 1, frameon=False)
    return figure


def salience_figure(
    before: tuple[ArrayLike, ArrayLike], after: tuple[ArrayLike, ArrayLike], *, title: str = "Salience of the input channels"
) -> Figure:
    """Plots the salience of a layer's input channels before and after balancing, like the paper but on logarithmic scales.

    Args:
      before: ``(max |X_j|, max |W_j|)``, each (K,): the largest activation and the largest weight of each input channel.
      after: the same for the balanced layer.
      title: what is shown, e.g. the layer's name.
    """
    figure = Figure(figsize=(_WIDTH, 4.4), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, what in enumerate(("max |X| of activations", "max |W| of weights")):
        pair = [np.asarray(saliences[row], np.float64) for saliences in (before, after)]
        for salience in pair:
            if salience.ndim != 1 or salience.size == 0:
                raise Ptq4ditError(f"Salience to plot must have one value per channel (K,), not the shape {salience.shape}.")
        positive = np.concatenate([salience[salience > 0] for salience in pair])
        floor, top = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
        for axes, salience, when in zip(grid[row], pair, ("before balancing", "after balancing"), strict=True):
            _style(axes)
            axes.set_yscale("log")
            # Filled steps with an outline, because one bar among thousands would be too thin to see. Dead channels are at the
            # floor.
            axes.fill_between(
                np.arange(len(salience) + 1) - 0.5,
                floor / 2,
                np.append(salience, salience[-1]).clip(floor / 2),
                step="post",
                color=_COLORS[row],
                linewidth=0.7,
            )
            axes.set_xlim(-0.5, len(salience) - 0.5)
            median = np.median(salience)
            if median > 0:
                axes.axhline(median, color="black", linewidth=0.8, linestyle=":")
                ratio = f"largest / median = {salience.max() / median:.1f}"
                axes.text(0.98, 0.96, ratio, transform=axes.transAxes, ha="right", va="top", fontsize=9, color="#333333")
            if row == 0:
                axes.set_title(when, loc="left", fontsize=10)
            else:
                axes.set_xlabel("input channel")
        # Leave room above for the text.
        grid[row, 0].set_ylim(floor / 2, top * (top / floor) ** 0.2 * 1.2)
        grid[row, 0].set_ylabel(what, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _finite(values: np.ndarray) -> np.ndarray:
    """Replaces infinities by NaN, which leaves a gap in a line."""
    return np.where(np.isfinite(values), values, np.nan)


def _line(comparison: Comparison, name: str) -> dict[str, Any]:
    if name == NOISE_FLOOR:
        return {"color": _GRAY, "linestyle": "--", "linewidth": 1.5}
    index = [other for other in comparison.figures if other != NOISE_FLOOR].index(name)
    return {
        "color": _COLORS[index % len(_COLORS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.8,
    }


def _style(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
