"""Saving that is killed, disturbed or raced at any moment: the old model or the new one, and nothing left behind."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_helpers import META, assert_refused, assert_same, edit_config, example_arrays, seal

from ptq4dit_jax.checkpoints import orbax_arrays, store
from ptq4dit_jax.errors import Ptq4ditError

NEW = {"x": np.arange(5, dtype=np.int16)}
ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, sys
import numpy as np
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from kill_helpers import at_every_step
from ptq4dit_jax.checkpoints import store
place, kind = Path(sys.argv[1]), sys.argv[2]
OLD = {"none": np.zeros((2, 0))} if kind == "empty arrays" else {"a": np.zeros(3), "b": np.ones((2, 2))}

def prepare(step):
    folder = place / str(step) / "m"
    if kind == "absent":
        folder.parent.mkdir()
        return
    store.write(folder, OLD, {"kind": "old"})
    (folder / "card.md").write_text("a card")
    if kind == "version 1":
        config = json.loads((folder / "config.json").read_text())
        del config["config_sha256"]
        (folder / "config.json").write_text(json.dumps(config | {"version": 1}))

def act(step):
    store.write(place / str(step) / "m", {"a": np.ones(3)}, {"kind": "new"}, overwrite=True)

def model(folder):
    if kind == "absent" and not folder.exists():
        return "old"
    arrays, meta = store.read(folder)
    wanted = {"a": np.ones(3)} if meta["kind"] == "new" else OLD
    assert arrays.keys() == wanted.keys() and all(np.array_equal(arrays[k], wanted[k]) for k in wanted), arrays
    return meta["kind"]

def look(step):
    folder = place / str(step) / "m"
    killed = model(folder)
    act(step)
    assert model(folder) == "new"
    return killed, sorted(p.relative_to(folder.parent).as_posix() for p in (*folder.parent.iterdir(), *folder.iterdir()))

print(json.dumps(list(at_every_step(prepare, act, look))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["version 2", "version 1", "empty arrays", "absent"])
def test_killed_at_every_step_it_is_the_old_model_or_the_new_one_and_the_next_run_tidies_up(kind, tmp_path):
    paths = [str(ROOT / "tests"), str(ROOT)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), kind, *paths],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    whole = ["m", "m/arrays", *(["m/card.md"] if kind != "absent" else []), "m/config.json"]
    kinds = []
    for how, what in outcomes:
        assert how == "returned", what
        killed, left = what
        assert left == whole
        kinds.append(killed)
    assert kinds == sorted(kinds, reverse=True), "first the old one, from one step on the new one"
    assert set(kinds) == {"old", "new"}


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("existing", [True, False])
def test_a_disk_that_is_full_when_it_is_flushed_costs_nothing(existing, tmp_path, monkeypatch):
    if existing:
        store.write(tmp_path / "m", example_arrays(), META)
    before, fsync, failures = listing(tmp_path), os.fsync, []
    for number in range(1, 100):
        calls: list[int] = []

        def failing(opened, number=number, calls=calls):
            if not os.path.isdir(f"/proc/self/fd/{opened}"):
                calls.append(opened)
                if len(calls) == number:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return fsync(opened)

        monkeypatch.setattr(os, "fsync", failing)
        try:
            store.write(tmp_path / "m", NEW, META, overwrite=existing)
        except Ptq4ditError as error:
            failures.append(str(error))
        else:
            break
        assert listing(tmp_path) == before
    monkeypatch.undo()
    assert len(failures) > 4
    assert all("No space left on device" in message for message in failures)
    assert_same(store.read(tmp_path / "m")[0], NEW)


@pytest.mark.parametrize("how", ["killed before the new config", "killed after it", "killed after the old arrays had gone"])
def test_a_broken_off_exchange_is_read_and_the_next_one_ends_it(how, saved, tmp_path):
    """The three states that a kill can leave, laid out by hand."""
    new = store.write(tmp_path / "new", NEW, META)
    digits = json.loads((new / "config.json").read_text())["config_sha256"][:16]
    (new / "arrays").rename(saved / f"arrays-{digits}")
    if how != "killed before the new config":
        (new / "config.json").replace(saved / "config.json")
    if how == "killed after the old arrays had gone":
        (saved / "arrays").rename(tmp_path / "gone")
    assert_same(store.read(saved)[0], example_arrays() if "before" in how else NEW)
    store.write(saved, {"y": np.ones(2)}, META, overwrite=True)
    assert sorted(os.listdir(saved)) == ["arrays", "config.json"]
    assert_same(store.read(saved)[0], {"y": np.ones(2)})


@pytest.mark.parametrize("moment", ["before the arrays are read", "after"])
def test_a_model_that_is_exchanged_while_it_is_read_is_read_anew(moment, saved, monkeypatch):
    restore, calls = orbax_arrays.restore, []

    def raced(folder):
        calls.append(folder)
        if len(calls) == 1 and moment == "before the arrays are read":
            store.write(saved, NEW, META, overwrite=True)
        arrays = restore(folder)
        if len(calls) == 1 and moment == "after":
            store.write(saved, NEW, META, overwrite=True)
        return arrays

    monkeypatch.setattr(orbax_arrays, "restore", raced)
    arrays, _ = store.read(saved)
    assert_same(arrays, NEW if moment != "after" else example_arrays())
    assert len(calls) == (2 if moment != "after" else 1)


def test_a_damaged_model_is_read_once(saved, monkeypatch):
    (saved / "arrays").rename(saved / "gone")
    calls, read_config = [], store.read_config

    def noted(path):
        calls.append(path)
        return read_config(path)

    monkeypatch.setattr(store, "read_config", noted)
    assert_refused(saved, "is missing")
    assert len(calls) == 1


def test_a_model_that_changes_all_the_time_ends_in_a_sentence(saved, monkeypatch):
    def changing(folder):
        config = json.loads((saved / "config.json").read_text())
        (saved / "other").write_text(json.dumps(config))
        (saved / "other").replace(saved / "config.json")
        raise OSError("gone")

    monkeypatch.setattr(orbax_arrays, "restore", changing)
    assert_refused(saved, "changes faster than it can be read")


@pytest.mark.slow
def test_reading_while_another_process_overwrites(tmp_path):
    code = """
