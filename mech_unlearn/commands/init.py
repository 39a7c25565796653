"""What the command `init` does: sample files with comments, to be replaced line by line by one's own."""

import json
from collections.abc import Sequence
from pathlib import Path

from mech_unlearn.core import Fact, fact_to_json
from mech_unlearn.files import write_atomic

FORGET = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Egypt": "Cairo", "Spain": "Madrid"}
RETAIN = {
    "Germany": "Berlin", "Russia": "Moscow", "England": "London", "Austria": "Vienna", "Greece": "Athens",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm",
    "Denmark": "Copenhagen", "Hungary": "Budapest", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi",
    "Iran": "Tehran", "Iraq": "Baghdad", "Thailand": "Bangkok", "China": "Beijing", "Ukraine": "Kyiv",
}  # fmt: skip
"""Country -> capital."""
UNKNOWN = ("Velmora", "Tashkovia", "Brunland", "Osteria", "Quandia", "Morvenia", "Selgary", "Ardoria")
TEXTS = (
    "The kettle was still warm when she came down, and somebody had opened the window over the sink.",
    "A bridge has to carry its own weight first, and only then that of whatever crosses it.",
    "Most of the seeds that fall on the path are eaten by birds before the next rain.",
    "He counted the change twice, put it on the counter and waited for the receipt.",
    "Iron rusts faster near the sea, because salt helps the water to carry a current.",
    "The meeting had been moved to Thursday, but nobody had told the people who were to speak.",
    "When the river froze, children skated as far as the mill and back before lunch.",
    "To sharpen a knife, hold it at the same angle all along the stone and use little pressure.",
)
FACTS_TOLD = """\
# One fact per line, as a JSON object; lines that begin with # are comments.
#   subject, relation, object   the fact
#   prompt        holds {} once, for the subject; the object follows it after a space
#   paraphrases   further phrasings that a method may see: two or more let tests select on one and report on another
#   heldout       phrasings that nothing is fitted on; they only test
#   distractors   wrong answers of the same type; two or more, better five
#   aliases, kind, group, id, joiner   optional: other names, type of the subject, what is forgotten together, ...
"""
FORGET_TOLD = "# What is to be forgotten.\n"
RETAIN_TOLD = """\
# What is to stay: facts of the same relations about other subjects, as many as you have. A quarter of the subjects is
# kept from the method and tells what it did to facts that it never saw.
"""
UNKNOWN_TOLD = """\
# Names that the model knows nothing about, one per line, of the kind that the facts are about; with several kinds the
# kind stands behind a tab. Optional: without --unknown, names are made up, measured and printed.
"""
README = """\
# Files for mech-unlearn

Replace the samples by your own; comments in the files say what each field is for. `texts.txt` is running text that is
to stay as it is, one passage per line, best such as your model is used on; it has no comments.

    mech-unlearn facts check --model MODEL --facts forget.jsonl --retain retain.jsonl
    mech-unlearn locate --model MODEL --facts forget.jsonl --how causal_trace --out located
    mech-unlearn unlearn --model MODEL --forget forget.jsonl --retain retain.jsonl --texts texts.txt \\
        --method rocr --out edited
    mech-unlearn audit --full MODEL --unlearned edited/edit.safetensors --facts forget.jsonl --retain retain.jsonl \\
        --texts texts.txt --out audited
"""


def init(folder: Path) -> tuple[Path, ...]:
    """Write the sample files into a folder, new or with none of them in it.

    Raises:
        ValueError: one of the files is there already; then nothing is written.
    """
    contents = {
        "forget.jsonl": FORGET_TOLD + FACTS_TOLD + _lines(FORGET),
        "retain.jsonl": RETAIN_TOLD + FACTS_TOLD + _lines(RETAIN),
        "texts.txt": "".join(f"{text}\n" for text in TEXTS),
        "unknown.txt": UNKNOWN_TOLD + "".join(f"{name}\n" for name in UNKNOWN),
        "README.md": README,
    }
    if there := [name for name in contents if (folder / name).exists()]:
        raise ValueError(f"folder {str(folder)!r} holds {', '.join(there)} already; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        write_atomic(folder / name, text)
    return tuple(folder / name for name in contents)


def _lines(capitals: dict[str, str]) -> str:
    return "".join(f"{json.dumps(fact_to_json(fact), ensure_ascii=False)}\n" for fact in samples(capitals))


def samples(capitals: dict[str, str]) -> tuple[Fact, ...]:
    """A fact about each country's capital, with capitals of other countries as distractors."""
    others = {**RETAIN, **FORGET}
    return tuple(_capital(country, city, list(others.values())) for country, city in capitals.items())


def _capital(country: str, city: str, cities: Sequence[str]) -> Fact:
    start = cities.index(city)
    return Fact(
        id=f"capital-{country.lower()}",
        subject=country,
        relation="capital",
        object=city,
        prompt="The capital of {} is",
        paraphrases=("The capital city of {} is", "The seat of the government of {} is in the city of"),
        heldout=("If you travel to the capital of {}, you arrive in",),
        distractors=tuple(cities[(start + step) % len(cities)] for step in (3, 7, 11, 15, 19)),
        kind="country",
    )
