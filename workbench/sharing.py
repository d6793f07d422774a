"""Trained editors on the hub: where one lies, fetched if need be, and how one gets there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from workbench.errors import EditorError

# All that is written, sent or fetched of an editor: no code, and nothing that is unpickled.
TENSORS, ABOUT, CARD = FILES = ("editor.safetensors", "editor.json", "README.md")

_NAME = r"\w[\w.-]*/\w[\w.-]*"
_ID = re.compile(rf"({_NAME})(?:@(\w[\w./-]*))?", re.ASCII)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def is_id(source: object) -> bool:
    """Whether it is a text of the form of a hub id, `owner/name` or `owner/name@revision`."""
    return isinstance(source, str) and bool(_ID.fullmatch(source))


def locate_editor(source: str | Path) -> tuple[str, Path]:
    """Where a trained editor lies; downloaded first if it is on the hub and not here yet.

    A folder that is there comes before an id. What has been downloaded opens offline.

    Args:
        source: A folder, or a hub id, `owner/name` or `owner/name@revision`.

    Returns:
        What the same editor is found by again, the folder's whole path or `owner/name@commit`;
        and the folder.

    Raises:
        EditorError: The hub has it not, or does not give it, or cannot be reached.
    """
    if not is_id(source) or os.path.isdir(source):
        folder = Path(source).expanduser().resolve()
        return str(folder), folder
    from huggingface_hub import snapshot_download

    name, _, revision = str(source).partition("@")
    with _explained(f"{source} is no folder here, and cannot be fetched from the hub", name):
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(FILES))
        )
    if not (folder / TENSORS).is_file():
        raise EditorError(
            f"{source} is on the hub, but holds no {TENSORS}: it is no trained editor. Give the "
            f"id of one; a model goes to --model, or `Workbench.open(model)`."
        )
    return f"{name}@{folder.name}", folder


def upload(
    name: str, files: Mapping[str, Path | bytes], *, private: bool | None, token: str | None
) -> str:
    """Put files into a repository of the hub in one commit; it is made if it is not there.

    Args:
        name: Of the repository, `owner/name`.
        files: By their paths in it.
        private: Of a repository that is made; None: as its owner's account has it.
        token: Of the hub; None: $HF_TOKEN, or that of `hf auth login`.

    Returns:
        The repository's address.

    Raises:
        EditorError: There is no token, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not re.fullmatch(_NAME, name, re.ASCII):
        raise EditorError(
            f"{name!r} is no name of a repository: give owner/name, the owner being you or an "
            f"organisation of yours on the hub."
        )
    with _explained(f"{name} cannot be written on the hub", name):
        token = token or get_token()
        if token is None:
            raise EditorError(f"Writing to the hub needs a token of yours: {_LOG_IN}.")
        api = HfApi(token=token)
        url = api.create_repo(name, private=private, exist_ok=True)
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
