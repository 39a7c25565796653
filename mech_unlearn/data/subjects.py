"""Whom a question is about, where the data do not say.

In TOFU twenty rows in a row are about one fictitious author, whose name is the capitalised string of two words or more
that most of their questions hold. The subject of a question about a real author or the world is its longest quoted
title, else its longest capitalised name.
"""

import re
from collections import Counter
from collections.abc import Sequence

_WORD = r"(?:(?:[A-Z]\.)+|[A-Z]\w*)(?:[-'’][A-Z]\w*|-\w+)*"
_NAME = re.compile(rf"(?<!\w){_WORD}(?: {_WORD})+")
_LINK = r"(?:of|the|and|in|to|a|de|von|for|on|at)"
_RUN = re.compile(rf"(?<!\w){_WORD}(?: (?:{_LINK} )*(?:{_WORD}|\d+))*")
_QUOTED = re.compile(r"(?<!\w)['\"‘“]([^\"“”]+?)['\"’”](?!\w)")
_OPENING = re.compile(
    rf"^(?:(?:Who|What|Which|Where|When|Whose|Why|How|In|On|The|Is|Are|Was|Were|Do|Does|Did|Has|Have|Can|Could)\b ?)"
    rf"(?:{_LINK} )*"
)


def author_name(questions: Sequence[str]) -> str:
    """The name that most of the questions about one author hold.

    Raises:
        ValueError: no capitalised string of two words or more stands in half of the questions.
    """
    counts = Counter(name for question in questions for name in _names(question))
    most = max(counts.values(), default=0)
    if 2 * most < len(questions):
        asked = f"{len(questions)} questions, from {questions[0]!r}"
        raise ValueError(f"no name stands in half of the {asked}: are they about one author?")
    return max((name for name, count in counts.items() if count == most), key=len)


def _names(question: str) -> set[str]:
    """All runs of two capitalised words or more."""
    runs = [_from_name(match).split(" ") for match in _NAME.finditer(question)]
    return {" ".join(r[i:j]) for r in runs for i in range(len(r)) for j in range(i + 2, len(r) + 1)}


def named_subject(question: str) -> str | None:
    """What a question about real authors or the world names: its longest quoted title, else its longest name."""
    if quoted := _QUOTED.findall(question):
        return max(quoted, key=len)
    return max(filter(None, map(_from_name, _RUN.finditer(question))), key=len, default=None)


def _from_name(match: re.Match[str]) -> str:
    """A capitalised run without the word that opens the question."""
    return _OPENING.sub("", match.group()) if match.start() == 0 else match.group()


def slot(text: str, subject: str | None) -> str:
    """The text with `{}` for its subject.

    Raises:
        ValueError: no subject, or it does not stand in the text exactly once.
    """
    if subject is None:
        raise ValueError("no subject found in the question")
    if (count := text.count(subject)) != 1:
        raise ValueError("the subject does not occur" if not count else "the subject occurs more than once")
    return text.replace(subject, "{}")
