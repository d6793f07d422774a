"""Data sets that are no single file: a hub id or a folder, opened by the `datasets` library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from .errors import DataError
from .sharing import is_id

# What rows of fields are kept in. (Others of the library's kinds hold media, or may unpickle.)
KINDS = ("arrow", "csv", "json", "parquet", "text")
_PREPARED = "cache"  # rows that were prepared before, where the hub cannot be reached


def is_dataset(path: str) -> bool:
    """Whether a path is that of a folder, or names no file and has the form of a hub id."""
    return os.path.isdir(path) or (is_id(path) and not os.path.exists(path))


def rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of all splits with their place, from 1; fields without a value are left out.

    Where there are several splits, each row without a field `split` gets the name of its own,
    "dev" for "validation".

    Args:
        path: A folder, or a hub id; what has been downloaded before opens offline.

    Raises:
        DataError: `datasets` is not installed, or opens no data set of that name.
    """
    splits = _opened(path)
    number = 0
    for name, split in splits.items():
        own = {"split": {"validation": "dev"}.get(name, name)} if len(splits) > 1 else {}
        for row in split:
            number += 1
            yield number, own | {key: value for key, value in row.items() if value is not None}


def _opened(path: str) -> dict[str, Any]:
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise DataError(
            f"{path!r} is no file, and opening it as a data set needs `datasets`: pip install "
            "'model-editing-workbench[datasets]', or give a file's path"
        ) from None
    try:
        builder = load_dataset_builder(path)
        if builder.name in (*KINDS, _PREPARED):
            builder.download_and_prepare()
            return dict(builder.as_dataset())  # type: ignore[arg-type]
        reason = f"it is of the kind {builder.name!r}; {', '.join(KINDS)} are read"
    except Exception as error:  # of a repository that may hold anything
        cause = error.__cause__ or error
        reason = (str(cause).strip() or repr(cause)).split("\n")[0].rstrip(".")
    raise DataError(
        f"{path!r} cannot be opened: {reason}. It is no file here; as a data set of the hub it is "
        "unknown, private, of several configurations, in need of code of its own (which is never "
        "run), or the hub cannot be reached. Check the spelling, or download one of its files "
        "and give that"
    )
