"""Checkpoints that others write: readers that run no code from a file, importers and exporters of DiT weights, VAEs."""

from ptq4dit_jax.checkpoints.foreign.diffusers_vae import load_vae
from ptq4dit_jax.checkpoints.foreign.exporter import export_meta
from ptq4dit_jax.checkpoints.foreign.importer import Imported, import_checkpoint
from ptq4dit_jax.checkpoints.foreign.tensors import Tensor, TensorFile, is_foreign, open_tensors

__all__ = ["Imported", "Tensor", "TensorFile", "export_meta", "import_checkpoint", "is_foreign", "load_vae", "open_tensors"]
