"""The model folder: round trips, sizes, refusals, and that nothing is lost by a failed save."""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from store_helpers import META, assert_same, edit_config, example_arrays

from ptq4dit_jax.checkpoints import store
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.hashing import content_hash


def size_on_disk(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_round_trip(saved, capfd):
    arrays, meta = store.read(saved)
    assert_same(arrays, example_arrays())
    assert {key: meta[key] for key in META} == META
    assert set(meta) == {*META, "provenance"}
    assert set(meta["provenance"]["versions"]) == {"ptq4dit_jax", "jax", "flax", "orbax"}
    assert capfd.readouterr() == ("", "")


def test_overwritten_twice_it_is_still_quiet(saved, capfd):
    store.write(saved, example_arrays(), META, overwrite=True)
    assert capfd.readouterr() == ("", "")


def test_given_provenance_is_kept_beside_the_versions(tmp_path):
    store.write(tmp_path / "m", {"a": np.ones(2)}, {"kind": "test", "provenance": {"recipe": "r.py", "seed": 3}})
    provenance = store.read(tmp_path / "m")[1]["provenance"]
    assert provenance.pop("versions")["jax"] == jax.__version__
    assert provenance == {"recipe": "r.py", "seed": 3}


def test_config_is_readable_and_says_what_is_inside(saved):
    config = json.loads((saved / "config.json").read_text())
    assert list(config)[:3] == ["format", "version", "kind"]
    assert (config["format"], config["version"]) == ("ptq4dit_jax", 2)
    assert config["arrays"]["blocks/qkv/weight/values"] == {"shape": [3, 20, 30], "dtype": "int8"}
    assert config["content_sha256"] == content_hash(example_arrays())
    assert store.read_config(saved) == config
    assert (
        '    "steps": {"shape": [7], "dtype": "int32"}' in (saved / "config.json").read_text().replace(",\n", "\n").splitlines()
    )


def test_arrays_folder_is_an_orbax_checkpoint(saved):
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(saved / "arrays")
    np.testing.assert_array_equal(tree["steps"], np.arange(-3, 4))


def test_folder_names_no_path_of_this_machine_and_can_be_moved(saved, tmp_path):
    assert not any(str(tmp_path).encode() in content for content in listing(saved).values() if content)
    moved = Path(shutil.move(saved, tmp_path / "elsewhere"))
    assert_same(store.read(moved)[0], example_arrays())


def test_jax_arrays_single_sharded_and_replicated(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    value = np.arange(len(jax.devices()) * 6, dtype=np.float32).reshape(-1, 3)
    arrays = {
        "single": jnp.asarray(value),
        "bf16": jnp.asarray(value, jnp.bfloat16),
        "sharded": jax.device_put(value, NamedSharding(mesh, PartitionSpec("data"))),
        "replicated": jax.device_put(value, NamedSharding(mesh, PartitionSpec())),
    }
    store.write(tmp_path / "m", arrays, META)
    expected = {"single": value, "bf16": value.astype(ml_dtypes.bfloat16), "sharded": value, "replicated": value}
    assert_same(store.read(tmp_path / "m")[0], expected)


@pytest.mark.slow
def test_jax_arrays_on_eight_devices(tmp_path):
    """In a process of its own, as the number of devices is fixed when JAX starts."""
    here = Path(__file__)
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    code = (
        f"import sys, pathlib; sys.path.insert(0, {str(here.parent)!r}); import jax, test_store; "
        "assert jax.device_count() == 8; "
        f"test_store.test_jax_arrays_single_sharded_and_replicated(pathlib.Path({str(tmp_path)!r}))"
    )
    root = here.parents[2]
    env["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_strided_and_big_endian_arrays(tmp_path):
    arrays = {"strided": np.arange(24.0).reshape(4, 6).T[::2], "big": np.arange(4, dtype=">f4")}
    store.write(tmp_path / "m", arrays, META)
    read, _ = store.read(tmp_path / "m")
    np.testing.assert_array_equal(read["strided"], arrays["strided"])
    np.testing.assert_array_equal(read["big"], [0, 1, 2, 3])
    assert read["big"].dtype == np.dtype("<f4")


def test_only_empty_arrays(tmp_path):
    store.write(tmp_path / "m", {"a": np.zeros((2, 0), np.int8)}, META)
    assert_same(store.read(tmp_path / "m")[0], {"a": np.zeros((2, 0), np.int8)})
    store.write(tmp_path / "m", example_arrays(), META, overwrite=True)
    store.write(tmp_path / "m", {"a": np.zeros((2, 0), np.int8)}, META, overwrite=True)
    assert os.listdir(tmp_path / "m") == ["config.json"]


def test_small_models_stay_within_five_percent(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {f"blocks/layer_{i}/weight/values": rng.integers(-128, 128, (96, 320), dtype=np.int8) for i in range(38)}
    arrays |= {"blocks/bias": rng.normal(size=(40, 300)).astype(np.float32), "table": np.ones((7,), np.float32)}
    raw = sum(array.nbytes for array in arrays.values())
    assert 1.1e6 < raw < 1.3e6
    assert size_on_disk(store.write(tmp_path / "m", arrays, META)) <= 1.05 * raw


@pytest.mark.slow
def test_saving_takes_no_second_copy(tmp_path):
    """The peak memory of a process that saves 400 MB, against that of one that only makes them."""
    code = """
import resource, sys, numpy as np
from ptq4dit_jax.checkpoints import store
store.write(sys.argv[1] + "/warm", {"a": np.ones(3)}, {"kind": "test"})
arrays = {str(i): np.full((100, 1000, 1000), i, np.uint8) for i in range(4)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.write(sys.argv[1] + "/big", arrays, {"kind": "test"})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 0.25 * 400e6  # ru_maxrss is in KiB


def test_hash_is_sha256_over_names_types_shapes_and_bytes():
    a, b = np.arange(6, dtype=np.int8).reshape(2, 3), np.array(1.5, np.float32)
    expected = hashlib.sha256(b"a\0int8\0(2, 3)\0" + a.tobytes() + b"b/c\0float32\0()\0" + b.tobytes()).hexdigest()
    assert content_hash({"b/c": b, "a": a}) == expected
    assert content_hash({"b/c": jnp.asarray(b), "a": np.asfortranarray(a)}) == expected
    others: tuple[dict[str, np.ndarray], ...] = (
        {"a": a},
        {"a": a.T, "b/c": b},
        {"a": a.view(np.uint8), "b/c": b},
        {"a": a, "b/d": b},
        {"a": a, "b/c": np.negative(b)},
    )
    for other in others:
        assert content_hash(other) != expected


# Paths


def test_relative_tilde_and_missing_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.write("a/b/model", {"x": np.ones(3)}, META) == tmp_path / "a/b/model"
    assert store.write("~/model", {"x": np.ones(3)}, META) == tmp_path / "home/model"
    assert_same(store.read("a/../a/b/model/")[0], {"x": np.ones(3)})
    assert_same(store.read("~/model")[0], {"x": np.ones(3)})


def test_folder_has_the_usual_permissions(saved):
    (saved.parent / "plain").mkdir()
    assert saved.stat().st_mode == (saved.parent / "plain").stat().st_mode


def test_a_link_to_a_model_is_followed(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    store.write(tmp_path / "link", {"x": np.ones(2)}, META, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert_same(store.read(saved)[0], {"x": np.ones(2)})


@pytest.mark.parametrize("user", ["~nobody-by-this-name/model", "model\0"])
def test_unusable_paths(user):
    with pytest.raises(Ptq4ditError, match="not a usable path"):
        store.write(user, {"x": np.ones(2)}, META)
    with pytest.raises(Ptq4ditError, match="not a usable path"):
        store.read(user)


# Existing targets


@pytest.mark.parametrize("kind", ["model", "empty", "folder", "file"])
def test_an_existing_target_is_refused(kind, tmp_path):
    target = make_target(tmp_path, kind)
    before = listing(tmp_path)
    with pytest.raises(Ptq4ditError, match="exists already"):
        store.write(target, {"x": np.ones(2)}, META)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "foreign config", "damaged config", "file"])
def test_only_models_are_overwritten(kind, tmp_path):
    target = make_target(tmp_path, kind)
    before = listing(tmp_path)
    with pytest.raises(Ptq4ditError, match="not overwritten"):
        store.write(target, {"x": np.ones(2)}, META, overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["model", "empty", "newer"])
def test_overwriting(kind, tmp_path):
    target = make_target(tmp_path, kind)
    store.write(target, {"x": np.ones(2)}, META, overwrite=True)
    assert_same(store.read(target)[0], {"x": np.ones(2)})
    assert os.listdir(tmp_path) == ["target"]
    assert sorted(os.listdir(target)) == ["arrays", "config.json"]


def test_overwriting_keeps_other_files(saved):
    (saved / "README.md").write_text("a card")
    (saved / "recipe").mkdir()
    store.write(saved, {"x": np.ones(2)}, META, overwrite=True)
    assert (saved / "README.md").read_text() == "a card"
    assert sorted(os.listdir(saved)) == ["README.md", "arrays", "config.json", "recipe"]
    assert_same(store.read(saved)[0], {"x": np.ones(2)})


def make_target(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
        return target
    if kind in ("model", "newer"):
        store.write(target, example_arrays(), META)
        if kind == "newer":
            edit_config(target, version=7)
        return target
    target.mkdir()
    if kind != "empty":
        (target / "thesis.tex").write_text("mine")
    if kind.endswith("config"):
        (target / "config.json").write_text(
            '{"format": "diffusers"}' if kind.startswith("foreign") else '{"format": "ptq4dit_j'
        )
    return target


# Failing writes


def broken_orbax(monkeypatch, error):
    def save(self, directory, *args, **kwargs):
        (directory / "half").write_bytes(b"written")
        raise error

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "save", save)


def broken_publication(monkeypatch, error, number):
    """Makes the ``number``-th renaming fail."""
    calls = []

    def failing(rename):
        def renamed(self, target):
            calls.append(target)
            if len(calls) == number:
                raise error
            return rename(self, target)

        return renamed

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))


@pytest.mark.parametrize("error", [ValueError("a\nb"), RuntimeError("x [source=y]"), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("existing", [True, False])
def test_nothing_is_left_of_a_failed_write(existing, error, tmp_path, monkeypatch):
    if existing:
        store.write(tmp_path / "new/deep/model", example_arrays(), META)
    before = listing(tmp_path)
    broken_orbax(monkeypatch, error)
    with pytest.raises(Ptq4ditError, match=r"Cannot write .*model") as caught:
        store.write(tmp_path / "new/deep/model", {"x": np.ones(2)}, META, overwrite=existing)
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_nothing_is_left_of_an_interrupted_write(error, tmp_path, monkeypatch):
    broken_orbax(monkeypatch, error)
    with pytest.raises((type(error), Ptq4ditError)):
        store.write(tmp_path / "model", {"x": np.ones(2)}, META)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EXDEV, "Invalid cross-device link")])
def test_a_failed_exchange_brings_the_old_model_back(number, error, saved, monkeypatch):
    before = listing(saved.parent)
    broken_publication(monkeypatch, error, number)
    with pytest.raises((KeyboardInterrupt, Ptq4ditError)):
        store.write(saved, {"x": np.ones(2)}, META, overwrite=True)
    assert listing(saved.parent) == before


def test_a_failed_publication_leaves_nothing(tmp_path, monkeypatch):
    broken_publication(monkeypatch, OSError(errno.EACCES, "Permission denied"), 1)
    with pytest.raises(Ptq4ditError, match="Permission denied"):
        store.write(tmp_path / "a/model", {"x": np.ones(2)}, META)
    assert os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk(existing, tmp_path, capfd):
    """A limit on the size of files stands in for the disk: the system refuses the same calls."""
    if existing:
        store.write(tmp_path / "model", example_arrays(), META)
    before = listing(tmp_path)
    arrays = {f"a{i}": np.random.default_rng(i).integers(0, 255, 300_000, dtype=np.uint8) for i in range(5)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(Ptq4ditError, match=r"Cannot write .*model") as caught:
            store.write(tmp_path / "model", arrays, META, overwrite=existing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "free space" in str(caught.value)
    assert listing(tmp_path) == before
    assert capfd.readouterr() == ("", "")


def test_an_unwritable_parent(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Ptq4ditError, match=r"Cannot write .*Not a directory"):
        store.write(tmp_path / "file/below/model", {"x": np.ones(2)}, META)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(Ptq4ditError, match="Permission denied"):
        store.write(tmp_path / "locked/model", {"x": np.ones(2)}, META)
    with pytest.raises(Ptq4ditError, match="Permission denied"):
        store.write(tmp_path / "locked/new/model", {"x": np.ones(2)}, META)
    assert os.listdir(tmp_path / "locked") == []


@pytest.mark.parametrize(
    ("arrays", "meta", "words"),
    [
        ({}, META, "without arrays"),
        ({"a": np.array(["text"])}, META, "'a' is of type str"),
        ({"a": np.array([None])}, META, "'a' is of type object"),
        ({"a": np.ones(2, ml_dtypes.int4)}, META, "int4"),
        ({"a": jax.random.key(0)}, META, "key"),
        ({"a": [1, 2]}, META, "list"),
        ({"": np.ones(2)}, META, "names"),
        ({1: np.ones(2)}, META, "names"),
        ({"a": np.ones(2)}, META | {"settings": {"x": object()}}, "JSON"),
        ({"a": np.ones(2)}, META | {"settings": float("nan")}, "JSON"),
    ],
)
def test_what_cannot_be_saved(arrays, meta, words, tmp_path):
    with pytest.raises(Ptq4ditError, match=words):
        store.write(tmp_path / "a/model", arrays, meta)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("meta", [{}, {"kind": 1}, {"kind": "a", "arrays": {}}, {"kind": "a", "version": 1}])
def test_meta_belongs_to_the_caller(meta, tmp_path):
    with pytest.raises(ValueError, match="kind"):
        store.write(tmp_path / "model", {"a": np.ones(2)}, meta)
