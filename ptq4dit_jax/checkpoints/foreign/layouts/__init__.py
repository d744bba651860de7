"""Layouts of foreign DiT checkpoints, each a table from their names to ours."""

from ptq4dit_jax.checkpoints.foreign.layouts.diffusers import DIFFUSERS
from ptq4dit_jax.checkpoints.foreign.layouts.jax_trees import DIFFUSE_NNX, JAX_DIT, KVFRANS, OTHERS
from ptq4dit_jax.checkpoints.foreign.layouts.meta import META
from ptq4dit_jax.checkpoints.foreign.layouts.table import Entry, Layout, Objective, View

__all__ = ["DIFFUSERS", "DIFFUSE_NNX", "JAX_DIT", "KVFRANS", "LAYOUTS", "META", "Entry", "Layout", "Objective", "View"]

#: In the order in which they are looked for.
LAYOUTS = (META, DIFFUSERS, KVFRANS, JAX_DIT, DIFFUSE_NNX, *OTHERS)
