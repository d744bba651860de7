"""The journal on its own."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import tiny_model

import ptq4dit_jax as ptq
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.hashing import source_hash
from ptq4dit_jax.quantization import journals
from ptq4dit_jax.reconstruction import Journal, forget_journal
from ptq4dit_jax.reconstruction.resume import journal_beside, remove_journal

RUN, LIKE = {"weights": "abc", "settings": {"steps": 4}}, {"codes": np.zeros((2, 3), np.int8), "scale": np.zeros(2)}
ROOT = Path(__file__).parents[2]


def result(position):
    return {"codes": np.full((2, 3), position, np.int8), "scale": np.full(2, position / 3)}


def begun(folder, run=RUN, units=3):
    """A run that has finished ``units`` units and was interrupted in the next one, before its iteration 500."""
    with Journal(folder, run) as journal:
        for position in range(units):
            journal.finish(position, result(position))
        journal.save_current(units, result(units), 500)
    return folder


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_the_state_of_a_unit_that_was_finished_is_not_taken_for_the_next_ones(tmp_path):
    """As a run leaves it that dies after storing a unit's result and before deleting its state."""
    journal = Journal(tmp_path / "state", {"seed": 0})
    kept, next_unit = {"variables": np.ones((2, 3), np.float32)}, {"other": np.ones(5, np.float32)}
    journal.save_current(1, kept)
    assert journal.current(2, next_unit) is None
    found = journal.current(1, kept)
    assert found is not None
    np.testing.assert_array_equal(found["variables"], kept["variables"])


def test_what_was_stored_comes_back_in_another_run_of_the_same(tmp_path):
    begun(tmp_path / "deep/state")
    with Journal(tmp_path / "deep/state", RUN) as journal:
        assert journal.standing == ((0, 1, 2), (3, 500))
        for position in range(3):
            assert_same(journal.finished(position, LIKE), result(position))
        assert journal.finished(3, LIKE) is None
        assert_same(journal.current(3, LIKE), result(3))
    assert sorted(os.listdir(tmp_path / "deep")) == ["state"]
    assert sorted(os.listdir(tmp_path / "deep/state")) == [
        "current.npz",
        "fingerprint.json",
        "part-000.npz",
        "part-001.npz",
        "part-002.npz",
    ]


# Files that are not this unit of this run.


def swap(state, other):
    (state / "part-000.npz").rename(state / "t")
    (state / "part-002.npz").rename(state / "part-000.npz")
    (state / "t").rename(state / "part-002.npz")


def flip(state, other):
    """One bit of an array; what is not covered by a checksum of the archive is not an array."""
    content = bytearray((state / "part-001.npz").read_bytes())
    content[content.index(result(1)["codes"].tobytes())] ^= 1
    (state / "part-001.npz").write_bytes(content)


