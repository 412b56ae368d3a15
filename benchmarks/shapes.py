"""Models to measure: the published shapes with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# As in the published `config.json` of each model; time and memory depend on nothing else of it.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {  # HuggingFaceTB/SmolLM2-135M
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {  # meta-llama/Llama-2-7b-hf
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "gemma2-2b": {  # google/gemma-2-2b
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "tiny": {  # to try the programs themselves in a second
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}


def build_config(shape: str, num_layers: int | None = None) -> PretrainedConfig:
    """The configuration of a shape, with another number of blocks where asked for."""
    from transformers import AutoConfig

    settings = dict(SHAPES[shape])
    if num_layers is not None:
        settings["num_hidden_layers"] = num_layers
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def build_model(
    shape: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    num_layers: int | None = None,
    *,
    attn_implementation: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A model of the shape with random weights, made in `dtype` on `device`, in evaluation mode.

    Args:
        num_layers: blocks, where not the shape's own (a model too large for the machine).
        attn_implementation: Transformers' name of the attention kernel; its own choice where None.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            build_config(shape, num_layers), dtype=dtype, attn_implementation=attn_implementation
        )
    return model.eval()
