"""Re-parameterization: balancing factors go into the parameters, and cost nothing at run time (PTQ4DiT section 3.4, eqs.
13-21).

For a factor b on the input channels of a layer, ``X' = X b`` and ``W' = W / b``. The second half is a division of the
kernel's rows. The first half needs a place:

    qkv_in, fc1_in   the adaLN linear that makes their shift and scale: ``shift' = b shift``, ``1 + scale' = b (1 + scale)``
    v                the v columns of the qkv linear (used to give v's channels equal ranges; its inverse joins proj_in)
    proj_in, fc2_in  cannot be folded into a float layer; what is left (a :class:`Balance` in the float model) is a
                     per-channel vector in the de-quantization of ``probs @ v`` and in the quantization of the GELU output
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

#: Block sites that can be balanced, and where their adaLN shift and scale sit among the six chunks.
ADALN_CHUNKS = {"qkv_in": (0, 1), "fc1_in": (3, 4)}
RESIDUAL_SITES = ("proj_in", "fc2_in")


def fold(blocks: Mapping[str, Any], factors: Mapping[str, jax.Array]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Folds factors into stacked block parameters.

    Args:
      blocks: the ``blocks`` part of a DiT's parameters, every leaf with a leading depth axis L.
      factors: by site, (L, K) with K the features of ``qkv_in``, ``proj_in``, ``fc1_in``, ``fc2_in`` or ``v``; absent means 1.

    Returns:
      New block parameters, and the factors that remain at ``proj_in`` and ``fc2_in``. With these applied at their sites the
      model's output is the same function as before.
    """
    blocks = {name: dict(layer) for name, layer in blocks.items()}
    for name, factor in factors.items():
        if name.endswith("_in"):
            layer = name.removesuffix("_in")
            blocks[layer]["kernel"] = blocks[layer]["kernel"] / factor[..., None]
    for name, (shift, scale) in ADALN_CHUNKS.items():
        if name in factors:
            blocks["adaLN"] = _fold_adaln(blocks["adaLN"], factors[name], shift, scale)

    residual = {name: factors[name] for name in RESIDUAL_SITES if name in factors}
    if "v" in factors:
        gain = jnp.concatenate([jnp.ones_like(factors["v"])] * 2 + [factors["v"]], axis=-1)
        qkv = blocks["qkv"]
        blocks["qkv"] = {"kernel": qkv["kernel"] * gain[..., None, :], "bias": qkv["bias"] * gain}
        residual["proj_in"] = residual.get("proj_in", 1.0) / factors["v"]
    return blocks, residual


def _fold_adaln(layer: Mapping[str, jax.Array], factor: jax.Array, shift: int, scale: int) -> dict[str, jax.Array]:
    """Multiplies the shift and scale chunks by ``factor`` (L, D) and adds ``factor - 1`` to the scale's bias."""
    D = factor.shape[-1]
    gain = jnp.ones(layer["bias"].shape, factor.dtype)
    offset = jnp.zeros_like(gain)
    for chunk in (shift, scale):
        gain = gain.at[..., chunk * D : (chunk + 1) * D].set(factor)
    offset = offset.at[..., scale * D : (scale + 1) * D].set(factor - 1)
    return {"kernel": layer["kernel"] * gain[..., None, :], "bias": layer["bias"] * gain + offset}