DAMAGES = {
    "swapped": (swap, "part-000.npz holds the unit at position 2"),
    "copied": (lambda s, o: shutil.copy(s / "part-000.npz", s / "part-001.npz"), "part-001.npz holds the unit at position 0"),
    "a later unit made of an earlier one": (lambda s, o: shutil.copy(s / "part-000.npz", s / "part-007.npz"), "position 0"),
    "a unit of another run": (lambda s, o: shutil.copy(o / "part-001.npz", s), "part-001.npz is of another run"),
    "the state of another run": (lambda s, o: shutil.copy(o / "current.npz", s), "current.npz is of another run"),
    "the other run's fingerprint": (lambda s, o: shutil.copy(o / "fingerprint.json", s), "weights (abd there, abc here)"),
    "cut": (lambda s, o: (s / "part-002.npz").write_bytes((s / "part-002.npz").read_bytes()[:-9]), "part-002.npz"),
    "empty": (lambda s, o: (s / "current.npz").write_bytes(b""), "current.npz"),
    "of an older version": (lambda s, o: np.savez(s / "part-000.npz", **result(0)), "part-000.npz is damaged"),
    "no archive": (lambda s, o: (s / "part-000.npz").write_bytes(b"\x93NUMPY junk"), "part-000.npz"),
    "no fingerprint": (lambda s, o: (s / "fingerprint.json").unlink(), "lost its fingerprint.json"),
    "half a fingerprint": (lambda s, o: (s / "fingerprint.json").write_text('{"form'), "fingerprint.json is not valid JSON"),
    "a list": (lambda s, o: (s / "fingerprint.json").write_text("[1]"), "fingerprint.json is damaged"),
    "an older fingerprint": (lambda s, o: (s / "fingerprint.json").write_text('{"weights": "abc"}'), "another version"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_of_this_run_is_refused_at_the_start_and_fresh_begins_anew(damage, tmp_path, raises_sentence):
    state, other = begun(tmp_path / "state"), begun(tmp_path / "other", {**RUN, "weights": "abd"})
    act, words = DAMAGES[damage]
    act(state, other)
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    with raises_sentence(str(state), words, "--fresh"):
        Journal(state, RUN)
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before
    with Journal(state, RUN, fresh=True) as journal:
        assert journal.standing == ((), None)
        assert journal.finished(0, LIKE) is None
    assert os.listdir(state) == ["fingerprint.json"]


def test_a_flipped_bit_is_noticed(tmp_path, raises_sentence):
    flip(begun(tmp_path / "state"), None)
    with Journal(tmp_path / "state", RUN) as journal, raises_sentence("part-001.npz", "damaged", "--fresh"):
        journal.finished(1, LIKE)


@pytest.mark.parametrize("like", [{"codes": np.zeros((2, 4), np.int8)}, {"codes": np.zeros((2, 3))}, {"bits": np.zeros(2)}])
def test_arrays_of_another_shape_type_or_name_are_refused(like, tmp_path, raises_sentence):
    with Journal(begun(tmp_path / "state"), RUN) as journal:
        for read in (lambda: journal.finished(1, like), lambda: journal.current(3, like)):
            with raises_sentence("is damaged", "--fresh"):
                read()


# What else may lie there.


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("inside", ["thesis.tex", "fingerprint.json", "part-1.npz", "current.npz.bak"])
def test_nothing_that_is_no_journal_is_touched(inside, fresh, tmp_path, raises_sentence):
    (tmp_path / "state/sub").mkdir(parents=True)
    (tmp_path / "state" / inside).write_text('{"format": "mine"}')
    with raises_sentence("should hold a reconstruction's state", "fingerprint.json"):
        Journal(tmp_path / "state", RUN, fresh=fresh)
    (tmp_path / "file").write_text("mine")
    with raises_sentence(str(tmp_path / "file")):
        Journal(tmp_path / "file", RUN, fresh=fresh)
    assert not forget_journal(tmp_path / "state")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == sorted(
        ["file", "state", f"state/{inside}", "state/sub"]
    )


def test_fresh_leaves_what_else_lies_in_a_journal(tmp_path):
    state = begun(tmp_path / "state")
    (state / "notes.txt").write_text("mine")
    (state / "plots").mkdir()
    Journal(state, RUN, fresh=True).close()
    assert sorted(os.listdir(state)) == ["fingerprint.json", "notes.txt", "plots"]
    assert remove_journal(state)
    assert sorted(os.listdir(state)) == ["notes.txt", "plots"]


def test_an_empty_folder_becomes_a_journal(tmp_path):
    (tmp_path / "state").mkdir()
    begun(tmp_path / "state")
    assert Journal(tmp_path / "state", RUN).standing.finished == (0, 1, 2)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_journal_is_followed_and_stays(there, tmp_path):
    if there:
        (tmp_path / "scratch/large").mkdir(parents=True)
    (tmp_path / "state").symlink_to(tmp_path / "scratch/large")
    begun(tmp_path / "state")
    assert Journal(tmp_path / "state", RUN).standing == ((0, 1, 2), (3, 500))
    Journal(tmp_path / "state", {**RUN, "weights": "x"}, fresh=True).close()
    begun(tmp_path / "state", {**RUN, "weights": "x"})
    assert forget_journal(tmp_path / "state")
    assert (tmp_path / "state").is_symlink()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    begun(tmp_path / "state")


def test_what_a_killed_run_was_writing_goes_when_the_run_goes_on(tmp_path):
    state = begun(tmp_path / "state")
    (state / ".part-003.npz.0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / ".state.0123456789ab.tmp").mkdir()
    Journal(state, RUN).close()
    assert os.listdir(tmp_path) == ["state"]
    assert len(os.listdir(state)) == 5


def test_a_journal_that_somebody_removes_is_made_anew(tmp_path):
    with Journal(tmp_path / "state", RUN) as journal:
        journal.finish(0, result(0))
        shutil.rmtree(tmp_path / "state")
        journal.finish(1, result(1))
    with Journal(tmp_path / "state", RUN) as journal:
        assert journal.standing == ((1,), None)
        assert_same(journal.finished(1, LIKE), result(1))


def test_a_place_on_which_something_is_mounted_is_emptied(tmp_path, monkeypatch):
    state, rename = begun(tmp_path / "state"), Path.rename

    def busy(self, target):
        if self == state:
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    monkeypatch.setattr(Path, "rmdir", lambda self: busy(self, None))
    assert forget_journal(state)
    assert os.listdir(state) == []


# Others at the same time, and kills.

HOLDER = """
import sys, time
from pathlib import Path
from ptq4dit_jax.reconstruction import Journal
journal = Journal(Path(sys.argv[1]), {"weights": "abc", "settings": {"steps": 4}})
print("holds it", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_one_process_at_a_time(tmp_path, raises_sentence):
    state = begun(tmp_path / "state")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(state)], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds it\n"
        for fresh in (False, True):
            with raises_sentence("Another run is writing", str(state)):
                Journal(state, RUN, fresh=fresh)
        assert len(os.listdir(state)) == 5
    finally:
        holder.kill()
        holder.wait()
    assert Journal(state, RUN).standing.finished == (0, 1, 2)
    assert os.listdir(tmp_path) == ["state"]


KILLED = """
import json, os, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from kill_helpers import at_every_step
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.reconstruction.resume import Journal, remove_journal
import numpy as np
place, RUN = Path(sys.argv[1]), {"weights": "abc"}

def prepare(step):
    journal = Journal(place / str(step) / "state", RUN)
    for position in range(3):
        journal.finish(position, {"a": np.full(3, position)})

def act(step):
    folder = place / str(step) / "state"
    remove_journal(folder)
    Journal(folder, RUN).finish(0, {"a": np.zeros(3)})

def look(step):
    folder = place / str(step) / "state"
    try:
        found = len(Journal(folder, RUN).standing.finished)
    except Ptq4ditError as error:
        found = str(error)
    Journal(folder, RUN, fresh=True).close()
    return found, sorted(p.relative_to(folder.parent).as_posix() for p in folder.parent.rglob("*"))

print(json.dumps(list(at_every_step(prepare, act, look))))
"""


@pytest.mark.slow
def test_killed_at_every_step_of_its_removal_it_goes_on_or_starts_over(tmp_path):
    paths = [str(ROOT / "tests"), str(ROOT)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), *paths], env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    assert [how for how, _ in outcomes] == ["returned"] * len(outcomes)
    assert all(left == ["state", "state/fingerprint.json"] for _, (_, left) in outcomes)
    assert {found for _, (found, _) in outcomes} == {0, 1, 3}


# What the result depends on.


def key_words(seed):
    """The numbers of a key, of which each generator has its own count."""
    return jax.random.key_data(jax.random.key(seed)).tolist()


def opened(state, model, config, key=0, rows=None):
    return journals.open_journal(config, model, lambda: source_hash(model.params), jax.random.key(key), rows, state, False)


CONFIG = ptq.QuantConfig.of(calib_steps=2, calib_rows=4, steps=4, reconstruction=Reconstruction(iterations=5))


def test_the_same_run_goes_on(tmp_path):
    opened(tmp_path / "s", tiny_model(), CONFIG).close()
    opened(tmp_path / "s", tiny_model(), CONFIG).close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("heads", "network.config.num_heads"),
        ("epsilon", "network.config.mlp_norm_eps"),
        ("schedule", "network.schedule.num_timesteps"),
        ("objective", "network.schedule.data_time"),
        ("weights", "weights ("),
        ("type", "weights ("),
        ("key", f"key ({key_words(0)} there, {key_words(3)} here)"),
        ("settings", "settings.calib_rows (4 there, 6 here)"),
        ("rows", "calibration rows"),
        ("jax", "software.jax"),
        ("jaxlib", "software.jaxlib"),
        ("own version", "software.ptq4dit-jax"),
        ("device", "device.kind"),
    ],
)
def test_whatever_the_result_depends_on_makes_another_run(change, words, tmp_path, monkeypatch, raises_sentence):
    model, config = tiny_model(), CONFIG
    more: dict[str, Any] = {}
    opened(tmp_path / "s", model, config).close()
    if change in ("heads", "epsilon"):
        other = {"num_heads": 1} if change == "heads" else {"mlp_norm_eps": 1e-5}
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, **other))
    elif change == "schedule":
        model = dataclasses.replace(model, schedule=ptq.NoiseSchedule(num_timesteps=900))
    elif change == "objective":
        model = dataclasses.replace(model, schedule=ptq.FlowSchedule())
    elif change == "weights":
        model = tiny_model(seed=1)
    elif change == "type":
        model = model.astype("bfloat16")
    elif change == "key":
        more["key"] = 3
    elif change == "settings":
        config = config.replace(calib_rows=6)
    elif change == "rows":
        x = np.zeros((2, 4, *model.config.image_shape), np.float32)
        more["rows"] = ptq.calibration.CalibrationData(x=x, t=np.array([9, 5], np.int32), y=np.zeros((2, 4), np.int32))
    elif change == "device":
        monkeypatch.setattr(journals, "default", lambda: type("Device", (), {"platform": "cpu", "device_kind": "other"}))
    else:
        package = "ptq4dit-jax" if change == "own version" else change
        version = journals._version
        monkeypatch.setattr(journals, "_version", lambda name: "9.9" if name == package else version(name))
    with raises_sentence(str(tmp_path / "s"), words, "--fresh"):
        opened(tmp_path / "s", model, config, **more)


def test_a_resumed_run_says_what_it_resumes(tmp_path):
    model, told = tiny_model(), []
    assert model.config.depth == 2
    with opened(tmp_path / "s", model, CONFIG) as journal:
        journals.report_resumed(journal, model, lambda *stage: told.append(stage))
        assert told == []
        for position in range(3):
            journal.finish(position, result(position))
    with opened(tmp_path / "s", model, CONFIG) as journal:
        journals.report_resumed(journal, model, lambda *stage: told.append(stage))
        journal.save_current(3, result(3), 500)
    with opened(tmp_path / "s", model, CONFIG) as journal:
        journals.report_resumed(journal, model, lambda *stage: told.append(stage))
    assert told == [
        ("resume reconstruction", 3, 5, "units done: 3 of 5, up to block 0"),
        ("resume reconstruction", 3, 5, "units done: 3 of 5, up to block 0; block 1 goes on from iteration 500"),
    ]


@pytest.mark.parametrize(
    ("out", "beside"), [("q", ".q.reconstruction"), (".", ".here.reconstruction"), ("link", ".q.reconstruction")]
)
def test_the_commands_journal_lies_beside_its_output(out, beside, tmp_path, monkeypatch):
    (tmp_path / "here/q").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    Path("link").symlink_to("q")
    folder = tmp_path / ("" if out == "." else "here") / beside
    assert journal_beside(Path(out)) == folder


def test_a_name_that_is_too_long_for_a_journal_is_refused(tmp_path, raises_sentence):
    state = journal_beside(tmp_path / ("x" * 230))
    with raises_sentence("name too long"):
        Journal(state, RUN)
    assert os.listdir(tmp_path) == []
