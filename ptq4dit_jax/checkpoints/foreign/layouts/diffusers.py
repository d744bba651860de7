"""diffusers' ``DiTTransformer2DModel``: every block has a copy of the embedders, and q, k and v are separate."""

from __future__ import annotations

from ptq4dit_jax.checkpoints.foreign.layouts.table import PATCH_OIHW, Entry, Layout, torch_linear

_BLOCK = "transformer_blocks.{i}."

DIFFUSERS = Layout(
    name="diffusers DiT",
    markers=("pos_embed.proj.weight", "transformer_blocks.0.norm1.linear.weight"),
    block=_BLOCK,
    entries=(
        Entry("patch_embed/kernel", ("pos_embed.proj.weight",), PATCH_OIHW),
        Entry("patch_embed/bias", ("pos_embed.proj.bias",)),
        *torch_linear("time_fc1", _BLOCK + "norm1.emb.timestep_embedder.linear_1"),
        *torch_linear("time_fc2", _BLOCK + "norm1.emb.timestep_embedder.linear_2"),
        Entry("label_embed/embedding", (_BLOCK + "norm1.emb.class_embedder.embedding_table.weight",)),
        *torch_linear("blocks/adaLN", _BLOCK + "norm1.linear"),
        *torch_linear("blocks/qkv", *(f"{_BLOCK}attn1.to_{name}" for name in "qkv")),
        *torch_linear("blocks/proj", _BLOCK + "attn1.to_out.0"),
        *torch_linear("blocks/fc1", _BLOCK + "ff.net.0.proj"),
        *torch_linear("blocks/fc2", _BLOCK + "ff.net.2"),
        *torch_linear("final_adaLN", "proj_out_1"),
        *torch_linear("final", "proj_out_2"),
    ),
    sizes={
        "hidden": ("pos_embed.proj.weight", 0),
        "channels": ("pos_embed.proj.weight", 1),
        "patch": ("pos_embed.proj.weight", 2),
        "rows": ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight", 0),
        "mlp": ("transformer_blocks.0.ff.net.0.proj.weight", 0),
        "frequencies": ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight", 1),
        "outputs": ("proj_out_2.weight", 0),
        "tokens": ("pos_embed.pos_embed", 1),
    },
    pos_embed="pos_embed.pos_embed",
    is_shared=True,
)
