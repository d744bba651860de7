"""What benchmarks/sampling.py writes: the tables, a picture, and partial results joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import common

README = common.ROOT / "README.md"
PAGE = common.ROOT / "docs" / "kernels.md"
PICTURE = common.ROOT / "docs" / "speed.png"
#: In the order of the tables.
ENGINES = {
    "w8a8": "**W8A8**",
    "w4a8": "**W4A8**",
    "bf16": "bfloat16, JAX with cuDNN attention",
    "qwix": "W8A8, JAX, Qwix",
    "torch": "bfloat16, PyTorch, torch.compile",
    "torch-graphs": "bfloat16, PyTorch, torch.compile with CUDA graphs",
    "torchao-int8": "W8A8, PyTorch, torchao, torch.compile with CUDA graphs",
    "torchao-int8-tuned": "W8A8, PyTorch, torchao, torch.compile with CUDA graphs and tuned products",
    "torchao-fp8": "fp8, PyTorch, torchao, torch.compile with CUDA graphs",
}
#: Left to the full table.
_NOT_IN_README = ("torch",)
#: What identifies results that may be joined.
_FIXED = ("commit", "hardware", "jax", "model", "input_size", "steps", "repeats")


def results(input_size: int) -> Path:
    """The file of results for a side of the latent."""
    return common.RESULTS / ("sampling.json" if input_size == 32 else f"sampling_{8 * input_size}.json")


def put() -> None:
    """Rewrites the tables in the documents, and the picture, from the stored results."""
    for size in (32, 64):
        if results(size).exists():
            document = json.loads(results(size).read_text())
            common.put_table(PAGE, f"sampling.py, {8 * size} px", full(document))
            if size == 32:
                common.put_table(README, "sampling.py", compact(document))
                figure(document).savefig(PICTURE, dpi=120)


def compact(document: dict[str, Any]) -> str:
    """A row an engine: weights, milliseconds a step and images a second."""
    guided = document["guided"]
    lines = [
        f"{_setting(document)}.",
        "",
        "| milliseconds a step (images a second, 50 steps) | weights, GB | " + " | ".join(map(_images, guided)) + " |",
        "|---|---|" + "---|" * len(guided),
    ]
    for engine, entries in _rows(document).items():
        if engine not in _NOT_IN_README:
            cells = [_time(entries.get(count), document, "{:.2f} ({:.1f})") for count in guided]
            lines.append(f"| {ENGINES[engine]} | {_weights(entries)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(document: dict[str, Any]) -> Figure:
    """Images a second by engine, a panel with a scale of its own for each number of images."""
    rows = {engine: entries for engine, entries in _rows(document).items() if engine not in _NOT_IN_README}
    made = Figure(figsize=(11.0, 0.4 * len(rows) + 1.0), layout="constrained")
    [panels] = made.subplots(1, len(document["guided"]), sharey=True, squeeze=False)
    for axes, count in zip(panels, document["guided"], strict=True):
        for place, (engine, entries) in enumerate(rows.items()):
            if (entry := entries.get(count)) is not None:
                rate = _rate(entry, document)
                axes.barh(place, rate, color="#0072B2" if ENGINES[engine].startswith("**") else "#BBBBBB")
                axes.annotate(f" {rate:.1f}", (rate, place), va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [_short(engine) for engine in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
        axes.set_title(_images(count), loc="left", fontsize=10)
        axes.set_xticks([])  # the bars say how long they are
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.margins(x=0.15)
    made.supxlabel(
        f"images a second, 50 steps; {document['model']}, {document['input_size'] * 8} px, {document['hardware']}", fontsize=9
    )
    return made


def full(document: dict[str, Any]) -> str:
    """A row for each number of images and engine: times, memory, and what compiling took."""
    lines = [
        f"{_setting(document)}.",
        "",
        "| images | engine | ms a step | images a second, 50 steps | weights, GB | peak memory, GB | compiling, s |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = _rows(document)
    for count in document["guided"]:
        for engine, entries in rows.items():
            entry = entries.get(count)
            peak = entry.get("sampling_bytes") if entry else None
            compiling = f"{entry['first_s'] - min(entry['seconds']):.0f}" if entry else ""
            cells = [_time(entry, document, "{:.2f}"), _time(entry, document, "{1:.2f}"), _weights(entries)]
            cells += [f"{peak / 1e9:.2f}" if peak else "", compiling]
            lines.append(f"| {count} | {ENGINES[engine]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def joined(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Documents over different engines or numbers of images as one; of two measurements of the same, the later document's.
    An engine counts as failed where some size is in no document."""
    common.refuse_unlike(documents, _FIXED)
    engines: dict[str, dict[int, dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for document in documents:
        failed |= document.get("failed", {})
        for engine, entries in document["engines"].items():
            engines.setdefault(engine, {}).update({entry["guided"]: entry for entry in entries})
    guided = sorted({count for document in documents for count in document["guided"]})
    return {
        **documents[0],
        "guided": guided,
        "engines": {engine: [by_count[count] for count in sorted(by_count)] for engine, by_count in engines.items()},
        "failed": {engine: reason for engine, reason in failed.items() if len(engines.get(engine, ())) < len(guided)},
    }


def _rows(document: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Entries by engine, in the order of the tables, and number of images."""
    measured = document["engines"]
    return {engine: {entry["guided"]: entry for entry in measured[engine]} for engine in ENGINES if measured.get(engine)}


def _setting(document: dict[str, Any]) -> str:
    software: dict[str, str] = {}
    for entries in document["engines"].values():
        for entry in entries:
            software |= entry.get("software", {})
    peers = "".join(f", {name} {version}" for name, version in sorted(software.items(), key=lambda item: item[0].lower()))
    return (
        f"{document['model']}, {document['input_size'] * 8} px, {document['steps']} DDPM steps, guided (two rows an image), "
        f"best of {document['repeats']}; {common.source(document)}{peers}"
    )


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _short(engine: str) -> str:
    """An engine's name without markup and what all of its kind have."""
    return ENGINES[engine].replace("**", "").replace(", torch.compile", "").replace("JAX with cuDNN attention", "JAX")


def _rate(entry: dict[str, Any], document: dict[str, Any]) -> float:
    """Images a second with 50 steps."""
    return entry["guided"] * document["steps"] / (50 * min(entry["seconds"]))


def _time(entry: dict[str, Any] | None, document: dict[str, Any], form: str) -> str:
    """Milliseconds a step and images a second in this form; nothing where it was not measured."""
    if entry is None:
        return ""
    return form.format(1e3 * min(entry["seconds"]) / document["steps"], _rate(entry, document))


def _weights(entries: dict[int, dict[str, Any]]) -> str:
    return f"{next(iter(entries.values()))['weights_bytes'] / 1e9:.2f}"
