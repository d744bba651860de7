"""Reads arrays from an .npz that others wrote.

Before anything is allocated, what a header declares is compared with the bytes in the file and with the free memory. Nothing is
ever unpickled.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from ptq4dit_jax import memory
from ptq4dit_jax.edges import edge, shown
from ptq4dit_jax.errors import Ptq4ditError

#: The most members of an archive: in memory, their list takes ten times its bytes in the file.
MAX_MEMBERS = 10_000
_METHODS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # and how many bytes one byte can expand to
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_ENDING = ".npy"


def read_npz(
    path: str | os.PathLike[str], names: Iterable[str], remedy: str = "write it again with numpy.savez"
) -> tuple[dict[str, np.ndarray], str]:
    """Reads those of the named arrays that an .npz holds; also returns, in words, everything that it holds.

    Args:
      path: the file.
      names: the wanted arrays.
      remedy: what a user can do about a file that is refused.

    Raises:
      Ptq4ditError: it cannot be read, is no .npz or a damaged one (checksums are compared); an array holds anything but plain
        values, declares a size that differs from its bytes, or does not fit into the free memory.
    """
    where = Path(path).expanduser()
    with edge(f"{os.fspath(path)} as an .npz file of plain arrays", f"it is none, or damaged; {remedy}"):
        with where.open("rb") as file:
            said = _check_members(file, remedy)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                present = {info.filename.removesuffix(_ENDING): info for info in members}
                if len(members) != said:
                    raise Ptq4ditError(f"The file {where} lists {len(members)} arrays and says it has {said}; {remedy}.")
                if len(present) < len(members):
                    raise Ptq4ditError(f"The file {where} holds two arrays of one name; {remedy}.")
                arrays = {name: _read(archive, present[name], where, remedy) for name in names if name in present}
                # The list of names has no checksum, so each name is compared with that in the member itself.
                for info in members:
                    if info.filename.removesuffix(_ENDING) not in arrays:
                        archive.open(info).close()
        listed = ", ".join(shown(name, 60) for name in list(present)[:20]) + (", and more" if len(present) > 20 else "")
        return arrays, listed or "nothing"


def _check_members(file: IO[bytes], remedy: str) -> int:
    """Returns how many members an archive says it has; refuses one with too long a list of members before it is read."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2**16 - 22))
    tail = file.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0:
        what = f"The file {file.name} cannot be read as an .npz file of plain arrays"
        raise Ptq4ditError(f"{what}: it is no zip archive; {remedy}.")
    number = lambda start, size: int.from_bytes(tail[start : start + size], "little")
    members, directory = number(end + 10, 2), number(end + 12, 4)
    if (members == 2**16 - 1 or directory == 2**32 - 1) and (wide := tail.rfind(b"PK\6\6", 0, end)) >= 0:
        members, directory = number(wide + 32, 8), number(wide + 40, 8)
    if directory > 100 * MAX_MEMBERS:
        raise Ptq4ditError(
            f"The file {file.name} cannot be read as an .npz: its list of members has {directory:,} bytes, and "
            f"{100 * MAX_MEMBERS:,} are allowed; {remedy}."
        )
    file.seek(0)
    return members


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, remedy: str) -> np.ndarray:
    name = f"The array {shown(info.filename.removesuffix(_ENDING))} in {path}"
    most = _METHODS.get(info.compress_type)
    if most is None or info.flag_bits & 1:
        what = "is encrypted" if info.flag_bits & 1 else f"is compressed by method {info.compress_type}"
        raise Ptq4ditError(f"{name} {what}, which no .npz is; {remedy}.")
    if info.file_size > most * info.compress_size:
        raise Ptq4ditError(
            f"{name} says that its {info.compress_size:,} bytes become {info.file_size:,}, and they cannot; {remedy}."
        )
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        shape, fortran, dtype = _READ_HEADER[version](member)
        start = member.tell()
        if dtype.hasobject or dtype.names or dtype.subdtype:
            kind = "objects of Python" if dtype.hasobject else "records"
            raise Ptq4ditError(f"{name} must hold numbers, not {kind}, which are never unpickled (allow_pickle=False).")
        declared = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or declared != info.file_size - start:
            raise Ptq4ditError(f"{name} declares {declared:,} bytes, and {info.file_size - start:,} are there; {remedy}.")
        memory.check_fits(name, declared, memory.free_on_host(), "use fewer rows")
        array = np.empty(math.prod(shape), dtype)
        view = array.view(np.uint8) if declared else np.empty(0, np.uint8)
        done = 0
        while done < declared:
            part = member.read(min(2**20, declared - done))
            if not part:
                raise Ptq4ditError(f"{name} ends after {done:,} of {declared:,} bytes; {remedy}.")
            view[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
        if member.read(1):  # the last read checks the checksum
            raise Ptq4ditError(f"{name} goes on behind its {declared:,} bytes; {remedy}.")
    return array.reshape(shape, order="F" if fortran else "C")
