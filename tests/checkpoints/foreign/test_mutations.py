"""Files with flipped, cut and repeated bytes: opened and read, or refused with one sentence, and nothing else."""

import json
import pickle
import shutil

import foreign_files
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from foreign_files import META
from mutations import mutated_bytes

from ptq4dit_jax.checkpoints.foreign import import_checkpoint, load_vae, open_tensors
from ptq4dit_jax.errors import Ptq4ditError

TREE = {"params": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"c": np.ones(3, np.int64)}}, "step": 3}


def small_files(folder):
    """One of each kind, so small that most bytes carry structure."""
    arrays = {"a.b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.ones(4, np.float32)}
    kinds = {f"pickle-{p}": pickle.dumps(TREE, protocol=p) for p in (2, 4, 5)}
    kinds["msgpack"] = serialization.msgpack_serialize(TREE)
    kinds["torch"] = foreign_files.write_torch(folder / "torch", arrays).read_bytes()
    header = b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"I8","shape":[4],"data_offsets":[16,20]}}'
    kinds["safetensors"] = len(header).to_bytes(8, "little") + header + bytes(20)
    return kinds


def read_all(path):
    for tensor in open_tensors(path).values():
        assert tensor.read().shape == tensor.shape


def survives(path, act=read_all):
    """Whether ``act`` succeeds; it may fail with one line of a :class:`Ptq4ditError` only."""
    try:
        act(path)
    except Ptq4ditError as error:
        if "\n" in str(error):
            raise
        return False
    return True


class Caller:
    """Wants ``open(mark, "w")`` to be called where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_files_that_want_code_to_run(tmp_path):
    """Mutated as well: whatever becomes of the call, it does not happen."""
    mark, rng = tmp_path / "mark", np.random.default_rng(6)
    for protocol in (2, 4, 5):
        table = pickle.dumps({"w": np.ones(3, np.float32), "call": Caller(mark), "again": [Caller(mark)]}, protocol)
        pickle.loads(table)
        assert mark.exists(), "the file does what it wants where it is let"
        mark.unlink()
        for number in range(200):
            content = mutated_bytes(table, rng) if number else table
            (tmp_path / "x").write_bytes(content)
            survives(tmp_path / "x")
            foreign_files.write_torch(tmp_path / "y", {}, table=content)
            survives(tmp_path / "y")
            assert not mark.exists(), content


@pytest.mark.parametrize("kind", ["pickle-2", "pickle-4", "pickle-5", "msgpack", "torch", "safetensors"])
def test_small_files(kind, tmp_path):
    content, rng, path, refused = small_files(tmp_path)[kind], np.random.default_rng(0), tmp_path / "x", 0
    for _ in range(1000):
        path.write_bytes(mutated_bytes(content, rng))
        refused += not survives(path)
    assert refused > 100


def test_a_training_file(tmp_path):
    content, rng, path = META.read_bytes(), np.random.default_rng(1), tmp_path / "x"
    table = content.index(b"data.pkl")
    directory = content.rindex(b"PK\x01\x02") - 3000
    for i in range(60):
        data = bytearray(content)
        start = table if i % 2 else directory
        for _ in range(3):
            at = start + int(rng.integers(6000)) if i % 2 else min(start + int(rng.integers(3400)), len(data) - 1)
            data[at] = rng.integers(256)
        path.write_bytes(data)
        survives(path, lambda path: import_checkpoint(path, num_heads=3))


def test_indices_and_links_of_caches(tmp_path):
    """Every byte of an index of shards, and of the file that names a revision."""
    root, rng, refused = tmp_path / "models--a--b", np.random.default_rng(4), 0
    revision = root / "snapshots" / "0123"
    revision.mkdir(parents=True)
    (root / "refs").mkdir()
    for n in (1, 2):
        foreign_files.save_safetensors(revision / f"model-{n}-of-2.safetensors", {f"t{n}": np.ones(2, np.float32)})
    files = {
        revision / "model.safetensors.index.json": json.dumps(
            {"metadata": {"total_size": 16}, "weight_map": {f"t{n}": f"model-{n}-of-2.safetensors" for n in (1, 2)}}
        ).encode(),
        root / "refs" / "main": b"0123",
    }
    for i in range(600):
        for file, content in files.items():
            file.write_bytes(content if (file.name == "main") == bool(i % 4) else mutated_bytes(content, rng))
        refused += not survives(root)
    assert 100 < refused < 600


def test_random_trees(tmp_path):
    """Folders, links, indices and weights under names that mean something, at random."""
    rng, found = np.random.default_rng(5), 0
    orbax = tmp_path / "orbax"
    ocp.PyTreeCheckpointer().save(orbax, TREE)
    folders = ["transformer", "vae", "snapshots", "refs", "1000", "step_2", "models--a--b", "default", "x", "arrays"]
    names = [
        "model.safetensors",
        "model.fp16.safetensors",
        "model-1-of-2.bin",
        "model-2-of-2.bin",
        "optimizer.bin",
        "main",
        "model.safetensors.index.json",
        "model.bin.index.fp16.json",
        "config.json",
        "manifest.ocdbt",
        "x.pt",
        "1000",
    ]
    contents = [*small_files(tmp_path).values(), b"", b"{}", b"0", b'{"weight_map": {"a": "model.safetensors"}}', b"\x89PNG"]
    for i in range(300):
        root = tmp_path / str(i)
        root.mkdir()
        places = [root]
        for _ in range(rng.integers(1, 12)):
            where = places[rng.integers(len(places))]
            target = where / (str(rng.choice(folders)) if rng.random() < 0.5 else str(rng.choice(names)))
            if target.exists() or target.is_symlink():
                continue
            match rng.integers(5):
                case 0:
                    target.symlink_to(places[rng.integers(len(places))] if rng.random() < 0.7 else tmp_path / "nowhere")
                case 1 if target.name in folders:
                    shutil.copytree(orbax, target)
                case _ if target.name in folders:
                    target.mkdir()
                    places.append(target)
                case _:
                    target.write_bytes(contents[rng.integers(len(contents))])
        found += survives(root)
        survives(root, lambda root: import_checkpoint(root))
        survives(root, load_vae)
    assert found > 20


def test_an_orbax_folder(tmp_path):
    ocp.PyTreeCheckpointer().save(tmp_path / "x", TREE)
    files = [file for file in sorted((tmp_path / "x").rglob("*")) if file.is_file() and file.stat().st_size]
    rng = np.random.default_rng(2)
    for i in range(60):
        folder = shutil.copytree(tmp_path / "x", tmp_path / f"x{i}")
        file = folder / files[i % len(files)].relative_to(tmp_path / "x")
        file.write_bytes(mutated_bytes(file.read_bytes(), rng))
        survives(folder)
