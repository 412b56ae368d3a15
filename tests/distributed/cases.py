"""What is trained on one process and on two, and must come out the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import build_tiny_model
from peft import LoraConfig
from tiny_training import make_pairs, tiny_trainer

from pivotune.models.adapters import add_adapters
from pivotune.training.trainer import DeepSupervisionTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
FEATURE = {"conversion_signal": "feature", "thinking_signal": "feature"}
PROMPT = {"gradient": "prompt"}
_RANDOM = {"train_sampling_strategy": "random"}

# Arguments of the trainer, and under "model", "lora" and "rows" what else differs. 13 rows in batches of 4 over all
# processes: the last step has one row, so that the second process has none.
CASES: dict[str, dict[str, Any]] = {
    "tft": {"method": "tft"},
    "sft": {"method": "sft"},
    "logits-shared": {"logits_forward": "shared"},
    "logits-separate": {"logits_forward": "separate"},
    "logits-no-norm": {"logits_norm": "none"},
    "logits-positional": {"logits_mode": "positional"},
    "prompt": {"supervision": {"logits": PROMPT}},
    "prompt-separate": {"supervision": {"logits": {**PROMPT, "forward": "separate"}}},
    "prompt-lora-checkpointed": {"supervision": {"logits": PROMPT}, "lora": {}, "gradient_checkpointing": True},
    "lens-model": {"supervision": {"logits": PROMPT, "lens": "model"}},
    "lens-tuned": {"supervision": {"logits": PROMPT, "lens": "tuned", "tuned": {"states": 150, "steps": 3}}, "rows": 24},
    "conversion-only": {"thinking_signal": "none"},
    "thinking-only-separate": {"conversion_signal": "none", "logits_forward": "separate"},
    "feature-detached": {**FEATURE},
    "feature-joint-last": {**FEATURE, "feature_english": "joint", "feature_pooling": "last"},
    "feature-joint-answer": {**FEATURE, "feature_english": "joint", "feature_span": "query+answer"},
    "feature-frozen": {**FEATURE, "feature_english": "frozen"},
    "contrastive": {"conversion_signal": "none", "thinking_signal": "contrastive"},
    "contrastive-joint": {"conversion_signal": "contrastive", "thinking_signal": "contrastive",
                          "supervision": {"contrastive": {"english": "joint", "temperature": 0.5}}},
    "cka": {"conversion_signal": "none", "thinking_signal": "cka", "supervision": {"cka": {"span": "query+answer"}}},
    "cka-joint": {"conversion_signal": "none", "thinking_signal": "cka", "supervision": {"cka": {"english": "joint"}}},
    "contrastive-one-row-each": {"per_process": 1, "english_ratio": 0.5, "conversion_signal": "none",
                                 "thinking_signal": "contrastive", **_RANDOM},
    "mixed": {"conversion_signal": "feature", "logits_forward": "separate"},
    # Batches of one row a process: most steps have a process without an English side.
    "one-row-each": {"per_process": 1, "english_ratio": 0.5, **_RANDOM},
    "one-row-each-separate": {"per_process": 1, "english_ratio": 0.5, "logits_forward": "separate", **_RANDOM},
    "one-row-each-feature": {"per_process": 1, "english_ratio": 0.5, **FEATURE, **_RANDOM},
    "phase": {"supervision": {"phase": {"steps": 2, "learning_rate": 0.05}}},
    "keep-english": {"supervision": {"keep_english": {"kl": 0.7, "top": 5}}, "english_ratio": 0.4},
    "accumulated": {"gradient_accumulation_steps": 3, "rows": 17},
    "accumulated-one-row": {"gradient_accumulation_steps": 2, "per_process": 1, "rows": 5, "english_ratio": 0.4},
    "untied": {"model": {"tie_word_embeddings": False}},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed-separate-joint": {"gradient_checkpointing": True, "logits_forward": "separate",
                                    "thinking_signal": "feature", "feature_english": "joint"},
    "lora": {"lora": {}},
    "lora-head": {"lora": {"target_modules": ["q_proj", "lm_head"]}, "model": {"tie_word_embeddings": False}},
    "lora-separate-checkpointed": {"lora": {}, "logits_forward": "separate", "gradient_checkpointing": True},
    "lora-frozen": {"lora": {}, **FEATURE, "feature_english": "frozen"},
    "gemma2": {"model": {"model_type": "gemma2"}},
    "gemma3": {"model": {"model_type": "gemma3"}},
    "gpt2-separate": {"model": {"model_type": "gpt2"}, "logits_forward": "separate"},
}  # fmt: skip


def build_model(name: str, *, seed: int = 0) -> Any:
    """The model of a case, with its adapters."""
    model = build_tiny_model(**{"tie_word_embeddings": True, "seed": seed, **CASES[name].get("model", {})})
    adapters = _adapters(CASES[name])
    return model if adapters is None else add_adapters(model, adapters)


def _adapters(case: dict[str, Any]) -> LoraConfig | None:
    return LoraConfig(**{**LORA, **case["lora"]}) if "lora" in case else None


def build(name: str, folder: Path, num_processes: int, **changes: Any) -> DeepSupervisionTrainer:
    """The trainer of a case; a step has the same rows whatever the number of processes."""
    case = {"english_ratio": 0.25, "optim": "sgd", "max_grad_norm": 0.5, "learning_rate": 0.1, **CASES[name], **changes}
    model = build_tiny_model(**{"tie_word_embeddings": True, **case.pop("model", {})})
    together, adapters = 2 * case.pop("per_process", 2), _adapters(case)
    case.pop("lora", None)
    return tiny_trainer(
        folder,
        model=model,
        rows=make_pairs(case.pop("rows", 13)),
        trainer={"peft_config": adapters, "stop_signals": case.pop("stop_signals", None)},
        per_device_train_batch_size=together // num_processes,
        per_device_eval_batch_size=4 // num_processes,
        **case,
    )
