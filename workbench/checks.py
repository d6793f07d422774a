"""What users give, checked by its name before anything is done with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from workbench.errors import EditError, WorkbenchError


def check_text(text: object, name: str) -> str:
    """The text that was given.

    Raises:
        EditError: It is no text, or holds half of a surrogate pair, which no tokenizer can read.
    """
    if not isinstance(text, str):
        raise EditError(f"The {name} must be a text; got {text!r:.80}.")
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise EditError(
            f"The {name} {text!r} holds half of a surrogate pair, which is no character: it was "
            f"cut, or read in another encoding than its own. Give text in UTF-8."
        )
    return text


def check_number(value: object, name: str, least: int, most: int, hint: str = "") -> float:
    """The number that was given.

    Args:
        value: To be checked.
        name: What it is.
        least: It must be no less.
        most: And no more.
        hint: What some value means.

    Raises:
        EditError: It is no number, or lies outside.
    """
    if isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most:  # type: ignore[operator]
        return float(value)
    raise EditError(
        f"{name} must be a number between {least:,} and {most:,}{hint}; got {value!r:.80}."
    )


def check_count(value: object, name: str) -> int:
    """The whole number that was given, 1 or more.

    Raises:
        EditError: It is none, or less.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and value >= 1:  # type: ignore[operator]
        return int(value)
    raise EditError(f"{name} must be at least 1, and a whole number; got {value!r:.80}.")


def check_list(items: object, wanted: str) -> list[Any]:
    """What was given, one by one.

    Args:
        items: To be checked.
        wanted: What they should be, in words.

    Raises:
        EditError: They cannot be counted up.
    """
    if not isinstance(items, Iterable) or isinstance(items, str | bytes):
        raise EditError(f"Give {wanted}; got {items!r:.80}.")
    return list(items)


def path_of(given: Any, error: Callable[[str], WorkbenchError]) -> Path:
    """The path that was given, of something that is there or could be; `~` is the user's folder.

    Args:
        given: To be checked.
        error: The class of error to raise.

    Raises:
        WorkbenchError: No file can have it, or what stands there cannot be looked at.
    """
    try:
        path = Path(given).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, RuntimeError, TypeError, ValueError) as problem:
        raise error(
            f"{given!r:.80} cannot be a file or folder: {problem}. Give its path, as a text."
        ) from None
    return path