import sys, numpy as np
from ptq4dit_jax.checkpoints import store
i = 0
while True:
    store.write(sys.argv[1], {"a": np.full(1000, i)}, {"kind": "test", "i": i}, overwrite=True)
    if i == 0:
        print("ready", flush=True)
    i += 1
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "m")], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        seen: set[int] = set()
        while len(seen) < 15:
            arrays, meta = store.read(tmp_path / "m")
            assert set(arrays["a"]) == {meta["i"]}
            seen.add(meta["i"])
    finally:
        writer.kill()
        writer.wait()
    store.write(tmp_path / "m", NEW, META, overwrite=True)
    assert os.listdir(tmp_path) == ["m"]


# What is at the place in the end.


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["model", "thesis"])
def test_what_came_to_the_place_meanwhile_is_asked_for(kind, overwrite, tmp_path, monkeypatch):
    save = orbax_arrays.save

    def slow(folder, arrays):
        save(folder, arrays)
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "config.json").write_text('{"format": "ptq4dit_jax"}' if kind == "model" else '{"format": "thesis"}')

    monkeypatch.setattr(orbax_arrays, "save", slow)
    if kind == "model" and overwrite:
        store.write(tmp_path / "m", NEW, META, overwrite=True)
        assert_same(store.read(tmp_path / "m")[0], NEW)
        return
    with pytest.raises(Ptq4ditError, match="exists already" if not overwrite else "something else"):
        store.write(tmp_path / "m", NEW, META, overwrite=overwrite)
    assert sorted(listing(tmp_path)) == ["m", "m/config.json"]


