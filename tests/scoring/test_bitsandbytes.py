"""LoRA on 8- and 4-bit base layers: the scores are those of the same quantised model."""

import pytest
import torch

from fishkern import estimate_fisher
from tests.support.oracle import one_sample
from tests.support.problems import VOCAB, class_loss, classes, lora, next_token_loss, text
from tests.support.tolerances import SCORE, score_error

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes"
)
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

BITS = {
    "8-bit": {"load_in_8bit": True, "llm_int8_skip_modules": ["classifier", "lm_head"]},
    "4-bit (fp4)": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "4-bit (nf4)": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def running_text():
    batch = text()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


# Wide enough for the kernels' blocks.
WIDTHS = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}


def bert():
    config = transformers.BertConfig(num_attention_heads=2, num_labels=3, **WIDTHS)
    return transformers.BertForSequenceClassification(config)


def llama():
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **WIDTHS)
    return transformers.LlamaForCausalLM(config)


PROBLEMS = {
    "bert": (bert, ["query", "value"], classes, class_loss),
    "llama": (llama, ["q_proj", "v_proj"], running_text, next_token_loss),
}


def quantised(model, folder, bits):
    """As users get it: saved, and loaded with a quantisation."""
    config = transformers.BitsAndBytesConfig(**BITS[bits])
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=config, device_map="cpu")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_lora_on_quantised_layers(problem, bits, tmp_path):
    make, targets, batch, loss = PROBLEMS[problem]
    model = lora(quantised(make(), tmp_path, bits), targets).float().eval()
    kind = bitsandbytes.nn.Linear8bitLt if bits == "8-bit" else bitsandbytes.nn.Linear4bit
    bases = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    assert len(bases) == 4
    assert all(type(base) is kind for base in bases)
    before = [base.weight.data.clone() for base in bases]

    batch = batch()
    scores = estimate_fisher(model, [batch], progress=False)
    assert set(scores.routes.values()) == {"fused"}

    assert all(torch.equal(base.weight, w) for base, w in zip(bases, before, strict=True))
    assert not any(module.training for module in model.modules())

    for module in model.modules():  # in eval mode these pack their weights on some CPUs
        module.training = isinstance(module, bitsandbytes.nn.Linear4bit)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    truth = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in params.items()}
    for n in range(4):
        grads = torch.autograd.grad(loss(model, one_sample(batch, n)), list(params.values()))
        for total, grad in zip(truth.values(), grads, strict=True):
            total += grad.double().square() / 4
    error, name = score_error(scores, truth)
    assert error <= SCORE, f"{name}: {error:.3e}"


@pytest.mark.parametrize("bits", ["4-bit (nf4)"])
def test_layers_packed_for_inference_are_refused(bits, tmp_path):
    model = lora(quantised(llama(), tmp_path, bits), ["q_proj"]).float().eval()
    batch = running_text()
    with torch.no_grad():
        model(**batch)
    bases = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    if not any(getattr(b.weight.quant_state, "packing_format_for_cpu", False) for b in bases):
        pytest.skip("this CPU packs nothing: it has no AVX-512 BF16")
    with pytest.raises(RuntimeError, match="was packed by bitsandbytes"):
        estimate_fisher(model, [batch], progress=False)
    model.state_dict()
    estimate_fisher(model, [batch], progress=False)
