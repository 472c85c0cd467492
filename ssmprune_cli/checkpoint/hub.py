"""Checkpoints on the Hugging Face hub: `hf://OWNER/NAME[@revision]/file`, and `hf://OWNER/NAME` for an output of ours.

huggingface_hub downloads them into its own cache and is imported when one is asked for. Within a process, an address
stands for the same files, even if its branch moves.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

from ssmprune_cli.errors import CheckpointError, SsmpruneError, UsageError, listing

MADE_SMALLER = ("resized_from", "resized", "cut_from")  # where a configuration says that it was another before
SCHEME = "hf:"
_ADDRESS = re.compile(r"hf:/+([^/@]+)/([^/@]+)(?:@([^/]+))?(?:/(.+))?")  # a Path has one slash for two
_PAGE = re.compile(r"https:/+huggingface\.co/([^/]+)/([^/]+)/(?:resolve|blob)/([^/]+)/([^?#]+)")


@dataclass(frozen=True)
class Address:
    """A file of a repository, or the repository as an artefact folder; at a revision, or at the newest."""

    repository: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{self.repository}{revision}{f'/{self.file}' if self.file else ''}"


def parse(text: str) -> Address:
    """The address in `hf://...`. Raises UsageError if it is none."""
    found = _ADDRESS.fullmatch(text)
    file = found[4] if found else None
    if found is None or (file is not None and not set(PurePosixPath(file).parts).isdisjoint({"..", "/"})):
        raise UsageError(
            "is no address of a file on the hub",
            where=text,
            hint="It looks like hf://OWNER/NAME/FILE, or hf://OWNER/NAME@REVISION/FILE.",
        )
    return Address(f"{found[1]}/{found[2]}", unquote(found[3]) if found[3] else None, file)


def from_page(url: str) -> str | None:
    """The address of a file whose page or download on huggingface.co is `url`."""
    found = _PAGE.fullmatch(url)
    if found is None:
        return None
    revision = None if found[3] == "main" else found[3]
    return str(Address(f"{found[1]}/{found[2]}", revision, found[4]))


@functools.cache
def fetched(address: Address) -> tuple[Path, Address]:
    """Where the file or folder is on this machine, downloaded if need be, and its address with the commit in it.

    A sharded checkpoint comes with all its parts. Raises CheckpointError saying what is missing, and what to do.
    """
    first = address.file or "config.json"
    path = _download(address, first)
    root = path.parents[len(PurePosixPath(first).parts) - 1]
    pinned = replace(address, revision=root.name)
    if first.endswith(".index.json"):
        for name in sorted(set(_values(path).get("weight_map", {}).values())):
            _download(pinned, str(PurePosixPath(first).with_name(str(name))))
    if address.file is not None:
        return path, pinned
    _download(pinned, "model.safetensors")
    config = _values(path).get("config")
    if isinstance(config, dict) and any(config.get(name) for name in MADE_SMALLER):
        with suppress(FileNotFoundError):  # of a fine-tuned model there is no dense one
            _download(pinned, "dense.safetensors", optional=True)
    return root, pinned


def _values(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} for what is none, which its reader refuses by name."""
    with suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return {}


def _download(address: Address, file: str, *, optional: bool = False) -> Path:
    """`file` of the repository. FileNotFoundError if it is not there and `optional`."""
    hub = library()
    with explained(replace(address, file=file), optional=optional):
        if not isinstance(hub.try_to_load_from_cache(address.repository, file, revision=address.revision), str):
            _reach(hub, address, file)
        return Path(hub.hf_hub_download(address.repository, file, revision=address.revision, library_name="ssmprune"))


def _reach(hub: Any, address: Address, file: str) -> None:
    """Ask the hub about `file` once: for a file that is not in the cache, a download would ask for half a minute."""
    from huggingface_hub import errors

    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(address.repository, file, revision=address.revision))
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.HFValidationError):
        raise
    except Exception as error:  # of the network: their class is that of a library that changes with versions
        raise errors.LocalEntryNotFoundError(str(error)) from error


def library() -> Any:
    """huggingface_hub. Raises SsmpruneError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise SsmpruneError(
            "needs huggingface_hub, which is not installed", where=SCHEME, hint="Type `pip install 'ssmprune[hub]'`."
        ) from error
    return huggingface_hub


@contextmanager
def explained(address: Address, *, optional: bool = False) -> Iterator[None]:
    """Around calls of huggingface_hub about `address`: what goes wrong becomes a CheckpointError."""
    from huggingface_hub import errors

    where = str(address)
    try:
        yield
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            "is not in the cache of the hub on this machine, and the hub cannot be reached",
            where=where,
            hint="Connect to the network (and unset HF_HUB_OFFLINE), or download the file elsewhere, copy it here and "
            "give its path.",
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            "is given only to those who accepted its conditions",
            where=where,
            hint=f"Accept them at https://huggingface.co/{address.repository}, and type `hf auth login`.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no repository {address.repository}, or it is private",
            where=where,
            hint="Check the name (`ssmprune models list` shows published ones). For a private one type "
            "`hf auth login`.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"the repository has no revision {address.revision}",
            where=where,
            hint="Leave out `@...` for the newest, or give a branch, a tag or a commit.",
        ) from error
    except errors.EntryNotFoundError as error:
        if optional:
            raise FileNotFoundError(where) from error
        raise CheckpointError(
            "the repository has no such file", where=where, hint=f"Files there: {_files(address)}."
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"is no address of the hub: {error}", where=where) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"the hub cannot be used: {error}", where=where, hint="Try again later, or give the path of a local file."
        ) from error


def _files(address: Address) -> str:
    """Names, for a message."""
    try:
        return listing(library().HfApi().list_repo_files(address.repository, revision=address.revision), limit=12)
    except Exception:  # the error that is being told goes first
        return "see its page"