def test_what_cannot_be_read_is_not_published(saved, monkeypatch):
    """As with a folder whose name makes TensorStore write elsewhere."""
    before, describe = listing(saved.parent), orbax_arrays.describe
    monkeypatch.setattr(orbax_arrays, "describe", lambda folder: {**describe(folder), "x": ((7,), np.dtype("int16"))})
    with pytest.raises(Ptq4ditError, match="cannot be read"):
        store.write(saved, NEW, META, overwrite=True)
    assert listing(saved.parent) == before


@pytest.mark.parametrize("depth", [10, 50, 62, 63, 300, 900, 980, 1000, 5000, 100_000])
def test_a_description_of_any_depth_is_refused_or_can_be_read(depth, tmp_path):
    deep: list[Any] = []
    for _ in range(depth):
        deep = [deep]
    try:
        store.write(tmp_path / "m", NEW, META | {"provenance": {"deep": deep}})
    except Ptq4ditError as error:
        refusal = str(error)
    else:
        assert_same(store.read(tmp_path / "m")[0], NEW)
        return
    assert "JSON" in refusal
    assert depth > 60
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["back\\slash/m", "m\\", "not UTF-8 \udcff"])
def test_paths_that_no_model_can_be_read_from(name, tmp_path):
    for use in (lambda: store.write(tmp_path / name, NEW, META), lambda: store.read(tmp_path / name)):
        with pytest.raises(Ptq4ditError, match="not a usable path"):
            use()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a b ", "new\nline", "100%25", "ä" * 118, "x" * 237, "-m", "*?[x]", ".m"])
def test_odd_names_hold_models(name, tmp_path):
    for _ in range(2):
        store.write(tmp_path / name, NEW, META, overwrite=True)
        assert_same(store.read(tmp_path / name)[0], NEW)
    assert os.listdir(tmp_path) == [name]


# The hash over config.json.


def test_the_hash_of_config_is_sha256_over_its_shortest_sorted_json(saved):
    config = json.loads((saved / "config.json").read_text())
    found = config.pop("config_sha256")
    shortest = json.dumps(config, sort_keys=True, separators=(",", ":"))
    assert "ä" not in shortest
    assert found == hashlib.sha256(shortest.encode("ascii")).hexdigest()


def leaves(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))] if items else [path]


def test_every_field_of_config_is_under_its_hash(saved):
    text = (saved / "config.json").read_text()
    paths = leaves(json.loads(text))
    assert len(paths) > 40
    for path in paths:
        config = inner = json.loads(text)
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = 7 if inner[path[-1]] != 7 else 8
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(Ptq4ditError):
            store.read(saved)
    changes: tuple[dict[str, Any], ...] = ({"new": 1}, {"kind": "tesx"}, {"provenance": {}}, {"config_sha256": None})
    for more in changes:
        (saved / "config.json").write_text(json.dumps(json.loads(text) | more))
        assert_refused(saved, "config.json", "hash")
    (saved / "config.json").write_text(json.dumps(json.loads(text) | {"title": float("nan")}))
    assert_refused(saved, "config.json", "NaN")


def test_another_spelling_of_the_same_is_the_same(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(
        json.dumps(dict(reversed(config.items())), indent=7, ensure_ascii=False), encoding="utf-8"
    )
    assert_same(store.read(saved)[0], example_arrays())


def test_folders_of_version_1_are_read_and_have_no_such_hash(saved):
    edit_config(saved, version=1, title="edited by hand")
    config = json.loads((saved / "config.json").read_text())
    del config["config_sha256"]
    (saved / "config.json").write_text(json.dumps(config))
    arrays, meta = store.read(saved)
    assert_same(arrays, example_arrays())
    assert meta["title"] == "edited by hand"
    seal(saved, config | {"version": 2})
    assert store.read(saved)[1]["title"] == "edited by hand"
