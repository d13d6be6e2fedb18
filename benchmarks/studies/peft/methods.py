"""Every method of parameter-efficient fine-tuning, as a table.

What PEFT (or the ``adapters`` package) is asked for, on which model, and which way the scores of
each kind of parameter go. The tests hold it to be true; the study makes the documentation's
table of it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.studies.peft.models import Method, Options, imported
from benchmarks.workloads.encoder import Batch


def _from_data(model: nn.Module, batch: Batch) -> None:
    """EVA's initialisation: principal components of the layers' inputs."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    imported("peft").initialize_lora_eva_weights(model, [inputs] * 8, show_progress_bar=False)


def _trained_before(base: Any, folder: Path) -> Options:
    """X-LoRA mixes adapters that were trained before."""
    peft = imported("peft")
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    for name in "01":
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**lora))
        model.save_pretrained(folder / name)
    mixed = {name: str(folder / name) for name in "01"}
    return {"adapters": mixed, "hidden_size": base.config.hidden_size, "xlora_depth": 1, **CAUSAL}


CLASSES, CAUSAL = {"task_type": "SEQ_CLS"}, {"task_type": "CAUSAL_LM"}
SEQUENCES = {"task_type": "SEQ_2_SEQ_LM"}
EMBEDDING = {"target_modules": ["word_embeddings"]}
TOKENS = list(range(2, 30))
LORA, DORA = {"fused": "lora_A lora_B"}, {"fused": "lora_A lora_B lora_magnitude_vector"}
VIRTUAL, HEAD = {"num_virtual_tokens": 3}, "modules_to_save modules_to_save.bias"
BOTTLENECK = {"fused": "adapter_down* adapter_up* classifier*"}

