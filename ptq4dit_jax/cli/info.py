"""``ptq4dit info``: what a model is."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import typer

from ptq4dit_jax.checkpoints import foreign, store
from ptq4dit_jax.cli.options import BackendName, Json, ModelArgument
from ptq4dit_jax.engine import QuantizedDiT, choice, describe
from ptq4dit_jax.summary import in_words, summary_of
from ptq4dit_jax.terminal import claim_target, console, copied, load_model, print_layers, runs_line, to_run, write_json


def info(context: typer.Context, model: ModelArgument, backend: BackendName = "auto", json: Json = None) -> None:
    """Shows what a model is: its shape, its size and, if quantized, what runs for each layer."""
    claim_target(context, json, overwrite=True)
    choice.checked(backend)
    with contextlib.ExitStack() as stack:
        where = model if model.startswith("random:") else stack.enter_context(copied(model))
        loaded = load_model(str(where))
        facts = _provenance(where)
    running = to_run(loaded, "auto", backend)
    summary = summary_of(loaded)
    for key, value in in_words(summary).items():
        console.print(f"{key:>14}  {value}")
    rows = []
    if isinstance(running, QuantizedDiT):
        console.print(f"{'runs':>14}  {runs_line(running)}")
        rows = [layer.words() for layer in describe(running)]
        print_layers(rows)
    for key, value in facts.items():
        if key == "evidence" and isinstance(value, dict):
            value = ", ".join(f"{what} by {source}" for what, source in value.items()) or "none"
        for line in value if isinstance(value, list) else [value]:
            console.print(f"{key.replace('_', ' '):>14}  {line}")
    write_json(json, {**summary, "config": loaded.config.to_dict(), "layers": rows, "provenance": facts})


def _provenance(path: str | Path) -> dict[str, Any]:
    """Returns what a model folder says about its origin; empty for foreign checkpoints and for random weights."""
    if isinstance(path, str) or foreign.is_foreign(path):
        return {}
    return store.read_config(path).get("provenance", {})
