"""What the README shows works as pasted."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.loops import arguments, dataset, make_model, mask_of, weights

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


LOOPS = "### In your training loop"


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def loops():
    return README.partition(LOOPS)[2].partition("\n### ")[0]


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where they write
    alone = snippets(README.replace(loops(), ""))
    assert alone
    for snippet in alone:
        exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize("framework", ["transformers", "accelerate", "lightning"])
@pytest.mark.filterwarnings("ignore:.*score of zero")  # tokens that no text has
@pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.*")
@pytest.mark.filterwarnings("ignore::FutureWarning:lightning.*")
def test_loops_run(framework, tmp_path, monkeypatch):
    """With a model and its data as every such loop has them."""
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    (snippet,) = (s for s in snippets(loops()) if framework in s.splitlines()[0])
    monkeypatch.chdir(tmp_path)  # where Lightning writes
    model, data = make_model("base"), dataset(128)
    before = weights(model)
    given = {
        "model": model,
        "mask": mask_of(model),
        "args": arguments(tmp_path, max_steps=1),
        "train_dataset": data,
        "loader": DataLoader(data, batch_size=4),
    }
    exec(compile(snippet, "README.md", "exec"), given)
    assert any(not torch.equal(before[name], value) for name, value in weights(model).items())


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
