"""Output that is whole or absent: made beside its place, then renamed."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.unfinished import staged


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A path beside ``target`` for the block to make a file or a folder at, and to rename to ``target`` when complete.

    Parents of ``target`` are made. What still stands at the path afterwards is removed; if the block fails, so are those
    parents.

    Raises:
      Ptq4ditError: the operating system refused something inside the block; the sentence names ``target`` and the reason.
    """
    made = list(itertools.takewhile(lambda parent: not parent.exists(), target.parents))
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged(path):
            yield path
    except BaseException as error:
        _remove(path)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise Ptq4ditError(f"Cannot write {target} ({reason}); check its permissions and the free space.") from error
        raise
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_file():
        path.unlink()
    # After a failed save, writes that Orbax had under way may still add files.
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)
