"""A Diffusion Transformer (DiT) in plain NumPy float64, written for tests: short, slow and independent of the package.

Parameters are a flat dict under Meta's names and in Meta's layouts (linear weights are (out, in)). Images are NCHW at
the edge, both in and out. Sizes are read off the parameters; what they cannot tell is in `Config`.

Shape letters: B batch, T tokens (row-major), H width, A heads, D head width, C image channels, P patch size, O output
channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Params = Mapping[str, Array]

FREQUENCIES = 128  # the time embedding has this many cosines, then as many sines


@dataclass(frozen=True)
class Config:
    heads: int
    freq_shift: float = 0.0  # 0: Meta; 1: diffusers
    mlp_norm_eps: float = 1e-6  # 1e-6: Meta; 1e-5: diffusers


def linear(params: Params, name: str, x: Array) -> Array:
    return x @ params[f"{name}.weight"].astype(np.float64).T + params[f"{name}.bias"].astype(np.float64)


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Array, eps: float) -> Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def modulate(x_BTH: Array, shift_BH: Array, scale_BH: Array) -> Array:
    return x_BTH * (1.0 + scale_BH[:, None]) + shift_BH[:, None]


def pos_embed(width: int, side: int) -> Array:
    """Fixed sin-cos table (side*side, width): the first half encodes the column, the second half the row."""
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, col = np.divmod(np.arange(side * side), side)
    return np.concatenate([f(pos[:, None] * omega) for pos in (col, row) for f in (np.sin, np.cos)], axis=1)


def time_features(t_B: Array, freq_shift: float = 0.0) -> Array:
    """Sinusoidal features (B, 256), cosines first, of the raw step number."""
    freqs = np.exp(-np.log(10000.0) * np.arange(FREQUENCIES) / (FREQUENCIES - freq_shift))
    args = t_B.astype(np.float64)[:, None] * freqs
    return np.concatenate([np.cos(args), np.sin(args)], axis=1)


def patch_embed(params: Params, x_BCHW: Array) -> Array:
    """Patches, flattened in the order of the convolution's weights, through a linear layer: (B, T, H)."""
    weight = params["x_embedder.proj.weight"].astype(np.float64)
    width, channels, patch, _ = weight.shape
    batch, _, rows, cols = x_BCHW.shape
    x = x_BCHW.astype(np.float64).reshape(batch, channels, rows // patch, patch, cols // patch, patch)
    x = x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)
    return x @ weight.reshape(width, -1).T + params["x_embedder.proj.bias"].astype(np.float64)


def unpatchify(x_BTK: Array, patch: int) -> Array:
    """(B, T, P*P*O), O fastest, to (B, O, rows, cols) of a square image."""
    batch, tokens, k = x_BTK.shape
    side, out = round(tokens**0.5), k // patch**2
    x = x_BTK.reshape(batch, side, side, patch, patch, out).transpose(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, out, side * patch, side * patch)


def attention(params: Params, name: str, x_BTH: Array, heads: int) -> Array:
    batch, tokens, width = x_BTH.shape
    qkv = linear(params, f"{name}.qkv", x_BTH).reshape(batch, tokens, 3, heads, width // heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (B, A, T, D)
    probs = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(width // heads))
    return linear(params, f"{name}.proj", (probs @ v).swapaxes(1, 2).reshape(batch, tokens, width))


def conditioning(params: Params, config: Config, t_B: Array, y_B: Array) -> Array:
    """The vector `c` (B, H): embedded step plus embedded label."""
    h = linear(params, "t_embedder.mlp.0", time_features(t_B, config.freq_shift))
    table = params["y_embedder.embedding_table.weight"].astype(np.float64)
    return linear(params, "t_embedder.mlp.2", silu(h)) + table[y_B]


def block(params: Params, config: Config, index: int, x_BTH: Array, c_BH: Array) -> Array:
    name = f"blocks.{index}"
    modulation = linear(params, f"{name}.adaLN_modulation.1", silu(c_BH))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = np.split(modulation, 6, axis=1)
    h = modulate(layer_norm(x_BTH, 1e-6), shift_msa, scale_msa)
    x_BTH = x_BTH + gate_msa[:, None] * attention(params, f"{name}.attn", h, config.heads)
    h = modulate(layer_norm(x_BTH, config.mlp_norm_eps), shift_mlp, scale_mlp)
    h = linear(params, f"{name}.mlp.fc2", gelu_tanh(linear(params, f"{name}.mlp.fc1", h)))
    return x_BTH + gate_mlp[:, None] * h


def forward_with_blocks(params: Params, config: Config, x_BCHW: Array, t_B: Array, y_B: Array) -> tuple[Array, Array]:
    """The prediction (B, O, rows, cols) and the residual stream after each block (depth, B, T, H)."""
    x = patch_embed(params, x_BCHW)
    x = x + pos_embed(x.shape[-1], round(x.shape[1] ** 0.5))
    c = conditioning(params, config, t_B, y_B)
    streams: list[Array] = []
    while f"blocks.{len(streams)}.attn.qkv.weight" in params:
        x = block(params, config, len(streams), x, c)
        streams.append(x)
    shift, scale = np.split(linear(params, "final_layer.adaLN_modulation.1", silu(c)), 2, axis=1)
    x = linear(params, "final_layer.linear", modulate(layer_norm(x, 1e-6), shift, scale))
    return unpatchify(x, params["x_embedder.proj.weight"].shape[-1]), np.stack(streams)


def forward(params: Params, config: Config, x_BCHW: Array, t_B: Array, y_B: Array) -> Array:
    """The prediction (B, O, rows, cols); with a learned sigma O = 2C: first C channels of noise, then C of sigma."""
    return forward_with_blocks(params, config, x_BCHW, t_B, y_B)[0]


def forward_with_cfg(
    params: Params, config: Config, x_BCHW: Array, t_B: Array, y_B: Array, cfg_scale: float, guided_channels: int = 3
) -> Array:
    """Classifier-free guidance on the first `guided_channels` channels; the null label is the table's last row.

    Returns (2B, O, rows, cols): the conditional rows, then their unconditional twins. Both halves share the guided
    channels `u + cfg_scale (c - u)`; every other channel keeps its own half's value. Meta's choice is 3 channels of 4.
    """
    null = np.full_like(y_B, len(params["y_embedder.embedding_table.weight"]) - 1)
    twice_x, twice_t = np.concatenate([x_BCHW, x_BCHW]), np.concatenate([t_B, t_B])
    out = forward(params, config, twice_x, twice_t, np.concatenate([y_B, null]))
    cond, uncond = np.split(out[:, :guided_channels], 2)
    guided = uncond + cfg_scale * (cond - uncond)
    return np.concatenate([np.concatenate([guided, guided]), out[:, guided_channels:]], axis=1)