METHODS = (
    # LoRA, its initialisations, and on other layers than linear ones
    Method("LoRA", "LoraConfig", LORA),
    Method("rsLoRA", "LoraConfig", LORA, {"use_rslora": True}),
    Method("PiSSA", "LoraConfig", LORA, {"init_lora_weights": "pissa"}),
    Method("OLoRA", "LoraConfig", LORA, {"init_lora_weights": "olora"}),
    Method("EVA", "LoraConfig", LORA, {"init_lora_weights": "eva"}, after=_from_data),
    Method(
        "LoRA with biases",
        "LoraConfig",
        {"fused": "lora_A lora_B lora_B.bias base_layer.bias"},
        {"bias": "lora_only", "lora_bias": True},
    ),
    Method(
        "LoRA with a head (modules_to_save)",
        "LoraConfig",
        {"fused": f"lora_A lora_B {HEAD}"},
        {"modules_to_save": ["classifier"]},
    ),
    Method("LoRA on Conv1D (GPT-2)", "LoraConfig", LORA, {"fan_in_fan_out": True}, "gpt2"),
    Method("LoRA on Conv2d", "LoraConfig", LORA, base="images"),
    Method("LoRA on Embedding", "LoraConfig", {"vmap": "lora_embedding_*"}, EMBEDDING),
    Method("DoRA", "LoraConfig", DORA, {"use_dora": True}),
    Method("DoRA on Conv2d", "LoraConfig", DORA, {"use_dora": True}, "images"),
    Method(
        "DoRA on Embedding",
        "LoraConfig",
        {"vmap": "lora_embedding_*", "fused": "lora_magnitude_vector"},
        {"use_dora": True, **EMBEDDING},
    ),
    Method(
        "aLoRA",
        "LoraConfig",
        {"loop": "lora_A lora_B"},
        {"alora_invocation_tokens": [25], **CAUSAL},
        "decoder",
    ),
    Method(
        "KaSA",
        "LoraConfig",
        {"fused": "lora_A lora_B lora_diag"},
        lambda *_: {"kasa_config": imported("peft").KasaConfig()},
    ),
    Method(
        "BD-LoRA",
        "LoraConfig",
        {"vmap": "lora_A", "fused": "lora_B"},
        lambda *_: {"use_bdlora": imported("peft").BdLoraConfig(["query", "value"], [], 2)},
    ),
    Method(
        "VeLoRA",
        "LoraConfig",
        LORA,
        lambda *_: {"velora_config": imported("peft").VeloraConfig(num_groups=4)},
    ),
    # Relatives of LoRA
    Method("AdaLoRA", "AdaLoraConfig", {"vmap": "lora_A lora_B lora_E"}, {"total_step": 10}),
    Method("VeRA", "VeraConfig", {"fused": "vera_lambda_*"}, {"r": 4}),
    Method("PVeRA", "PveraConfig", {"fused": "pvera_lambda_*"}, {"r": 4}),
    Method("RandLoRA", "RandLoraConfig", {"loop": "randlora_*"}, {"r": 4}),
    Method(
        "VB-LoRA",
        "VBLoRAConfig",
        {"vmap": "vblora_logits_?", "loop": "vblora_vector_bank"},
        {"vector_length": 4, "num_vectors": 6},
    ),
    Method("Uni-LoRA", "UniLoraConfig", {"loop": "unilora_theta_d"}),
    Method("TinyLoRA", "TinyLoraConfig", {"loop": "tinylora_v"}, {"u": 8}),
    Method("GraLoRA", "GraloraConfig", {"vmap": "gralora_*"}, {"r": 4}),
    Method("GLoRA", "GloraConfig", {"loop": "X*"}, {"r": 4}),
    Method("DeLoRA", "DeloraConfig", {"vmap": "delora_*"}, {"r": 4}),
    Method("HiRA", "HiraConfig", {"vmap": "hira_*"}, {"r": 4}),
    Method(
        "Poly",
        "PolyConfig",
        {"loop": "module_logits poly_lora_*", "fused": HEAD},
        {"r": 4, "n_tasks": 2, "n_skills": 2, "n_splits": 2, **CLASSES},
        tasks=True,
    ),
    Method("X-LoRA", "XLoraConfig", {"fused": "layers layers.bias"}, _trained_before, "decoder"),
    Method(
        "Lily",
        "LilyConfig",
        {},
        {"r": 4},
        refused="Do the samples depend on each other",
        why="its router averages over all tokens of the batch, so a sample's loss, and its "
        "gradient, depend on the samples beside it",
    ),
    # Other products and transforms of a weight
    Method("LoHa", "LoHaConfig", {"loop": "hada_*"}, {"r": 4}),
    Method("LoHa on Conv2d", "LoHaConfig", {"loop": "hada_*"}, {"r": 4}, "images"),
    Method("LoKr", "LoKrConfig", {"vmap": "lokr_*"}, {"r": 4}),
    Method("LoKr on Conv2d", "LoKrConfig", {"vmap": "lokr_*"}, {"r": 4}, "images"),
    Method("FourierFT", "FourierFTConfig", {"vmap": "fourierft_spectrum"}, {"n_frequency": 10}),
    Method("WaveFT", "WaveFTConfig", {"vmap": "waveft_spectrum"}, {"n_frequency": 10}),
    Method("C3A", "C3AConfig", {"loop": "c3a_kernel"}, {"block_size": 4}),
    Method("OFT", "OFTConfig", {"vmap": "oft_R"}, {"r": 0, "oft_block_size": 4}),
    Method(
        "OFT on Conv2d",
        "OFTConfig",
        {"vmap": "oft_R"},
        {"r": 0, "oft_block_size": 4, "target_modules": ["layer.0.convolution"]},
        "images",
    ),
    Method("BOFT", "BOFTConfig", {"vmap": "boft_R", "fused": "boft_s"}, {"boft_block_size": 4}),
    Method(
        "BOFT on Conv2d",
        "BOFTConfig",
        {"vmap": "boft_R boft_s"},
        {"boft_block_size": 4, "target_modules": ["layer.0.convolution"]},
        "images",
    ),
    Method("HRA", "HRAConfig", {"vmap": "hra_u"}, {"r": 4}),
    Method("PSOFT", "PsoftConfig", {"vmap": "psoft_R vector_*"}, {"r": 4}),
    Method("RoAd", "RoadConfig", {"fused": "road_*"}, {"group_size": 4}),
    Method("MiSS", "MissConfig", {"vmap": "miss_block"}, {"r": 4}),
    Method("OSF", "OSFConfig", {"vmap": "?_low"}),
    Method(
        "FRoD",
        "FrodConfig",
        {"fused": "frod_lambda_l", "loop": "frod_lambda_s_values"},
        {"progressbar": False},
    ),
    Method("AdaMSS", "AdamssConfig", {"vmap": "adamss_*"}),
    Method("DEFT", "DeftConfig", {"vmap": "deft_*"}, {"r": 4}),
    Method("PEANuT", "PeanutConfig", {"loop": "peanut_*"}, {"r": 4}),
    # Scales, shifts, norms, single entries
    Method(
        "IA3",
        "IA3Config",
        {"fused": "ia3_l"},
        {"target_modules": ["value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    Method("IA3 on Conv2d", "IA3Config", {"fused": "ia3_l"}, {"feedforward_modules": []}, "images"),
    Method("BEFT", "BeftConfig", {"fused": "beft_bias"}),
    Method(
        "LN tuning",
        "LNTuningConfig",
        {"fused": "ln_tuning_layers*"},
        {"target_modules": ["LayerNorm"]},
    ),
    Method(
        "LN tuning (RMSNorm)",
        "LNTuningConfig",
        {"fused": "ln_tuning_layers"},
        {"target_modules": ["input_layernorm"]},
        "decoder",
    ),
    Method("SHiRA", "ShiraConfig", {"loop": "shira_weight"}, {"r": 2}),
    Method("SuperTuning", "SupertuningConfig", {"vmap": "supertuning_values"}),
    Method(
        "trainable tokens",
        "TrainableTokensConfig",
        {"vmap": "trainable_tokens_delta"},
        {"token_indices": TOKENS, **EMBEDDING},
    ),
    Method(
        "LoRA with trainable tokens",
        "LoraConfig",
        {**LORA, "vmap": "trainable_tokens_delta"},
        {"trainable_token_indices": {"word_embeddings": TOKENS}},
    ),
    # Virtual tokens
    Method(
        "prompt tuning",
        "PromptTuningConfig",
        {"loop": "embedding", "fused": HEAD},
        {**VIRTUAL, **CLASSES},
    ),
    Method(
        "prompt tuning (causal)",
        "PromptTuningConfig",
        {"loop": "embedding"},
        {**VIRTUAL, **CAUSAL},
        "decoder",
    ),
    Method(
        "prompt tuning (encoder-decoder)",
        "PromptTuningConfig",
        {"loop": "embedding"},
        {**VIRTUAL, **SEQUENCES},
        "encoder-decoder",
    ),
    Method(
        "multitask prompt tuning",
        "MultitaskPromptTuningConfig",
        {"vmap": "prefix_task_*", "fused": f"embedding {HEAD}"},
        {"num_tasks": 2, **VIRTUAL, **CLASSES},
        tasks=True,
    ),
    Method(
        "p-tuning",
        "PromptEncoderConfig",
        {"loop": "embedding mlp_head*", "fused": HEAD},
        {"encoder_hidden_size": 8, **VIRTUAL, **CLASSES},
    ),
    Method(
        "p-tuning (LSTM)",
        "PromptEncoderConfig",
        {"loop": "embedding mlp_head* weight_?h_* bias_?h_*", "fused": HEAD},
        {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM", **VIRTUAL, **CLASSES},
    ),
    Method(
        "prefix tuning",
        "PrefixTuningConfig",
        {"fused": f"embedding {HEAD}"},
        {**VIRTUAL, **CLASSES},
        passes="past_key_values",
    ),
    Method(
        "prefix tuning (projected)",
        "PrefixTuningConfig",
        {"fused": f"embedding transform* {HEAD}"},
        {"prefix_projection": True, "encoder_hidden_size": 8, **VIRTUAL, **CLASSES},
        passes="past_key_values",
    ),
    Method(
        "prefix tuning (causal)",
        "PrefixTuningConfig",
        {"fused": "embedding"},
        {**VIRTUAL, **CAUSAL},
        "decoder",
    ),
    Method(
        "prefix tuning (encoder-decoder)",
        "PrefixTuningConfig",
        {"fused": "embedding"},
        {**VIRTUAL, **SEQUENCES},
        "encoder-decoder",
    ),
    Method(
        "CPT",
        "CPTConfig",
        {"loop": "delta_embedding"},
        {
            "cpt_token_ids": [3, 4, 5],
            "cpt_mask": [1] * 3,
            "cpt_tokens_type_mask": [1, 2, 3],
            **CAUSAL,
        },
        "decoder",
        default_loss=False,  # its own weighs tokens by their types
    ),
    Method(
        "Cartridge",
        "CartridgeConfig",
        {"vmap": "trainable_embedding"},
        {"num_frozen_tokens": 1, **VIRTUAL, **CAUSAL},
        "decoder",
    ),
    Method(
        "LLaMA-Adapter",
        "AdaptionPromptConfig",
        {"loop": "adaption_prompt", "fused": "adaption_gate"},
        {"target_modules": None, "adapter_len": 3, "adapter_layers": 1, **CAUSAL},
        "decoder",
    ),
    # Added layers
    Method(
        "Shadow",
        "ShadowConfig",
        {"fused": "shadow_* ?_proj gate_proj up_proj down_proj *norm"},
        {"r": 4, "target_modules": None, "auxiliary_loss_weight": 0.0, **CAUSAL},
        "decoder",
    ),
    Method(
        "bottleneck (Houlsby)",
        "DoubleSeqBnConfig",
        BOTTLENECK,
        {"reduction_factor": 4},
        package="adapters",
    ),
    Method(
        "bottleneck (Pfeiffer)",
        "SeqBnConfig",
        BOTTLENECK,
        {"reduction_factor": 4},
        package="adapters",
    ),
    Method(
        "bottleneck (parallel)",
        "ParBnConfig",
        BOTTLENECK,
        {"reduction_factor": 4},
        package="adapters",
    ),
    Method(
        "bottleneck (Pfeiffer, invertible)",
        "SeqBnInvConfig",
        {"fused": f"{BOTTLENECK['fused']} F* G*"},
        {"reduction_factor": 4},
        package="adapters",
    ),
    Method(
        "Compacter",
        "CompacterConfig",
        {"loop": "W_left W_right phm_rule", "fused": "b classifier*"},
        {"reduction_factor": 4},
        package="adapters",
    ),
    Method(
        "Mix-and-Match",
        "MAMConfig",
        {"fused": f"{BOTTLENECK['fused']} wte control_trans*"},
        package="adapters",
    ),
)

# The classes with which PEFT configures something, but that are no row's own, and why.
ABSENT = {
    "ArrowConfig": "routes between LoRAs that were trained before; it trains nothing itself",
    "BdLoraConfig": "an option of LoRA: the row BD-LoRA",
    "EvaConfig": "an initialisation of LoRA: the row EVA",
    "KasaConfig": "an option of LoRA: the row KaSA",
    "LoftQConfig": "an initialisation of LoRA on quantised weights, which have a test of their own",
    "LoraGAConfig": "an initialisation of LoRA from gradients: then as the row LoRA",
    "LoraRuntimeConfig": "where LoRA keeps its weights while it works",
    "MontecloraConfig": "LoRA, but for noise in training mode; scores are taken in eval mode",
    "PeftConfig": "the base class",
    "PromptLearningConfig": "the base class of prompt methods",
    "VeloraConfig": "an option of LoRA: the row VeLoRA",
}
