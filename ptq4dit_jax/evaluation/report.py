"""Writes the report folder as a whole: a Markdown page with tables and pictures, and the same figures as JSON."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ptq4dit_jax import processes
from ptq4dit_jax.devices import in_use
from ptq4dit_jax.engine import LayerReport
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation.compare import NOISE_FLOOR, REFERENCE, Comparison, ModelFigures, plain
from ptq4dit_jax.evaluation.facts import balanced_sites, learned_units, rounded_units
from ptq4dit_jax.evaluation.grids import sample_grid
from ptq4dit_jax.evaluation.metrics import SQNR_MEAN, SQNR_POOLED, Interval
from ptq4dit_jax.guidance import ResolvedGuidance
from ptq4dit_jax.staging import exchange, staging

_DPI = 120
_PACKAGES = ("ptq4dit-jax", "jax", "jaxlib", "flax", "numpy")


def write_report(
    folder: str | Path,
    comparison: Comparison,
    *,
    title: str,
    describe_rows: Sequence[LayerReport | Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any],
    reconstruction: Mapping[str, Mapping[str, Any]] | None = None,
    rounding: Mapping[str, Mapping[str, Any]] | None = None,
    balancing: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes ``report.md``, ``report.json`` and the pictures that they show into ``folder``, all or nothing.

    Args:
      folder: created with its parents; written under another name beside it, and renamed when complete.
      comparison: from :func:`ptq4dit_jax.evaluation.compare.compare`.
      title: heading of the page.
      describe_rows: what runs for each layer, from :func:`ptq4dit_jax.describe`, or mappings; their keys become columns.
      settings: other settings behind the figures (paths, bit widths); shown beside the comparison's own settings.
      reconstruction: facts of each reconstructed unit by its name, as the provenance of a quantized model holds them.
      rounding: the same for each unit rounded in closed form.
      balancing: the same for each site whose balancing was chosen by measurement.
      overwrite: replaces a report that is already there. A folder that holds anything else is never replaced.

    Returns:
      The absolute path of the folder.

    Raises:
      Ptq4ditError: the folder exists and must not be replaced, or cannot be written.
    """
    target = Path(folder).expanduser().resolve()
    learned, rounded, balanced = learned_units(reconstruction), rounded_units(rounding), balanced_sites(balancing)
    processes.on_first(lambda: _check_replaceable(target, overwrite))
    everything = {**comparison.settings, **settings}
    document = {
        "title": title,
        **comparison.to_json(),
        "layers": plain([row.words() if isinstance(row, LayerReport) else row for row in describe_rows or ()]),
        "balancing": plain(balanced),
        "rounding": plain(rounded),
        "reconstruction": plain(learned),
        "settings": plain(everything),
        "provenance": _provenance(),
    }

    def write() -> None:
        with staging(target) as staged:
            staged.mkdir()
            pictures = _write_pictures(staged, comparison, learned, rounded)
            (staged / "report.md").write_text(_page(comparison, document, pictures), encoding="utf-8")
            (staged / "report.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            _check_replaceable(target, overwrite)
            exchange(staged, target)

    processes.on_first(write)
    return target


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if target.exists():
        if not overwrite:
            raise Ptq4ditError(f"{target} exists; choose another folder for the report, or allow overwriting it.")
        if not target.is_dir() or (any(target.iterdir()) and not (target / "report.json").is_file()):
            raise Ptq4ditError(f"{target} is not a report, so it is not replaced; choose another folder for the report.")


def _provenance() -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a source tree that is not installed
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": f"{len(in_use())} x {in_use()[0].device_kind}",
        "python": platform.python_version(),
        **versions,
    }


def _write_pictures(
    folder: Path,
    comparison: Comparison,
    reconstruction: Mapping[str, Mapping[str, Any]],
    rounding: Mapping[str, Mapping[str, Any]],
) -> dict[str, str]:
    """Writes the PNGs and returns their alternative texts by file name."""
    from ptq4dit_jax.evaluation import plots  # loads matplotlib

    pictures = {}
    if next(iter(comparison.images.values())).shape[-1] in (1, 3):
        sample_grid(comparison.images, comparison.labels).save(folder / "samples.png")
        pictures["samples.png"] = "Samples of every model on the same noise"
    for name, make, text in (
        ("psnr.png", plots.psnr_figure, "PSNR of every image against the reference"),
        ("sqnr_steps.png", plots.step_sqnr_figure, "SQNR of the prediction at each step"),
        ("sqnr_layers.png", plots.layer_sqnr_figure, "SQNR of each layer along the depth"),
    ):
        make(comparison).savefig(folder / name, dpi=_DPI)
        pictures[name] = text
    if any(name.startswith("block ") for name in rounding):
        plots.rounding_figure(rounding).savefig(folder / "rounding.png", dpi=_DPI)
        pictures["rounding.png"] = "Error of every layer rounded in closed form"
    if reconstruction:
        plots.reconstruction_figure(reconstruction).savefig(folder / "reconstruction.png", dpi=_DPI)
        pictures["reconstruction.png"] = "Error of every unit while its roundings were learned"
    return pictures


