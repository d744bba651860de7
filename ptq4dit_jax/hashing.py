"""Hashes of the contents of arrays, which tell one model from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util


def content_hash(arrays: Mapping[str, np.ndarray | jax.Array]) -> str:
    """Returns the SHA-256 (hexadecimal) of the name, dtype, shape and bytes of every array, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = native(arrays[name])
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        # Arrays of ml_dtypes have no buffer, but views of their bytes do.
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def source_hash(params: Mapping[str, Any]) -> str:
    """Returns the content hash of a model's parameters, flat or nested; a model folder records it as ``content_sha256``."""
    return content_hash(flatten(params))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested parameters as a flat dict with names joined by ``/``; a flat dict is unchanged."""
    return traverse_util.flatten_dict(dict(params), sep="/")


def native(array: np.ndarray | jax.Array) -> np.ndarray:
    """Returns the array on the host, in the host's byte order."""
    host = np.asarray(array)
    return host.astype(host.dtype.newbyteorder("="), copy=False)
