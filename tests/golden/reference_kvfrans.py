"""The network of kvfrans/jax-diffusion-transformer in plain NumPy float64, on the tree that it saves.

    python tests/golden/reference_kvfrans.py        writes foreign/kvfrans.npz

which holds `params/<path in the tree>` float32 of a tiny network (24 wide, 2 blocks, 3 heads, patch 2, 4 channels, 8x8, 10
classes and a null class), inputs `x` (3,8,8,4), `t` and `y` (3,), and its output `out` (3,8,8,4) float64.

Flax's conventions: kernels (in, out), convolutions (row, column, in, out), attention kernels (H, A, d) and (A, d, H). Images
are NHWC. Both the tree and the formulas were written from the code base's description, none was copied.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from reference_dit import gelu_tanh, layer_norm, modulate, pos_embed, silu, softmax, time_features

Array = np.ndarray
Tree = Mapping[str, Any]


def make_tree(
    rng: np.random.Generator, width: int, depth: int, heads: int, patch: int, channels: int, classes: int, side: int
) -> Tree:
    """Random parameters in which every path matters; without learned sigma, as that code base trains."""

    def linear(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Tree:
        kernel = rng.standard_normal((*inputs, *outputs)) / np.sqrt(np.prod(inputs))
        return {"kernel": kernel.astype(np.float32), "bias": (0.1 * rng.standard_normal(outputs)).astype(np.float32)}

    head = (heads, width // heads)
    tree: dict[str, Any] = {
        "pos_embed": pos_embed(width, side // patch)[None].astype(np.float32),
        "PatchEmbed_0": {"Conv_0": linear((patch, patch, channels), (width,))},
        "TimestepEmbedder_0": {"Dense_0": linear((256,), (width,)), "Dense_1": linear((width,), (width,))},
        "LabelEmbedder_0": {"Embed_0": {"embedding": 0.5 * rng.standard_normal((classes + 1, width)).astype(np.float32)}},
        "FinalLayer_0": {"Dense_0": linear((width,), (2 * width,)), "Dense_1": linear((width,), (patch * patch * channels,))},
    }
    for i in range(depth):
        tree[f"DiTBlock_{i}"] = {
            "Dense_0": linear((width,), (6 * width,)),
            "MultiHeadDotProductAttention_0": {name: linear((width,), head) for name in ("query", "key", "value")}
            | {"out": linear(head, (width,))},
            "MlpBlock_0": {"Dense_0": linear((width,), (4 * width,)), "Dense_1": linear((4 * width,), (width,))},
        }
    return tree


def forward(tree: Tree, x_BHWC: Array, t_B: Array, y_B: Array) -> Array:
    def dense(layer: Tree, x: Array) -> Array:
        return x @ layer["kernel"].astype(np.float64) + layer["bias"]

    conv = tree["PatchEmbed_0"]["Conv_0"]
    patch, _, channels, width = conv["kernel"].shape
    batch, height, _, _ = x_BHWC.shape
    side = height // patch
    patches = x_BHWC.reshape(batch, side, patch, side, patch, channels)
    x = np.einsum("bhpwqc,pqcd->bhwd", patches, conv["kernel"].astype(np.float64)).reshape(batch, side * side, width)
    x = x + conv["bias"] + tree["pos_embed"]
    embedder = tree["TimestepEmbedder_0"]
    c = dense(embedder["Dense_1"], silu(dense(embedder["Dense_0"], time_features(t_B))))
    c = silu(c + tree["LabelEmbedder_0"]["Embed_0"]["embedding"][y_B])
    for i in range(sum(name.startswith("DiTBlock_") for name in tree)):
        block = tree[f"DiTBlock_{i}"]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(dense(block["Dense_0"], c), 6, axis=-1)
        h = modulate(layer_norm(x, 1e-6), shift_a, scale_a)
        attention = block["MultiHeadDotProductAttention_0"]
        q, k, v = (
            np.einsum("btk,kad->btad", h, attention[n]["kernel"]) + attention[n]["bias"] for n in ("query", "key", "value")
        )
        probs = softmax(np.einsum("bqad,bkad->baqk", q, k) / np.sqrt(q.shape[-1]))
        out = (
            np.einsum("baqk,bkad,ado->bqo", probs, v, attention["out"]["kernel"].astype(np.float64)) + attention["out"]["bias"]
        )
        x = x + gate_a[:, None] * out
        h = modulate(layer_norm(x, 1e-6), shift_m, scale_m)
        mlp = block["MlpBlock_0"]
        x = x + gate_m[:, None] * dense(mlp["Dense_1"], gelu_tanh(dense(mlp["Dense_0"], h)))
    final = tree["FinalLayer_0"]
    shift, scale = np.split(dense(final["Dense_0"], c), 2, axis=-1)
    out = dense(final["Dense_1"], modulate(layer_norm(x, 1e-6), shift, scale))
    return out.reshape(batch, side, side, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5).reshape(x_BHWC.shape)


def flat(tree: Tree, prefix: str = "params") -> dict[str, Array]:
    leaves: dict[str, Array] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}"
        leaves |= flat(value, path) if isinstance(value, Mapping) else {path: value}
    return leaves


def main() -> None:
    rng = np.random.default_rng(0)
    tree = make_tree(rng, width=24, depth=2, heads=3, patch=2, channels=4, classes=10, side=8)
    x = rng.standard_normal((3, 8, 8, 4)).astype(np.float32)
    t, y = np.array([0, 250, 499]), np.array([3, 0, 10])
    path = Path(__file__).parent / "foreign" / "kvfrans.npz"
    np.savez_compressed(path, x=x, t=t, y=y, out=forward(tree, x, t, y), **flat(tree))


if __name__ == "__main__":
    main()
