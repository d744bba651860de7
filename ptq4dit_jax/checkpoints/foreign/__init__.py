"""Checkpoints of other code bases: readers that run no code from a file, import and export of DiT weights, VAEs."""

from ptq4dit_jax.checkpoints.foreign.exporter import export_meta
from ptq4dit_jax.checkpoints.foreign.importer import Imported, import_checkpoint
from ptq4dit_jax.checkpoints.foreign.kinds import KNOWN
from ptq4dit_jax.checkpoints.foreign.locate import NothingFound
from ptq4dit_jax.checkpoints.foreign.remote import local_copy
from ptq4dit_jax.checkpoints.foreign.tensors import Tensor, TensorFile, find_tensors, is_foreign, open_tensors
from ptq4dit_jax.checkpoints.foreign.vaes import ImportedVAE, import_vae, load_vae

__all__ = [
    "KNOWN",
    "Imported",
    "ImportedVAE",
    "NothingFound",
    "Tensor",
    "TensorFile",
    "export_meta",
    "find_tensors",
    "import_checkpoint",
    "import_vae",
    "is_foreign",
    "load_vae",
    "local_copy",
    "open_tensors",
]
