"""Claims, names, what dead runs leave, and files and folders that are exchanged."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from ptq4dit_jax import staging
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.staging import claim, exchange, place, publish

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from ptq4dit_jax.staging import claim, staging
target = Path(sys.argv[1])
with claim(target), staging(target) as staged:
    staged.mkdir()
    (staged / "large").write_text("half")
    print("holds it", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is making ``new/out``."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "new/out")], env=env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds it\n"
    yield process
    process.kill()
    process.wait()


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_second_process_is_told_at_once_and_disturbs_nothing(holder, tmp_path, raises_sentence):
    (tmp_path / "link").symlink_to(tmp_path / "new")
    before = names(tmp_path)
    assert len(before) == 5
    for path in (tmp_path / "new/out", tmp_path / "link/out", tmp_path / "new/../new/out"):
        with raises_sentence("Another run is writing", "new/out"), claim(path):
            pass
        with raises_sentence("Another run is writing"), staging.staging(path):
            pass
    with claim(tmp_path / "new/other"):
        assert names(tmp_path) == sorted([*before, "new/.other.ptq4dit.lock"])
    assert names(tmp_path) == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left_is_removed_by_the_next_claim_and_nothing_else_is(how, holder, tmp_path):
    mine = [
        ".out.tmp",
        ".out.0123456789ab.txt",
        ".out.0123456789AB.tmp",
        ".out.0123456789abc.tmp",
        "out.0123456789ab.tmp",
        ".outer.0123456789ab.tmp",
        ".out.ptq4dit.lock.bak",
        ".out.x.0123456789ab.tmp",
    ]
    for name in mine:
        (tmp_path / "new" / name).write_text("mine")
    holder.send_signal(how)
    holder.wait()
    assert len(names(tmp_path)) == 4 + len(mine)
    with claim(tmp_path / "new/out"):
        assert sorted(os.listdir(tmp_path / "new")) == sorted([*mine, ".out.ptq4dit.lock"])
    assert sorted(os.listdir(tmp_path / "new")) == sorted(mine)


def test_claims_lie_inside_each_other_and_leave_nothing(tmp_path):
    target = tmp_path / "a/b/out"
    with claim(target):
        for _ in range(2):
            with staging.staging(target) as staged:
                staged.write_text("x")
            with claim(target):
                assert names(tmp_path) == ["a", "a/b", "a/b/.out.ptq4dit.lock"]
    assert names(tmp_path) == []


def test_what_lies_in_a_claimed_folder_is_claimed_with_it(tmp_path):
    """So that figures may go into a report that is not there yet, or is about to be replaced."""
    with claim(tmp_path / "report"), claim(tmp_path / "report/figures/a.json"):
        assert names(tmp_path) == [".report.ptq4dit.lock"]
        with staging.staging(tmp_path / "report/figures/a.json") as staged:
            staged.write_text("x")
            publish(staged, tmp_path / "report/figures/a.json")
    assert names(tmp_path) == ["report", "report/figures", "report/figures/a.json"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_it_works_and_removes_nothing(code, tmp_path, monkeypatch):
    (tmp_path / ".out.0123456789ab.tmp").write_text("perhaps of a live run")

    def refused(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock.BaseFileLock, "acquire", refused)
    with staging.staging(tmp_path / "out") as staged:
        staged.write_text("x")
        publish(staged, tmp_path / "out")
    assert names(tmp_path) == [".out.0123456789ab.tmp", "out"]


def test_a_read_only_place_is_refused_at_once(tmp_path, monkeypatch, raises_sentence):
    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(filelock.BaseFileLock, "acquire", refused)
    with raises_sentence("Cannot write", "Read-only file system"), claim(tmp_path / "a/out"):
        pytest.fail("work began")
    assert names(tmp_path) == []


# Names.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300, "name too long"),
        ("x" * 238, "256 bytes"),
        ("ä" * 119 + ".png", "260 bytes"),
        ("/".join(["d" * 200] * 20), "path too long"),
        ("a\0b", "NUL"),
        ("lone \ud800", "not a usable path"),
        ("~nobody-by-this-name/x", "not a usable path"),
        ("/", "Nothing can be written to /"),
    ],
)
def test_names_that_no_output_can_have(name, words, tmp_path, monkeypatch, raises_sentence):
    monkeypatch.chdir(tmp_path)
    with raises_sentence(words), claim(Path(name)):
        pytest.fail("work began")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 237, "ä" * 118, " ", "a ", "new\nline", ".", "..a", "\udcff", "[a-z]*", "link"])
def test_names_that_are_long_or_odd_and_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nowhere")
    with claim(Path(name)):
        if name == ".":
            assert place(name) == tmp_path
            return
        for content in ("a", "b"):
            with staging.staging(Path(name).absolute()) as staged:
                staged.write_text(content)
                publish(staged, Path(name).absolute())
    assert Path(name).read_text() == "b"
    assert sorted(os.listdir()) == sorted({name, "link"})


# Files and folders that take the place of others.


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failed_exchange_of_folders_brings_the_old_one_back(step, error, tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/old").write_text("old")
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == step:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)

    def make():
        with staging.staging(tmp_path / "r") as staged:
            staged.mkdir()
            exchange(staged, tmp_path / "r")

    with pytest.raises((KeyboardInterrupt, Ptq4ditError)):
        make()
    assert names(tmp_path) == ["r", "r/old"]


KILLED = """
import json, os, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from kill_helpers import at_every_step
from ptq4dit_jax.staging import claim, exchange, staging
place = Path(sys.argv[1])

def prepare(step):
    (place / str(step) / "r").mkdir(parents=True)
    (place / str(step) / "r/old").write_text("old")

def act(step):
    target = place / str(step) / "r"
    with staging(target) as staged:
        staged.mkdir()
        (staged / "new").write_text("new")
        exchange(staged, target)

def look(step):
    with claim(place / str(step) / "r"):
        found = os.listdir(place / str(step) / "r")
    return found, os.listdir(place / str(step))

print(json.dumps(list(at_every_step(prepare, act, look))))
"""


def test_a_folder_that_was_being_exchanged_is_there_after_the_next_claim(tmp_path):
    paths = [str(ROOT / "tests"), str(ROOT)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), *paths], env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    assert [how for how, _ in outcomes] == ["returned"] * len(outcomes)
    assert all(beside == ["r"] for _, (_, beside) in outcomes)
    found = [what for _, (what, _) in outcomes]
    assert found.count(["old"]) >= 3
    assert found.count(["new"]) >= 1
    assert len(found) == found.count(["old"]) + found.count(["new"])
