"""Layouts of JAX code bases whose models predict the velocity of a flow; names are the paths of their parameter trees."""

from __future__ import annotations

import math

from ptq4dit_jax.checkpoints.foreign.layouts.table import (
    KEEP,
    PATCH_HWIO,
    QUERY,
    Entry,
    Layout,
    StepSize,
    flax_linear,
)
from ptq4dit_jax.schedules import FlowSchedule

JAX_SIT = Layout(
    name="demon2036/jax-sit",
    markers=("x_embedder.proj.kernel", "blocks_0.attn.qkv.kernel", "blocks_0.Dense_0.kernel"),
    block="blocks_{i}.",
    entries=(
        *flax_linear("patch_embed", "x_embedder.proj", kernel=PATCH_HWIO),
        *flax_linear("time_fc1", "t_embedder.0"),
        *flax_linear("time_fc2", "t_embedder.2"),
        Entry("label_embed/embedding", ("y_embedder.embedding.embedding",)),
        *flax_linear("blocks/adaLN", "blocks_{i}.Dense_0"),
        *flax_linear("blocks/qkv", "blocks_{i}.attn.qkv"),
        *flax_linear("blocks/proj", "blocks_{i}.attn.proj"),
        *flax_linear("blocks/fc1", "blocks_{i}.mlp.fc1"),
        *flax_linear("blocks/fc2", "blocks_{i}.mlp.fc2"),
        *flax_linear("final_adaLN", "final_layer.ada_dense"),
        *flax_linear("final", "final_layer.proj"),
    ),
    sizes={
        "hidden": ("x_embedder.proj.kernel", 3),
        "channels": ("x_embedder.proj.kernel", 2),
        "patch": ("x_embedder.proj.kernel", 0),
        "tokens": ("pos_embed", 1),
        "rows": ("y_embedder.embedding.embedding", 0),
        "mlp": ("blocks_0.mlp.fc1.kernel", 1),
        "frequencies": ("t_embedder.0.kernel", 0),
        "outputs": ("final_layer.proj.kernel", 1),
    },
    pos_embed="pos_embed",
    schedule=FlowSchedule(data_time=0),
)

_QKV = tuple(f"DiTBlock_{{i}}.Dense_{n}" for n in (2, 1, 3))  # k comes first, then q and v
SHORTCUT = Layout(
    name="kvfrans/shortcut-models",
    markers=("DiTBlock_0.Dense_4.kernel", "TimestepEmbedder_1.Dense_0.kernel"),
    block="DiTBlock_{i}.",
    entries=(
        *flax_linear("patch_embed", "PatchEmbed_0.Conv_0", kernel=PATCH_HWIO),
        *flax_linear("time_fc1", "TimestepEmbedder_0.Dense_0"),
        *flax_linear("time_fc2", "TimestepEmbedder_0.Dense_1"),
        Entry("label_embed/embedding", ("LabelEmbedder_0.Embed_0.embedding",)),
        *flax_linear("blocks/adaLN", "DiTBlock_{i}.Dense_0"),
        *flax_linear("blocks/qkv", *_QKV, kernel=(QUERY, KEEP, KEEP), bias=(QUERY, KEEP, KEEP)),
        *flax_linear("blocks/proj", "DiTBlock_{i}.Dense_4"),
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
    },
    ignored=(r"Embed_0\..*",),  # only for the uncertainty weighting of training
    schedule=FlowSchedule(data_time=1),
    step_size=StepSize(
        entries=(
            *flax_linear("step_fc1", "TimestepEmbedder_1.Dense_0"),
            *flax_linear("step_fc2", "TimestepEmbedder_1.Dense_1"),
        ),
        seen=lambda steps: math.floor(math.log2(steps)),
        default=128,
    ),
)

_MF = "net.blocks.layers_{i}."
_LINEAR = "._flax_linear"
MEANFLOW = Layout(
    name="Gsunshine/meanflow",
    markers=("net.blocks.layers_0.attn.qkv._flax_linear.kernel",),
    block=_MF,
    entries=(
        *flax_linear("patch_embed", "net.x_embedder.proj", kernel=PATCH_HWIO),
        *flax_linear("time_fc1", "net.t_embedder.mlp.layers_0" + _LINEAR),
        *flax_linear("time_fc2", "net.t_embedder.mlp.layers_2" + _LINEAR),
        Entry("label_embed/embedding", ("net.y_embedder.embedding_table._flax_embedding.embedding",)),
        *flax_linear("blocks/adaLN", _MF + "adaLN_modulation.layers_1" + _LINEAR),
        *flax_linear("blocks/qkv", _MF + "attn.qkv" + _LINEAR),
        *flax_linear("blocks/proj", _MF + "attn.proj" + _LINEAR),
        *flax_linear("blocks/fc1", _MF + "mlp.fc1" + _LINEAR),
        *flax_linear("blocks/fc2", _MF + "mlp.fc2" + _LINEAR),
        *flax_linear("final_adaLN", "net.final_layer.adaLN_modulation.layers_1" + _LINEAR),
        *flax_linear("final", "net.final_layer.linear" + _LINEAR),
    ),
    sizes={
        "hidden": ("net.x_embedder.proj.kernel", 3),
        "channels": ("net.x_embedder.proj.kernel", 2),
        "patch": ("net.x_embedder.proj.kernel", 0),
        "rows": ("net.y_embedder.embedding_table._flax_embedding.embedding", 0),
        "mlp": ("net.blocks.layers_0.mlp.fc1._flax_linear.kernel", 1),
        "frequencies": ("net.t_embedder.mlp.layers_0._flax_linear.kernel", 0),
        "outputs": ("net.final_layer.linear._flax_linear.kernel", 1),
    },
    schedule=FlowSchedule(data_time=0, guided=True),
    step_size=StepSize(
        entries=(
            *flax_linear("step_fc1", "net.h_embedder.mlp.layers_0" + _LINEAR),
            *flax_linear("step_fc2", "net.h_embedder.mlp.layers_2" + _LINEAR),
        ),
        seen=lambda steps: 1 / steps,
        default=1,
    ),
)

#: Listed so that error messages can name it.
IMEANFLOW = Layout(
    name="Lyy-iiis/imeanflow",
    markers=("net.shared_blocks_0.attn.q_proj._flax_linear.kernel",),
    differs="rotary positions, RMS norms, and prefix tokens instead of adaLN",
)
