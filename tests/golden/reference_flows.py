"""The networks of three flow code bases in plain NumPy float64, on trees as they save them, and a chain of their samplers.

    python tests/golden/reference_flows.py        writes foreign/flows.npz

which holds, for each of `sit` (willisma/SiT), `shortcut` (kvfrans/shortcut-models) and `meanflow` (Gsunshine/meanflow), tiny
networks of 16 wide, 2 blocks, 2 heads, patch 2, 4 channels, 8x8, 5 classes and a null class:

    <family>/params/<path in the tree>   float32
    <family>/out                         the velocity (3,8,8,4) for x, t, y below; for shortcut and meanflow, out_<N> for N
                                         equal steps, where 0 gives the embedder of step sizes a zero
    <family>/chain                       the sample from the noise x: of sit by Heun's method in 4 steps with guidance 2 on the
                                         first three channels, of shortcut in 4 of its steps with guidance 2 on all channels, of
                                         meanflow in one step without guidance

and `x` (3,8,8,4), `t` (3,) in 0..1 and `y` (3,).

Facts, from the code bases' own descriptions and sources, of which nothing was copied:
* All see t as it is, 0 to 1. SiT and shortcut: x = t data + (1 - t) noise. Mean flow: x = t noise + (1 - t) data.
* SiT is Meta's DiT with 2C channels, of which `forward` returns the first C; training leaves the others' weights at zero.
* Shortcut: Dense_0 modulates, Dense_1, 2, 3 make k, q, v, and the logits are q k / d, not / sqrt(d). To the condition comes a
  second time embedder, which sees floor(log2(steps)).
* Mean flow: a second time embedder sees h = t - r; torch's module names, each linear layer nested in `_flax_linear`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import reference_dit
from reference_dit import gelu_tanh, layer_norm, modulate, pos_embed, silu, softmax, time_features
from reference_kvfrans import flat

Array = np.ndarray
Tree = Mapping[str, Any]
WIDTH, DEPTH, HEADS, PATCH, CHANNELS, SIDE, CLASSES = 16, 2, 2, 2, 4, 8, 5


def linear(rng: np.random.Generator, inputs: tuple[int, ...], outputs: int) -> dict[str, Array]:
    kernel = rng.standard_normal((*inputs, outputs)) / np.sqrt(np.prod(inputs))
    return {"kernel": kernel.astype(np.float32), "bias": (0.1 * rng.standard_normal(outputs)).astype(np.float32)}


def table(rng: np.random.Generator) -> Array:
    return 0.5 * rng.standard_normal((CLASSES + 1, WIDTH)).astype(np.float32)


def dense(layer: Tree, x: Array) -> Array:
    return x @ layer["kernel"].astype(np.float64) + layer["bias"]


def patches(conv: Tree, x_BHWC: Array) -> Array:
    """Tokens of the patch convolution (row, column, in, out), with the fixed table of positions."""
    side = SIDE // PATCH
    x = x_BHWC.reshape(-1, side, PATCH, side, PATCH, CHANNELS)
    x = np.einsum("bhpwqc,pqcd->bhwd", x, conv["kernel"].astype(np.float64)) + conv["bias"]
    return x.reshape(-1, side * side, WIDTH) + pos_embed(WIDTH, side)


def image(x_BTK: Array) -> Array:
    side = SIDE // PATCH
    x = x_BTK.reshape(-1, side, side, PATCH, PATCH, CHANNELS)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIDE, SIDE, CHANNELS)


def heads(x_BTD: Array) -> Array:
    return x_BTD.reshape(*x_BTD.shape[:2], HEADS, -1).swapaxes(1, 2)


def shortcut_tree(rng: np.random.Generator) -> Tree:
    embedder = lambda: {"Dense_0": linear(rng, (256,), WIDTH), "Dense_1": linear(rng, (WIDTH,), WIDTH)}
    tree: dict[str, Any] = {
        "PatchEmbed_0": {"Conv_0": linear(rng, (PATCH, PATCH, CHANNELS), WIDTH)},
        "TimestepEmbedder_0": embedder(),
        "TimestepEmbedder_1": embedder(),
        "LabelEmbedder_0": {"Embed_0": {"embedding": table(rng)}},
        "FinalLayer_0": {"Dense_0": linear(rng, (WIDTH,), 2 * WIDTH), "Dense_1": linear(rng, (WIDTH,), PATCH**2 * CHANNELS)},
        "Embed_0": {"embedding": rng.standard_normal((256, 1)).astype(np.float32)},
    }
    for i in range(DEPTH):
        tree[f"DiTBlock_{i}"] = {
            "Dense_0": linear(rng, (WIDTH,), 6 * WIDTH),
            **{f"Dense_{n}": linear(rng, (WIDTH,), WIDTH) for n in (1, 2, 3, 4)},
            "MlpBlock_0": {"Dense_0": linear(rng, (WIDTH,), 4 * WIDTH), "Dense_1": linear(rng, (4 * WIDTH,), WIDTH)},
        }
    return tree


def shortcut(tree: Tree, x: Array, t: Array, y: Array, steps: int) -> Array:
    seen = np.full(t.shape, np.floor(np.log2(steps)) if steps else 0.0)
    c = tree["LabelEmbedder_0"]["Embed_0"]["embedding"][y].astype(np.float64)
    for index, time in enumerate((t, seen)):
        embedder = tree[f"TimestepEmbedder_{index}"]
        c = c + dense(embedder["Dense_1"], silu(dense(embedder["Dense_0"], time_features(time))))
    c, x = silu(c), patches(tree["PatchEmbed_0"]["Conv_0"], x)
    for i in range(DEPTH):
        block = tree[f"DiTBlock_{i}"]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(dense(block["Dense_0"], c), 6, axis=-1)
        h = modulate(layer_norm(x, 1e-6), shift_a, scale_a)
        k, q, v = (heads(dense(block[f"Dense_{n}"], h)) for n in (1, 2, 3))
        out = softmax((q / q.shape[-1]) @ k.swapaxes(-1, -2)) @ v
        x = x + gate_a[:, None] * dense(block["Dense_4"], out.swapaxes(1, 2).reshape(x.shape))
        h = modulate(layer_norm(x, 1e-6), shift_m, scale_m)
        mlp = block["MlpBlock_0"]
        x = x + gate_m[:, None] * dense(mlp["Dense_1"], gelu_tanh(dense(mlp["Dense_0"], h)))
    final = tree["FinalLayer_0"]
    shift, scale = np.split(dense(final["Dense_0"], c), 2, axis=-1)
    return image(dense(final["Dense_1"], modulate(layer_norm(x, 1e-6), shift, scale)))


def meanflow_tree(rng: np.random.Generator) -> Tree:
    def torch_linear(inputs: int, outputs: int) -> Tree:
        return {"_flax_linear": linear(rng, (inputs,), outputs)}

    def embedder() -> Tree:
        return {"mlp": {"layers_0": torch_linear(256, WIDTH), "layers_2": torch_linear(WIDTH, WIDTH)}}

    blocks = {
        f"layers_{i}": {
            "adaLN_modulation": {"layers_1": torch_linear(WIDTH, 6 * WIDTH)},
            "attn": {"qkv": torch_linear(WIDTH, 3 * WIDTH), "proj": torch_linear(WIDTH, WIDTH)},
            "mlp": {"fc1": torch_linear(WIDTH, 4 * WIDTH), "fc2": torch_linear(4 * WIDTH, WIDTH)},
        }
        for i in range(DEPTH)
    }
    net = {
        "x_embedder": {"proj": linear(rng, (PATCH, PATCH, CHANNELS), WIDTH)},
        "t_embedder": embedder(),
        "h_embedder": embedder(),
        "y_embedder": {"embedding_table": {"_flax_embedding": {"embedding": table(rng)}}},
        "blocks": blocks,
        "final_layer": {
            "adaLN_modulation": {"layers_1": torch_linear(WIDTH, 2 * WIDTH)},
            "linear": torch_linear(WIDTH, PATCH**2 * CHANNELS),
        },
    }
    return {"net": net}


def meanflow(tree: Tree, x: Array, t: Array, y: Array, steps: int) -> Array:
    def torch_dense(layer: Tree, x: Array) -> Array:
        return dense(layer["_flax_linear"], x)

    net = tree["net"]
    c = net["y_embedder"]["embedding_table"]["_flax_embedding"]["embedding"][y].astype(np.float64)
    for name, time in (("t", t), ("h", np.full(t.shape, 1 / steps if steps else 0.0))):
        mlp = net[f"{name}_embedder"]["mlp"]
        c = c + torch_dense(mlp["layers_2"], silu(torch_dense(mlp["layers_0"], time_features(time))))
    c, x = silu(c), patches(net["x_embedder"]["proj"], x)
    for i in range(DEPTH):
        block = net["blocks"][f"layers_{i}"]
        modulation = torch_dense(block["adaLN_modulation"]["layers_1"], c)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(modulation, 6, axis=-1)
        qkv = torch_dense(block["attn"]["qkv"], modulate(layer_norm(x, 1e-6), shift_a, scale_a))
        q, k, v = (heads(part) for part in np.split(qkv, 3, axis=-1))
        out = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) @ v
        x = x + gate_a[:, None] * torch_dense(block["attn"]["proj"], out.swapaxes(1, 2).reshape(x.shape))
        h = gelu_tanh(torch_dense(block["mlp"]["fc1"], modulate(layer_norm(x, 1e-6), shift_m, scale_m)))
        x = x + gate_m[:, None] * torch_dense(block["mlp"]["fc2"], h)
    final = net["final_layer"]
    shift, scale = np.split(torch_dense(final["adaLN_modulation"]["layers_1"], c), 2, axis=-1)
    return image(torch_dense(final["linear"], modulate(layer_norm(x, 1e-6), shift, scale)))


def sit_params(rng: np.random.Generator) -> dict[str, Array]:
    def torch_linear(name: str, inputs: int, outputs: int) -> dict[str, Array]:
        layer = linear(rng, (inputs,), outputs)
        return {f"{name}.weight": layer["kernel"].T.copy(), f"{name}.bias": layer["bias"]}

    conv = linear(rng, (PATCH, PATCH, CHANNELS), WIDTH)
    params = {
        "pos_embed": pos_embed(WIDTH, SIDE // PATCH)[None].astype(np.float32),
        "x_embedder.proj.weight": conv["kernel"].transpose(3, 2, 0, 1).copy(),
        "x_embedder.proj.bias": conv["bias"],
        "y_embedder.embedding_table.weight": table(rng),
        **torch_linear("t_embedder.mlp.0", 256, WIDTH),
        **torch_linear("t_embedder.mlp.2", WIDTH, WIDTH),
        **torch_linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH),
        **torch_linear("final_layer.linear", WIDTH, PATCH**2 * 2 * CHANNELS),
    }
    for i in range(DEPTH):
        params |= torch_linear(f"blocks.{i}.adaLN_modulation.1", WIDTH, 6 * WIDTH)
        params |= torch_linear(f"blocks.{i}.attn.qkv", WIDTH, 3 * WIDTH) | torch_linear(f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        params |= torch_linear(f"blocks.{i}.mlp.fc1", WIDTH, 4 * WIDTH) | torch_linear(f"blocks.{i}.mlp.fc2", 4 * WIDTH, WIDTH)
    for part in ("weight", "bias"):
        params[f"final_layer.linear.{part}"].reshape(PATCH**2, 2, CHANNELS, -1)[:, 1] = 0
    return params


def sit(params: Mapping[str, Array], x: Array, t: Array, y: Array) -> Array:
    out = reference_dit.forward(params, reference_dit.Config(heads=HEADS), x.transpose(0, 3, 1, 2), t, y)
    return out[:, :CHANNELS].transpose(0, 2, 3, 1)


def guided(velocity: Callable[[Array, Array, Array], Array], x: Array, t: float, y: Array, scale: float, first: int) -> Array:
    t_B = np.full(len(x), t)
    c, u = velocity(x, t_B, y), velocity(x, t_B, np.full_like(y, CLASSES))
    return np.concatenate([(u + scale * (c - u))[..., :first], c[..., first:]], axis=-1)


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, SIDE, SIDE, CHANNELS)).astype(np.float32)
    t, y = np.array([0.0, 0.3, 1.0]), np.array([3, 0, CLASSES])
    labels = np.array([3, 0, 4])
    out: dict[str, Array] = {"x": x, "t": t, "y": y, "labels": labels}

    params = sit_params(rng)
    out |= {f"sit/params/{name}": array for name, array in params.items()} | {"sit/out": sit(params, x, t, y)}
    image, dt = x.astype(np.float64), 1 / 4
    for i in range(4):
        v = guided(lambda *a: sit(params, *a), image, i * dt, labels, 2.0, 3)
        v_next = guided(lambda *a: sit(params, *a), image + dt * v, (i + 1) * dt, labels, 2.0, 3)
        image = image + dt * (v + v_next) / 2
    out["sit/chain"] = image

    tree = shortcut_tree(rng)
    out |= flat(tree, "shortcut/params") | {f"shortcut/out_{n}": shortcut(tree, x, t, y, n) for n in (0, 4, 100, 128)}
    image = x.astype(np.float64)
    for i in range(4):
        image = image + guided(lambda *a: shortcut(tree, *a, 4), image, i / 4, labels, 2.0, CHANNELS) / 4
    out["shortcut/chain"] = image

    tree = meanflow_tree(rng)
    out |= flat(tree, "meanflow/params") | {f"meanflow/out_{n}": meanflow(tree, x, t, y, n) for n in (0, 1, 2)}
    out["meanflow/chain"] = x - meanflow(tree, x, np.ones(3), labels, 1)
    np.savez_compressed(Path(__file__).parent / "foreign" / "flows.npz", **out)


if __name__ == "__main__":
    main()
