"""What the README shows works as pasted."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_exactly_two_set_up_commands():
    commands = re.findall(r"^pip install.*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert "quickstart.py" in commands[0]
    assert "pytest" in commands[1]


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
