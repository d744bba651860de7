"""Layouts of JAX code bases whose models predict noise; names are the paths of their parameter trees."""

from __future__ import annotations

from ptq4dit_jax.checkpoints.foreign.layouts.table import (
    PATCH_HWIO,
    Entry,
    Layout,
    flax_attention,
    flax_linear,
)
from ptq4dit_jax.schedules import NoiseSchedule

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
        *flax_attention("DiTBlock_{i}.MultiHeadDotProductAttention_0"),
        *flax_linear("blocks/fc1", "DiTBlock_{i}.MlpBlock_0.Dense_0"),
        *flax_linear("blocks/fc2", "DiTBlock_{i}.MlpBlock_0.Dense_1"),
        *flax_linear("final_adaLN", "FinalLayer_0.Dense_0"),
        *flax_linear("final", "FinalLayer_0.Dense_1"),
    ),
    sizes={
        "hidden": ("PatchEmbed_0.Conv_0.kernel", 3),
        "channels": ("PatchEmbed_0.Conv_0.kernel", 2),
        "patch": ("PatchEmbed_0.Conv_0.kernel", 0),
        "rows": ("LabelEmbedder_0.Embed_0.embedding", 0),
        "mlp": ("DiTBlock_0.MlpBlock_0.Dense_0.kernel", 1),
        "frequencies": ("TimestepEmbedder_0.Dense_0.kernel", 0),
        "outputs": ("FinalLayer_0.Dense_1.kernel", 1),
        "tokens": ("pos_embed", 1),
        "heads": ("DiTBlock_0.MultiHeadDotProductAttention_0.query.kernel", 1),
    },
    pos_embed="pos_embed",
    schedule=NoiseSchedule(num_timesteps=500, beta_start=2e-4, beta_end=0.04),
)

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
        "hidden": ("x_embedder.proj.kernel", 3),
        "channels": ("x_embedder.proj.kernel", 2),
        "patch": ("x_embedder.proj.kernel", 0),
        "tokens": ("pos_embed", 1),
        "rows": ("y_embedder.embedding_table.embedding", 0),
        "mlp": ("blocks_0.mlp.fc1.kernel", 1),
        "frequencies": ("t_embedder.mlp.layers_0.kernel", 0),
        "outputs": ("final_layer.linear.kernel", 1),
    },
    pos_embed="pos_embed",
    is_shared=True,
)
