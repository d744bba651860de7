"""Killing a process at every step that it takes on the disk. For scripts of their own, as it forks and threads die of it."""

import os
import pickle
import signal
import sys

#: What Python reports of changes to the names in folders.
STEPS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def in_child(act):
    """What ``act`` returns or raises in a forked process, or the signal that ended it."""
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                said = ("returned", act())
            except BaseException as error:
                said = ("raised", f"{type(error).__name__}: {error}")
            os.write(w, pickle.dumps(said))
        finally:
            os._exit(0)
    os.close(w)
    with os.fdopen(r, "rb") as pipe:
        content = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return pickle.loads(content) if content else ("killed", os.WTERMSIG(status))


def killed_at(step, act):
    """``act`` in a process that is killed before its ``step``-th change, from 0; tells whether it came so far."""

    def dying():
        done = 0

        def hook(event, _):
            nonlocal done
            if event in STEPS:
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

        sys.addaudithook(hook)
        return act()

    outcome = in_child(dying)
    assert outcome == ("killed", signal.SIGKILL) or outcome[0] == "returned", outcome
    return outcome[0] == "killed"


def at_every_step(prepare, act, look, most=500):
    """For each step: ``prepare(step)`` and then ``act(step)`` in processes of their own, the latter killed; yields
    ``look(step)`` of another one."""
    for step in range(most):
        made = in_child(lambda step=step: prepare(step))
        assert made[0] == "returned", made
        if not killed_at(step, lambda step=step: act(step)):
            return
        yield in_child(lambda step=step: look(step))
    raise AssertionError(f"still not done after {most} steps")
