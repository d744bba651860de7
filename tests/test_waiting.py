"""Waiting for devices: what comes back, and that a KeyboardInterrupt comes through."""

import _thread
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq4dit_jax.waiting import ready


def test_the_tree_comes_back_computed():
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda i, x: x @ x / 64, x))
    tree = {"a": slow(jnp.ones((64, 64))), "b": [np.ones(2), 3.0, None]}
    found = ready(tree)
    assert found is tree
    assert found["a"].is_ready()
    np.testing.assert_allclose(found["a"], 1.0)


def test_traced_arrays_pass():
    assert jax.jit(lambda x: ready(x) + 1)(1) == 2


@pytest.fixture
def python_handles_sigint():
    """Whatever the process was told to ignore, as one in the background is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_sigint")
def test_a_keyboard_interrupt_comes_through():
    class Slow:
        asked, end = 0, time.monotonic() + 30

        def is_ready(self):
            self.asked += 1
            if self.asked == 3:
                threading.Timer(0.1, _thread.interrupt_main).start()
            return time.monotonic() > self.end

    waited_for = Slow()
    with pytest.raises(KeyboardInterrupt):
        ready([waited_for])
    assert waited_for.asked > 3
