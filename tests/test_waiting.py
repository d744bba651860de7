"""Waiting for devices: what comes back, and that a KeyboardInterrupt comes through."""

import _thread
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptq4dit_jax.waiting import in_background, ready


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


def test_what_runs_in_the_background_is_waited_for_once_it_is_asked_for():
    go = threading.Event()
    result = in_background(lambda: go.wait(10) and "done")
    go.set()
    assert result() == "done" == result()


def test_an_error_in_the_background_is_raised_where_the_result_is_asked_for():
    result = in_background(lambda: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            result()


@pytest.mark.usefixtures("python_handles_sigint")
def test_a_keyboard_interrupt_comes_through_a_wait_for_the_background():
    result, started = in_background(lambda: time.sleep(20)), time.monotonic()
    threading.Timer(0.2, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        result()
    assert time.monotonic() - started < 10
