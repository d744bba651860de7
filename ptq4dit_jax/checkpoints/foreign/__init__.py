"""Checkpoints that others write: readers that run no code from a file, importers and exporters of DiT weights."""
