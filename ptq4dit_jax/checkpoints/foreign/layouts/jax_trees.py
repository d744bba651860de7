"""Layouts of JAX code bases, whose names are the paths of their parameter trees."""

from __future__ import annotations

from ptq4dit_jax.checkpoints.foreign.layouts.table import (
    FROM_HEADS,
    HEADS_BIAS,
    PATCH_HWIO,
    TO_HEADS,
    Entry,
    Layout,
    flax_linear,
)
from ptq4dit_jax.schedules import NoiseSchedule


def _attention(prefix: str, end: str = "") -> tuple[Entry, ...]:
    """Flax's attention with q, k and v apart and heads as an axis."""
    names = (f"{prefix}.query", f"{prefix}.key", f"{prefix}.value")
    return (
        *flax_linear("blocks/qkv", *names, end=end, kernel=TO_HEADS, bias=HEADS_BIAS),
        *flax_linear("blocks/proj", f"{prefix}.out", end=end, kernel=FROM_HEADS),
    )


KVFRANS = Layout(
    name="kvfrans/jax-diffusion-transformer",
    markers=("DiTBlock_0.MultiHeadDotProductAttention_0.query.kernel",),
    block="DiTBlock_{i}.",
    entries=(
        *flax_linear("patch_embed", "PatchEmbed_0.Conv_0", kernel=PATCH_HWIO),
        *flax_linear("time_fc1", "TimestepEmbedder_0.Dense_0"),
        *flax_linear("time_fc2", "TimestepEmbedder_0.Dense_1"),
        Entry("label_embed/embedding", ("LabelEmbedder_0.Embed_0.embedding",)),
        *flax_linear("blocks/adaLN", "DiTBlock_{i}.Dense_0"),
        *_attention("DiTBlock_{i}.MultiHeadDotProductAttention_0"),
        *flax_linear("blocks/fc1", "DiTBlock_{i}.MlpBlock_0.Dense_0"),
        *flax_linear("blocks/fc2", "DiTBlock_{i}.MlpBlock_0.Dense_1"),
        *flax_linear("final_adaLN", "FinalLayer_0.Dense_0"),
        *flax_linear("final", "FinalLayer_0.Dense_1"),
    ),
    sizes={
        "hidden": ("PatchEmbed_0.Conv_0.kernel", 3), "channels": ("PatchEmbed_0.Conv_0.kernel", 2),
        "patch": ("PatchEmbed_0.Conv_0.kernel", 0), "rows": ("LabelEmbedder_0.Embed_0.embedding", 0),
        "mlp": ("DiTBlock_0.MlpBlock_0.Dense_0.kernel", 1), "frequencies": ("TimestepEmbedder_0.Dense_0.kernel", 0),
        "outputs": ("FinalLayer_0.Dense_1.kernel", 1), "tokens": ("pos_embed", 1),
        "heads": ("DiTBlock_0.MultiHeadDotProductAttention_0.query.kernel", 1),
    },
    pos_embed="pos_embed",
    schedule=NoiseSchedule(num_timesteps=500, beta_start=2e-4, beta_end=0.04),
)  # fmt: skip

JAX_DIT = Layout(
    name="demon2036/jax-dit",
    markers=("x_embedder.proj.kernel", "blocks_0.attn.qkv.kernel", "blocks_0.adaLN_modulation.layers_1.kernel"),
    block="blocks_{i}.",
    entries=(
        *flax_linear("patch_embed", "x_embedder.proj", kernel=PATCH_HWIO),
        *flax_linear("time_fc1", "t_embedder.mlp.layers_0"),
        *flax_linear("time_fc2", "t_embedder.mlp.layers_2"),
        Entry("label_embed/embedding", ("y_embedder.embedding_table.embedding",)),
        *flax_linear("blocks/adaLN", "blocks_{i}.adaLN_modulation.layers_1"),
        *flax_linear("blocks/qkv", "blocks_{i}.attn.qkv"),
        *flax_linear("blocks/proj", "blocks_{i}.attn.proj"),
        *flax_linear("blocks/fc1", "blocks_{i}.mlp.fc1"),
        *flax_linear("blocks/fc2", "blocks_{i}.mlp.fc2"),
        *flax_linear("final_adaLN", "final_layer.adaLN_modulation.layers_1"),
        *flax_linear("final", "final_layer.linear"),
    ),
    sizes={
        "hidden": ("x_embedder.proj.kernel", 3), "channels": ("x_embedder.proj.kernel", 2),
        "patch": ("x_embedder.proj.kernel", 0), "tokens": ("pos_embed", 1),
        "rows": ("y_embedder.embedding_table.embedding", 0), "mlp": ("blocks_0.mlp.fc1.kernel", 1),
        "frequencies": ("t_embedder.mlp.layers_0.kernel", 0), "outputs": ("final_layer.linear.kernel", 1),
    },
    pos_embed="pos_embed",
)  # fmt: skip

_NNX = "network.blocks.{i}."
DIFFUSE_NNX = Layout(
    name="willisma/diffuse_nnx",
    markers=("network.blocks.0.attn.query.kernel.value",),
    block=_NNX,
    entries=(
        *flax_linear("patch_embed", "network.x_proj", end=".value", kernel=PATCH_HWIO),
        *flax_linear("time_fc1", "network.t_embedder.mlp.layers.0", end=".value"),
        *flax_linear("time_fc2", "network.t_embedder.mlp.layers.2", end=".value"),
        Entry("label_embed/embedding", ("network.y_embedder.embedding_table.embedding.value",)),
        *flax_linear("blocks/adaLN", _NNX + "adaLN_mod.layers.1", end=".value"),
        *_attention(_NNX + "attn", end=".value"),
        *flax_linear("blocks/fc1", _NNX + "mlp.linear1", end=".value"),
        *flax_linear("blocks/fc2", _NNX + "mlp.linear2", end=".value"),
        *flax_linear("final_adaLN", "network.final_layer.adaLN_mod.layers.1", end=".value"),
        *flax_linear("final", "network.final_layer.linear", end=".value"),
    ),
    sizes={
        "hidden": ("network.x_proj.kernel.value", 3), "channels": ("network.x_proj.kernel.value", 2),
        "patch": ("network.x_proj.kernel.value", 0), "rows": ("network.y_embedder.embedding_table.embedding.value", 0),
        "mlp": ("network.blocks.0.mlp.linear1.kernel.value", 1),
        "frequencies": ("network.t_embedder.mlp.layers.0.kernel.value", 0),
        "outputs": ("network.final_layer.linear.kernel.value", 1), "tokens": ("network.x_embedder.pe.value", 1),
        "heads": ("network.blocks.0.attn.query.kernel.value", 1),
    },
    pos_embed="network.x_embedder.pe.value",
    ignored=(r".*\.rngs\..*",),
    objective="velocity",
)  # fmt: skip

#: Families whose network has inputs that ours has not; known, so that they can be named.
OTHERS = (
    Layout(name="kvfrans/shortcut-models", markers=("DiTBlock_0.Dense_4.kernel",), objective="velocity"),
    Layout(name="Gsunshine/meanflow", markers=("net.blocks.layers_0.attn.qkv._flax_linear.kernel",), objective="velocity"),
    Layout(name="Lyy-iiis/imeanflow", markers=("net.shared_blocks_0.attn.q_proj._flax_linear.kernel",), objective="velocity"),
    Layout(name="demon2036/jax-sit", markers=("blocks_0.attn.qkv.kernel", "blocks_0.Dense_0.kernel"), objective="velocity"),
)
