"""willisma/diffuse_nnx: a DiT and a LightningDiT in Flax's nnx, both trained as flows by its SiT interface."""

from __future__ import annotations

import functools

import numpy as np

from ptq4dit_jax.checkpoints.foreign.layouts.lightning import check_rotation, norm_gains
from ptq4dit_jax.checkpoints.foreign.layouts.table import (
    PATCH_HWIO,
    Entry,
    Layout,
    Transform,
    flax_attention,
    flax_linear,
)
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.networks.lightning_dit import LightningDiTConfig
from ptq4dit_jax.schedules import FlowSchedule


def _sines_last(kernel: np.ndarray, config: DiTConfig) -> np.ndarray:
    """Swaps rows (frequency_size, D) so that cosines come first: with random frequencies the network's input has sines
    first."""
    return np.roll(kernel, config.frequency_size // 2, axis=0) if config.frequencies else kernel


_BLOCK = "network.blocks.{i}."
_TIME = "network.t_embedder.mlp.layers."
_BASIS = "network.t_embedder.gaussian_basis"
_POSITIONS = "network.x_embedder.pe"
_COUNTERS = r".*\.rngs\..*"

#: What the networks share: everything except attention, MLPs and norms.
_ENTRIES = (
    *flax_linear("patch_embed", "network.x_proj", kernel=PATCH_HWIO),
    *flax_linear("time_fc1", _TIME + "0", kernel=Transform(_sines_last, _sines_last)),
    *flax_linear("time_fc2", _TIME + "2"),
    Entry("label_embed/embedding", ("network.y_embedder.embedding_table.embedding",)),
    *flax_linear("blocks/adaLN", _BLOCK + "adaLN_mod.layers.1"),
    *flax_linear("final_adaLN", "network.final_layer.adaLN_mod.layers.1"),
    *flax_linear("final", "network.final_layer.linear"),
)
_SIZES = {
    "hidden": ("network.x_proj.kernel", 3),
    "channels": ("network.x_proj.kernel", 2),
    "patch": ("network.x_proj.kernel", 0),
    "rows": ("network.y_embedder.embedding_table.embedding", 0),
    "frequencies": (_TIME + "0.kernel", 0),
    "outputs": ("network.final_layer.linear.kernel", 1),
    "tokens": (_POSITIONS, 1),
}

DIFFUSE_NNX = Layout(
    name="willisma/diffuse_nnx",
    markers=("network.blocks.0.attn.query.kernel",),
    block=_BLOCK,
    entries=(
        *_ENTRIES,
        *flax_attention(_BLOCK + "attn"),
        *flax_linear("blocks/fc1", _BLOCK + "mlp.linear1"),
        *flax_linear("blocks/fc2", _BLOCK + "mlp.linear2"),
    ),
    sizes={
        **_SIZES,
        "mlp": ("network.blocks.0.mlp.linear1.kernel", 1),
        "heads": ("network.blocks.0.attn.query.kernel", 1),
    },
    pos_embed=_POSITIONS,
    time_basis=_BASIS,
    ignored=(_COUNTERS,),
    schedule=FlowSchedule(data_time=0),
)

_QKV = "network.blocks.0.attn.to_qkv.kernel"
_COSINES = "network.feat_rope.freqs_cos"
#: The one norm of queries and keys; nnx stores an object with two names under the first.
_HEAD_GAIN = _BLOCK + "attn.k_norm.rms_weight"

DIFFUSE_NNX_LIGHTNING = Layout(
    name="willisma/diffuse_nnx LightningDiT",
    markers=(_QKV, "network.blocks.0.mlp.linear12.kernel", "network.blocks.0.norm1.rms_weight", _COSINES),
    block=_BLOCK,
    entries=(
        *_ENTRIES,
        *flax_linear("blocks/qkv", _BLOCK + "attn.to_qkv"),
        *flax_linear("blocks/proj", _BLOCK + "attn.out"),
        *flax_linear("blocks/fc1", _BLOCK + "mlp.linear12"),
        *flax_linear("blocks/fc2", _BLOCK + "mlp.linear3"),
        *(Entry(f"blocks/{side}_norm", (_HEAD_GAIN,), optional=True) for side in "qk"),
    ),
    gains=norm_gains(_BLOCK + "norm1.rms_weight", _BLOCK + "norm2.rms_weight", "network.final_layer.norm.rms_weight"),
    sizes={
        **_SIZES,
        "mlp": ("network.blocks.0.mlp.linear12.kernel", 1),
        "head_width": (_COSINES, 1),
        "modulated": ("network.blocks.0.adaLN_mod.layers.1.kernel", 1),
        "head gain": (_HEAD_GAIN.replace("{i}", "0"), 0),
    },
    pos_embed=_POSITIONS,
    time_basis=_BASIS,
    ignored=(_COUNTERS, r"network\.feat_rope\.freqs_(cos|sin)"),
    schedule=FlowSchedule(data_time=0),
    network=LightningDiTConfig,
    is_on=("use_rope", "swiglu", "rms_norm"),
    family="lightningdit",
    check=functools.partial(check_rotation, prefix="network."),
)

# Listed so that error messages can name them.
DIFFUSE_NNX_PLAINER = Layout(
    name="willisma/diffuse_nnx LightningDiT", markers=(_QKV,), differs="without SwiGLU, its RMS norms or its rotation"
)
DIFFUSE_NNX_DDT = Layout(
    name="willisma/diffuse_nnx LightningDDT",
    markers=("network.enc_blocks.0.attn.to_qkv.kernel",),
    differs="an encoder of conditions besides the blocks",
)
