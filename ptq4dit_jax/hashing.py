"""Hashes of what arrays hold: what tells one model from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util


def content_hash(arrays: Mapping[str, np.ndarray | jax.Array]) -> str:
    """SHA-256 (hexadecimal) over the name, dtype, shape and bytes of every array, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = native(arrays[name])
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        # Arrays of ml_dtypes have no buffer of their own; their bytes do.
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def source_hash(params: Mapping[str, Any]) -> str:
    """The content hash of a model's parameters, flat or nested: what a model folder records as ``content_sha256``."""
    return content_hash(flatten(params))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested parameters as a flat dict with names joined by ``/``; a flat dict stays as it is."""
    return traverse_util.flatten_dict(dict(params), sep="/")


def native(array: np.ndarray | jax.Array) -> np.ndarray:
    """The array on the host, in the host's order of bytes."""
    host = np.asarray(array)
    return host.astype(host.dtype.newbyteorder("="), copy=False)
