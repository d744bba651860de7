"""A saved folder; tests of one kind of model have their own."""

from pathlib import Path

import pytest
from store_helpers import META, example_arrays

from ptq4dit_jax.checkpoints import store


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of arrays of every kind, to be written to."""
    return store.write(tmp_path / "model", example_arrays(), META)