def _page(comparison: Comparison, document: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    settings = comparison.settings
    predicted = settings.get("objective", "noise")
    guidance = ResolvedGuidance(settings["cfg_scale"], settings["cfg_channels"], settings["guidance_interval"])
    kind = "images" if "samples.png" in pictures else "latents"

    def picture(name: str) -> list[str]:
        return [f"![{pictures[name]}]({name})", ""] if name in pictures else []

    quality = [
        [
            _label(name),
            _mean_decibels(f),
            _decibels(f.sqnr_pooled_db),
            _interval(f.psnr_interval, 1),
            _worst(f),
            _interval(f.ssim_interval, 4),
            _mib(f.num_bytes),
        ]
        for name, f in comparison.figures.items()
    ]
    sizes = [
        [_label(name), f"{count:,}", _mib(count), f"{comparison.reference_bytes / count:.2f} x"]
        for name, count in [(REFERENCE, comparison.reference_bytes)] + [(n, f.num_bytes) for n, f in comparison.figures.items()]
    ]
    lines = [
        f"# {document['title']}",
        "",
        f"Every model against {REFERENCE} on the same noise and labels: {settings['images']} {kind}, {settings['steps']} steps "
        f"of {settings['sampler']}, {guidance}. The noise floor is the float model computing in bfloat16.",
        "",
        *picture("samples.png"),
        "## Quality",
        "",
        *_table(["model", SQNR_MEAN, SQNR_POOLED, "PSNR (dB)", "worst 1 % PSNR (dB)", "SSIM", "size (MiB)"], quality),
        "",
        f"SQNR: of the guided predicted {predicted} at {settings['sqnr_steps']} steps of the reference's own trajectories, "
        f"{settings['sqnr_rows']} rows. Its mean counts every step alike; with powers pooled, the steps of the largest error "
        f"decide. PSNR and SSIM: {kind} of the whole chain, data range {comparison.data_range:g}, means with 95 % bootstrap "
        "intervals.",
        "",
        *picture("psnr.png"),
        *picture("sqnr_steps.png"),
        *picture("sqnr_layers.png"),
        "## Sizes",
        "",
        *_table(["model", "bytes", "MiB", f"smaller than {REFERENCE}"], sizes),
        "",
    ]
    if document["layers"]:
        columns = list(dict.fromkeys(key for row in document["layers"] for key in row))
        columns = [column for column in columns if any(_text(row.get(column)) for row in document["layers"])]
        rows = [[_text(row.get(column)) for column in columns] for row in document["layers"]]
        lines += ["## What each layer runs", "", *_table(columns, rows), ""]
    if document["balancing"]:
        lines += ["## Balancing chosen by measurement", "", *_balancing(document["balancing"]), ""]
    if document["rounding"]:
        lines += ["## Rounding in closed form", "", *picture("rounding.png"), *_rounding(document["rounding"]), ""]
    if document["reconstruction"]:
        rows = [
            [name, f"{unit['before']:.4g}", f"{unit['after']:.4g}", f"{unit['after'] / unit['before']:.3f}"]
            for name, unit in document["reconstruction"].items()
        ]
        columns = ["unit", "squared error, nearest rounding", "after learning", "ratio"]
        lines += ["## Reconstruction", "", *picture("reconstruction.png"), *_table(columns, rows), ""]
    for heading in ("settings", "provenance"):
        rows = [[key, _text(value)] for key, value in _flatten(document[heading])]
        lines += [f"## {heading.capitalize()}", "", *_table([heading, "value"], rows), ""]
    return "\n".join(lines)


def _balancing(sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = ["block", *(site.rpartition(".")[2] for site in sites)]
    depth = len(next(iter(sites.values()))["chosen"])
    cell = lambda site, block: f"{_text(site['chosen'][block])} ({site['to_none'][block]:.2f}, {site['to_paper'][block]:.2f})"
    rows = [[str(block), *(cell(site, block) for site in sites.values())] for block in range(depth)]
    words = "In brackets the squared error of the layer's output relative to that without balancing, and with CSB and SSC."
    return [*_table(columns, rows), "", words]


def _rounding(units: Mapping[str, Mapping[str, Any]]) -> list[str]:
    errors = lambda unit: ", ".join(f"{layer} {error:.3f}" for layer, error in unit["layers"].items())
    rows = [
        [name, f"{unit['before']:.4g}", f"{unit['after']:.4g}", f"{unit['after'] / unit['before']:.3f}", errors(unit)]
        for name, unit in units.items()
    ]
    columns = ["unit", "squared error, nearest rounding", "in closed form", "ratio", "layers, relative to nearest rounding"]
    return _table(columns, rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [columns, *rows]]
    cells.insert(1, ["---"] * len(columns))
    return [f"| {' | '.join(row)} |" for row in cells]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _label(name: str) -> str:
    return f"{name} (noise floor)" if name == NOISE_FLOOR else name


def _number(value: float, digits: int) -> str:
    if np.isposinf(value):
        return "identical"
    return f"{value:.{digits}f}" if np.isfinite(value) else "not finite"


def _decibels(value: float) -> str:
    return _number(value, 1)


def _mean_decibels(figures: ModelFigures) -> str:
    """Formats the mean. One identical step makes it infinite, but the models are identical only if all steps are."""
    mean = figures.sqnr_mean_db
    return "infinite" if np.isposinf(mean) and not np.isposinf(figures.step_sqnr_db).all() else _decibels(mean)


def _interval(interval: Interval, digits: int) -> str:
    mean = _number(interval.mean, digits)
    return f"{mean} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if np.isfinite(interval.mean) else mean


def _worst(figures: ModelFigures) -> str:
    """Formats the PSNR that one image in a hundred does not exceed."""
    return _decibels(float(np.quantile(figures.psnr_db, 0.01, method="lower")))


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"
