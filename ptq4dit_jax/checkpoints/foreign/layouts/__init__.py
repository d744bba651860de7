"""Layouts of foreign DiT checkpoints, each a table from their names to ours."""

from ptq4dit_jax.checkpoints.foreign.layouts.diffuse_nnx import (
    DIFFUSE_NNX,
    DIFFUSE_NNX_DDT,
    DIFFUSE_NNX_LIGHTNING,
    DIFFUSE_NNX_PLAINER,
)
from ptq4dit_jax.checkpoints.foreign.layouts.diffusers import DIFFUSERS
from ptq4dit_jax.checkpoints.foreign.layouts.flows import IMEANFLOW, JAX_SIT, MEANFLOW, SHORTCUT
from ptq4dit_jax.checkpoints.foreign.layouts.jax_trees import JAX_DIT, KVFRANS
from ptq4dit_jax.checkpoints.foreign.layouts.lightning import LIGHTNING
from ptq4dit_jax.checkpoints.foreign.layouts.meta import META
from ptq4dit_jax.checkpoints.foreign.layouts.table import Entry, Layout, View

__all__ = ["DIFFUSERS", "LAYOUTS", "LIGHTNING", "META", "Entry", "Layout", "View"]

#: In the order in which they are tried.
LAYOUTS = (
    LIGHTNING,
    META,
    DIFFUSERS,
    KVFRANS,
    JAX_DIT,
    JAX_SIT,
    SHORTCUT,
    MEANFLOW,
    DIFFUSE_NNX,
    DIFFUSE_NNX_LIGHTNING,
    DIFFUSE_NNX_PLAINER,
    DIFFUSE_NNX_DDT,
    IMEANFLOW,
)
