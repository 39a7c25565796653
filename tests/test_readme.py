"""The README's Python example runs as it stands."""

import re

from tests.paths import ROOT

README = ROOT / "README.md"


def test_the_python_example_runs_and_shows_what_it_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    trace, before_after, neighbors, verdicts = capsys.readouterr().out.strip().splitlines()
    assert "last subject" in trace
    before, after = (float(part.split()[0]) for part in before_after.split("->"))
    assert before > 0.9 > 0.3 > after
    assert float(neighbors.split()[1]) > 0.9
    assert "suppressed" in verdicts
