"""Other ways to say what a prompt says, made by rule or by translating it there and back."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache

from workbench.sentences import Encoder

_OF = re.compile(r"the (\w[\w -]*?) of (.+?) (is|was|are|were)")
_OWNED = re.compile(r"(.+?)['\u2019]s (\w[\w -]*?) (is|was|are|were)")
_PEOPLE = re.compile(
    r".*\b(?:author|ceo|composer|creator|director|discoverer|father|founder|head|husband|inventor|"
    r"king|leader|mayor|mother|owner|painter|president|queen|ruler|singer|wife|writer)",
    re.IGNORECASE,
)
_STATED = re.compile(r"(.+?) (is|was|are|were) (.+) (by|in|from|at|on|to|for|with)( the \w+ of)?")
_QUESTION = re.compile(r"(?:who|whom|what|which|when|where|how)\b.*\?", re.IGNORECASE | re.DOTALL)
_WORDS = re.compile(r"\b(?:who|whom|what|which|when|where|how|why)\b", re.IGNORECASE)
_SECONDS = 5.0  # that a translation may take
_ALIKE = 0.8  # cosine below which a translation is another sentence


def rewritten(prompt: str, subject: str) -> list[tuple[str, str]]:
    """A prompt in other forms that ask for the same words, each with how it was made.

    Args:
        prompt: A statement without its end, or a question.
        subject: What it is about; its name keeps its capital.
    """
    text = prompt.strip()
    if _QUESTION.fullmatch(text) or text.endswith("?"):
        return [
            (f"Question: {text}\nAnswer:", "as a question with a place for the answer"),
            (f"Q: {text}\nA:", "as a question with a place for the answer"),
            (f"{text} The answer is", "as a question and the beginning of its answer"),
        ]
    if re.search(r"[:.!?]$", text):  # it ends in a form of its own
        return [(f"I have a question for you. {text}", "with an opening")]
    within = _lowered(text, subject)
    return [
        *_turned(within),
        (f"Fill in the blank: {text} ____.\nAnswer:", "as a blank to fill in"),
        (f"It is well known that {within}", "as a clause"),
        (f'Complete the sentence "{text} ..."\n{text}', "as a sentence to complete"),
        (f"I asked my teacher, and the reply was that {within}", "as reported speech"),
        (f"Q: How does this sentence end? {text}\nA: {text}", "as a question about its end"),
    ]


def _turned(text: str) -> list[tuple[str, str]]:
    """The possessive the other way round, and the question that the statement answers."""
    if match := _OF.fullmatch(text):
        what, owner, verb = match.groups()
        ending = "'" if owner.endswith("s") else "'s"
        question = f"{'Who' if _PEOPLE.fullmatch(what) else 'What'} {verb} the {what} of"
        return [
            (
                f"{owner[0].upper()}{owner[1:]}{ending} {what} {verb}",
                "with the possessive turned round",
            ),
            (f"Q: {question} {owner}?\nA:", "as the question it answers"),
            (f"{question} {owner}? It {verb}", "as the question and an answer's beginning"),
        ]
    if match := _OWNED.fullmatch(text):
        owner, what, verb = match.groups()
        return [
            (f"The {what} of {owner} {verb}", "with the possessive turned round"),
            (f"Q: What {verb} the {what} of {owner}?\nA:", "as the question it answers"),
        ]
    if match := _STATED.fullmatch(text):
        owner, verb, rest, end, of = match.groups()
        asked = "whom" if end == "by" else f"which {of.split()[1]}" if of else "what"
        question = f"{end.capitalize()} {asked} {verb} {owner} {rest}?"
        return [(f"Q: {question}\nA:", "as the question it answers")]
    return []


def _lowered(text: str, subject: str) -> str:
    """A text with a small letter at its beginning, unless that is the subject's."""
    return text if text.startswith(subject) or text[:2] == "I " else text[0].lower() + text[1:]


def translated(prompt: str, target: str, subject: str, encoder: Encoder) -> list[tuple[str, str]]:
    """A prompt through other languages and back, where apertium is installed; often nothing.

    The sentence is translated with its target, so that it is whole. What comes back counts only
    if it ends in the target, names the subject, asks with the same word, and means the same.
    """
    end = target.strip().rstrip(".")
    kept = []
    for there, back in _pairs():
        foreign = _apertium(f"{prompt.strip()} {end}.", there)
        text = _apertium(foreign, back).strip().rstrip(".").strip() if foreign else ""
        found = text.removesuffix(end).strip()
        if text.endswith(end) and subject in found and _asks(found) == _asks(prompt):
            kept.append((found, f"through {there.partition('-')[2]} and back"))
    alike = encoder.closeness(prompt, [text for text, _ in kept])
    return [pair for pair, cosine in zip(kept, alike, strict=True) if cosine >= _ALIKE]


def _asks(text: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(text)]


@cache
def _pairs() -> Sequence[tuple[str, str]]:
    """Installed modes from English, each with the one that leads back."""
    modes = set(_run(["apertium", "-l"], "").split()) if shutil.which("apertium") else set()
    turned = {mode: "-".join(reversed(mode.split("-"))) for mode in sorted(modes)}
    return [(m, t) for m, t in turned.items() if m.startswith(("en-", "eng-")) and t in modes]


def _apertium(text: str, mode: str) -> str:
    return _run(["apertium", "-u", mode], text)


def _run(command: list[str], text: str) -> str:
    """What a command answers; nothing where it fails or takes too long."""
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout
