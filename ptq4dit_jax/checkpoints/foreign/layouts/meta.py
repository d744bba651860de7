"""facebookresearch/DiT: ``.pt`` files of published weights, and those of train.py (``model``, ``ema``, ``opt``, ``args``)."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np

from ptq4dit_jax.checkpoints.foreign.layouts.table import PATCH_OIHW, Entry, Layout, View, torch_linear
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.schedules import FlowSchedule, Schedule

_LABELS = "y_embedder.embedding_table.weight"


def _told_by_content(view: View, config: DiTConfig) -> Schedule | None:
    """Recognizes SiT, which has the same names and shapes. It discards the variance half of the output, so that this half of
    the last layer keeps its initial zeros in training. REPA trains SiT with projectors, and with time running to the noise."""
    if any(name.startswith("projectors.") for name in view):
        return FlowSchedule(data_time=0)
    if not config.learn_sigma:
        return None
    rows = [view[f"final_layer.linear.{name}"].read().astype(np.float32) for name in ("weight", "bias")]
    noise, sigma = np.split(np.concatenate([rows[0], rows[1][:, None]], 1).reshape(config.patch_size**2, 2, -1), 2, axis=1)
    return FlowSchedule() if noise.any() and not sigma.any() else None


def _renamed(names: Collection[str]) -> dict[str, str]:
    """Maps other names of the same parameters.

    REPA's first files have the blocks after the projectors as ``decoder_blocks``, counted from 0. The table of labels may be a
    bare parameter instead of an ``nn.Embedding``'s.
    """
    blocks = [int(match[1]) for name in names if (match := re.match(r"blocks\.(\d{1,6})\.", name))]
    later = [(name, match) for name in names if (match := re.match(r"decoder_blocks\.(\d{1,6})\.", name))]
    renamed = {name: f"blocks.{1 + max(blocks) + int(match[1])}.{name[match.end() :]}" for name, match in later if blocks}
    if _LABELS not in names and (bare := _LABELS.removesuffix(".weight")) in names:
        renamed[bare] = _LABELS
    return renamed


META = Layout(
    name="Meta DiT",
    markers=("x_embedder.proj.weight", "blocks.0.attn.qkv.weight"),
    block="blocks.{i}.",
    entries=(
        Entry("patch_embed/kernel", ("x_embedder.proj.weight",), PATCH_OIHW),
        Entry("patch_embed/bias", ("x_embedder.proj.bias",)),
        *torch_linear("time_fc1", "t_embedder.mlp.0"),
        *torch_linear("time_fc2", "t_embedder.mlp.2"),
        Entry("label_embed/embedding", (_LABELS,)),
        *torch_linear("blocks/adaLN", "blocks.{i}.adaLN_modulation.1"),
        *torch_linear("blocks/qkv", "blocks.{i}.attn.qkv"),
        *torch_linear("blocks/proj", "blocks.{i}.attn.proj"),
        *torch_linear("blocks/fc1", "blocks.{i}.mlp.fc1"),
        *torch_linear("blocks/fc2", "blocks.{i}.mlp.fc2"),
        *torch_linear("final_adaLN", "final_layer.adaLN_modulation.1"),
        *torch_linear("final", "final_layer.linear"),
    ),
    sizes={
        "hidden": ("x_embedder.proj.weight", 0),
        "channels": ("x_embedder.proj.weight", 1),
        "patch": ("x_embedder.proj.weight", 2),
        "rows": (_LABELS, 0),
        "mlp": ("blocks.0.mlp.fc1.weight", 0),
        "frequencies": ("t_embedder.mlp.0.weight", 1),
        "outputs": ("final_layer.linear.weight", 0),
        "tokens": ("pos_embed", 1),
    },
    pos_embed="pos_embed",
    is_shared=True,
    ignored=(r"projectors\..*",),
    renamed=_renamed,
    told=_told_by_content,
)
