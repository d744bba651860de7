"""What a model is, in a few facts."""

from __future__ import annotations

from typing import Any

from ptq4dit_jax import checkpoints
from ptq4dit_jax.engine import QuantizedDiT
from ptq4dit_jax.evaluation import num_bytes
from ptq4dit_jax.terminal import megabytes


def summary_of(model: checkpoints.Model) -> dict[str, Any]:
    """Summarizes a model for people and for JSON."""
    c = model.config
    return {
        "kind": "quantized" if isinstance(model, QuantizedDiT) else "float",
        "network": type(c).__name__.removesuffix("Config"),
        "shape": f"depth {c.depth}, width {c.hidden_size}, {c.num_heads} heads, patch {c.patch_size}",
        "image": f"{c.input_size} x {c.input_size} x {c.in_channels}",
        "classes": c.num_classes,
        "positions": "the model's own table" if c.position_table else "sine-cosine",
        "learned_sigma": c.learn_sigma,
        "predicts": model.schedule.describe(),
        "parameters": c.num_parameters,
        "bytes": num_bytes(model),
    }


def in_words(summary: dict[str, Any]) -> dict[str, str]:
    """Puts a summary into words, under readable names."""
    words: dict[str, Any] = {"bytes": megabytes, "classes": lambda count: str(count or "none")}
    return {key.replace("_", " "): words.get(key, str)(value) for key, value in summary.items()}
