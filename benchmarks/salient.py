"""A model whose channels are salient, as those of large networks are: what balancing is for."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from ptq4dit_jax.model import FloatDiT


def salient_model(model: FloatDiT, *, share: float = 0.02, gain: float = 30.0, seed: int = 0) -> FloatDiT:
    """The same float function with ``share`` (at least one) of the inputs of qkv, fc1 and proj made ``gain`` times as large.

    For qkv and fc1 the adaLN linear makes them so, for proj the v columns of qkv; the rows of the kernel take it back.
    Written in NumPy, one channel at a time, so that it shares nothing with ``ptq4dit_jax.folding``.
    """
    depth, width = model.config.depth, model.config.hidden_size
    blocks = jax.tree.map(np.array, model.params["blocks"])
    rng = np.random.default_rng(seed)
    count = max(1, round(share * width))
    for layer in range(depth):
        for name, shift, scale in (("qkv", 0, 1), ("fc1", 3, 4)):
            for channel in rng.choice(width, count, replace=False):
                for chunk in (shift, scale):
                    blocks["adaLN"]["kernel"][layer, :, chunk * width + channel] *= gain
                    blocks["adaLN"]["bias"][layer, chunk * width + channel] *= gain
                blocks["adaLN"]["bias"][layer, scale * width + channel] += gain - 1
                blocks[name]["kernel"][layer, channel] /= gain
        for channel in rng.choice(width, count, replace=False):
            blocks["qkv"]["kernel"][layer, :, 2 * width + channel] *= gain
            blocks["qkv"]["bias"][layer, 2 * width + channel] *= gain
            blocks["proj"]["kernel"][layer, channel] /= gain
    return dataclasses.replace(model, params={**model.params, "blocks": blocks})
