"""Ids of the hub, and trained editors there: where one lies, fetched if need be; sending one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from workbench.checks import path_of
from workbench.errors import EditorError

# All that is sent of an editor: no code, and nothing that is unpickled. The first is all of it.
TENSORS, ABOUT, CARD = FILES = ("editor.safetensors", "editor.json", "README.md")

_NAME = r"\w[\w.-]*/\w[\w.-]*"
_ID = re.compile(rf"(?!.*\.\.){_NAME}(?:@\w[\w./-]*)?", re.ASCII)
_DATA_FILES = (".gz", ".json", ".jsonl", ".txt")
_MADE_WITH_IT = {".gitattributes", CARD}  # by the hub, in a repository that is new
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def is_id(source: object) -> bool:
    """Whether it is a text of the form of a hub id, `owner/name` or `owner/name@revision`.

    Paths of data files, `data/facts.jsonl`, are none.
    """
    if not isinstance(source, str) or source.lower().endswith(_DATA_FILES):
        return False
    return bool(_ID.fullmatch(source))


def known_as(source: str) -> str:
    """What others know a model or data set by: its hub id, or its file's or folder's name."""
    return source if is_id(source) and not os.path.exists(source) else Path(source).name


def locate_editor(
    source: str | Path, admit: Callable[[int], object] | None = None
) -> tuple[str, Path]:
    """Where a trained editor lies; downloaded first if it is on the hub and not here yet.

    A folder that is there comes before an id. What has been downloaded opens offline.

    Args:
        source: A folder, or a hub id, `owner/name` or `owner/name@revision`.
        admit: Called with the size of the editor's file, in bytes, before it is downloaded or
            read; raises what refuses it.

    Returns:
        What the same editor is found by again, the folder's whole path or `owner/name@commit`;
        and the folder.

    Raises:
        EditorError: The hub has it not, or does not give it, or cannot be reached.
    """
    if is_id(source) and not os.path.isdir(source):
        folder = _fetched(str(source), admit)
        known = f"{str(source).partition('@')[0]}@{folder.name}"
    else:
        folder = path_of(source, EditorError).resolve()
        known = str(folder)
    if admit is not None and (file := folder / TENSORS).is_file():
        admit(file.stat().st_size)
    return known, folder


def _fetched(source: str, admit: Callable[[int], object] | None) -> Path:
    """The folder of what was downloaded: an editor's one file."""
    from huggingface_hub import errors, snapshot_download

    name, _, revision = source.partition("@")
    fetch = partial(snapshot_download, name, revision=revision or None, allow_patterns=[TENSORS])
    with _explained(f"{source} is no folder here, and cannot be fetched from the hub", name):
        if admit is not None:
            with suppress(errors.DryRunError):  # out of reach: nothing can be downloaded
                for file in fetch(dry_run=True):
                    admit(file.file_size or 0)
        folder = Path(fetch())
    if not (folder / TENSORS).is_file():
        raise EditorError(
            f"{source} is on the hub, but holds no {TENSORS}: it is no trained editor. Give the "
            f"id of one; a model goes to --model, or `Workbench.open(model)`."
        )
    return folder


def upload(
    name: str, files: Mapping[str, Path | bytes], *, private: bool | None, card: bytes
) -> str:
    """Put an editor into a repository of the hub in one commit; it is made if it is not there.

    The token is $HF_TOKEN, or that of `hf auth login`.

    Args:
        name: Of the repository, `owner/name`.
        files: By their paths in it.
        private: Of a repository that is made, and asked of one that is there; None: as its owner's
            account has it, or as it is.
        card: `README.md`, where neither `files` nor the repository has one.

    Returns:
        The repository's address.

    Raises:
        EditorError: There is no token, the repository is public against `private` or no editor's,
            or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not re.fullmatch(_NAME, name, re.ASCII):
        raise EditorError(
            f"{name!r} is no name of a repository: give owner/name, the owner being you or an "
            f"organisation of yours on the hub."
        )
    with _explained(f"{name} cannot be written on the hub", name):
        if get_token() is None:
            raise EditorError(f"Writing to the hub needs a token of yours: {_LOG_IN}.")
        api = HfApi()
        url = api.create_repo(name, private=private, exist_ok=True)
        there = api.model_info(name)
        held = {file.rfilename for file in there.siblings or ()}
        if private and not there.private:
            raise EditorError(
                f"{name} is there already, and public; nothing was sent. Make it private in its "
                f"settings on the hub first, or give another name."
            )
        if held - _MADE_WITH_IT and TENSORS not in held:
            raise EditorError(
                f"{name} holds other files and no {TENSORS}: it is no editor's repository, and "
                f"nothing was sent. Give another name; it is made if it is not there."
            )
        if CARD not in held:
            files = {CARD: card, **files}
        added = [CommitOperationAdd(path, data) for path, data in files.items()]
        api.create_commit(name, added, commit_message="Upload an editor")
    return str(url)


@contextmanager
def _explained(what: str, name: str) -> Iterator[None]:
    """Raise what the hub's library raises as an error with advice."""
    try:
        yield
    except EditorError:
        raise
    except Exception as error:  # of a server that may say anything
        raise EditorError(f"{what}: {_reason(error, name)}") from None


def _reason(error: Exception, name: str) -> str:
    """What went wrong between here and the hub, and what to do."""
    from huggingface_hub import errors, is_offline_mode

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"its owner gives access on request. Ask for it at https://huggingface.co/{name}, "
            f"then {_LOG_IN}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"it is unknown there, or private. Check the spelling; for a private one, {_LOG_IN}."
    if isinstance(error, errors.RevisionNotFoundError):
        return "it is there, but not with this revision. Leave out what follows the @."
    if isinstance(error, errors.OfflineModeIsEnabled) or is_offline_mode():
        return (
            "HF_HUB_OFFLINE is set, so that only what was downloaded before is there. Unset it, or "
            "check the spelling."
        )
    if status in (401, 403):
        return f"that is refused. Give a token that may do so: {_LOG_IN}."
    told = f"{str(error) or repr(error)} {error.__cause__ or ''}"
    said = " ".join(told.split())[:300].rstrip(".")
    return f"{said}. Look whether the hub can be reached, and whether there is room on the disk."
