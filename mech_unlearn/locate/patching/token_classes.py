"""Classes of prompt tokens relative to the subject, over which locators average."""

from mech_unlearn.model.tokens import Query

CLASSES = ("first subject", "middle subject", "last subject", "first after", "further", "last prompt")
"""Classes of tokens, as in figure 1 of the paper. The only token of a subject is its last; tokens before the subject
are not corrupted and have no effect."""


def token_classes(query: Query) -> dict[str, list[int]]:
    """Positions of each class of tokens in the prompt of a query."""
    a, b = query.span
    end = len(query.prompt) - 1
    return {
        "first subject": [a] if b - a > 1 else [],
        "middle subject": list(range(a + 1, b - 1)),
        "last subject": [b - 1],
        "first after": [b] if b < end else [],
        "further": list(range(b + 1, end)),
        "last prompt": [end] if end >= b else [],
    }
