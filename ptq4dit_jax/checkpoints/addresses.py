"""Addresses such as ``gs://bucket/run``: telling them from paths, keeping their form, and how to copy from them by hand."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path, PosixPath
from urllib.parse import urlsplit

from ptq4dit_jax.errors import Ptq4ditError

#: pathlib merges two slashes into one, so one slash counts too where no such file exists.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<second>/?)(?P<rest>[^/].*)", re.DOTALL)
#: Pages of the Hugging Face Hub, whose files have addresses of their own.
_HUB_FILE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<name>[^/]+/[^/]+)/(?:blob|resolve)/(?P<rest>.+?)(?:\?.*)?"
)
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<name>[^/?]+/[^/?]+)(?:/tree/(?P<revision>[^/?]+)(?P<rest>/[^?]*)?)?/?(?:\?.*)?"
)


class AddressPath(PosixPath):
    """An address where a path is expected. It keeps both slashes, and refers to no file of this machine."""

    def __str__(self) -> str:
        return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", r"\1://", super().__str__())

    def __fspath__(self) -> str:
        return str(self)


def address_of(path: str | os.PathLike[str]) -> str | None:
    """Returns the address that a user passed, with both slashes, or None if it is a path of this machine.

    A page of the Hugging Face Hub becomes the address of what it shows.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or (match := _ADDRESS.fullmatch(text)) is None or match["scheme"].lower() == "file":
        return None
    if not match["second"] and os.path.lexists(text):
        return None
    address = f"{match['scheme'].lower()}://{match['rest']}"
    if page := _HUB_FILE.fullmatch(address):
        revision, _, rest = page["rest"].partition("/")
        return f"hf://{page['name']}@{revision}/{rest}"
    if page := _HUB_PAGE.fullmatch(address):
        return f"hf://{page['name']}" + (f"@{page['revision']}{page['rest'] or ''}" if page["revision"] else "")
    return address


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Raises if an output is to be written at an address."""
    if (address := address_of(path)) is not None:
        raise Ptq4ditError(f"{address} is an address, where nothing is written; write to this machine and copy it there.")


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path with ``~`` expanded. Links are kept, because download caches link to files whose neighbours matter. An
    address keeps its form."""
    if (address := address_of(path)) is not None:
        return AddressPath(address)
    try:
        return Path(re.sub(r"^file://(localhost)?(?=/)", "", os.fspath(path))).expanduser()
    except RuntimeError as error:
        raise Ptq4ditError(f"The path {os.fspath(path)!r} is not usable: {error}.") from error


def copy_command(address: str) -> str:
    """Returns the command that copies from an address into the current folder, or a description of it."""
    scheme, _, rest = address.partition("://")
    quoted, name = shlex.quote(address), shlex.quote(rest.rstrip("/").rpartition("/")[2])
    match scheme:
        case "gs" | "gcs":
            return f"`gcloud storage cp -r {quoted} .`"
        case "s3" | "s3a":
            return f"`aws s3 cp --recursive {quoted} {name}` (without --recursive for one file)"
        case "hf":
            repository, _, inside = rest.removeprefix("models/").rstrip("/").partition("/")
            owner, (repository, _, inside) = repository, inside.partition("/")
            repository, _, revision = repository.partition("@")
            parts = ["huggingface-cli", "download", f"{owner}/{repository}"]
            if inside:
                parts += [inside] if "." in inside.rpartition("/")[2] else ["--include", f"{inside}/*"]
            parts += ["--revision", revision] if revision and revision != "main" else []
            return f"`{shlex.join([*parts, '--local-dir', repository])}`"
        case "http" | "https":
            return f"`curl -LO {quoted}`"
        case "az" | "abfs" | "abfss":
            return f"`azcopy copy --recursive {quoted} .`"
        case "ssh" | "sftp":
            parsed = urlsplit(address)
            return f"`scp -r {shlex.quote(f'{parsed.netloc}:{parsed.path}')} .`"
        case _:
            return "the program of its store"
