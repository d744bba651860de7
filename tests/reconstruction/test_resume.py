"""The journal on its own."""

import numpy as np

from ptq4dit_jax.reconstruction import Journal


def test_the_state_of_a_part_that_was_finished_is_not_taken_for_the_next_ones(tmp_path):
    """As a run leaves it that dies after storing a part's result and before deleting its state."""
    journal = Journal(tmp_path / "state", {"seed": 0})
    kept, next_part = {"variables": np.ones((2, 3), np.float32)}, {"other": np.ones(5, np.float32)}
    journal.save_current(1, kept)
    assert journal.current(2, next_part) is None
    np.testing.assert_array_equal(journal.current(1, kept)["variables"], kept["variables"])
