"""Pivotune: teach an English-centric language model your language (deep supervision fine-tuning, arXiv 2503.01275)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pivotune.config.supervision import SupervisionConfig as SupervisionConfig
    from pivotune.errors import UsageError as UsageError
    from pivotune.evaluation.run import evaluate_model as evaluate_model
    from pivotune.layers.measure import analyze_layers as analyze_layers
    from pivotune.models.loading import load_model as load_model
    from pivotune.models.loading import load_tokenizer as load_tokenizer
    from pivotune.objectives.deep_supervision import deep_supervision_terms as deep_supervision_terms
    from pivotune.objectives.deep_supervision import term_counts as term_counts
    from pivotune.training.arguments import DeepSupervisionConfig as DeepSupervisionConfig
    from pivotune.training.trainer import DeepSupervisionTrainer as DeepSupervisionTrainer

__version__ = "0.1.0"

# Where each public name lives. Loaded on first use: `pivotune --help` must not wait for torch.
_EXPORTS = {
    "DeepSupervisionConfig": "pivotune.training.arguments",
    "DeepSupervisionTrainer": "pivotune.training.trainer",
    "SupervisionConfig": "pivotune.config.supervision",
    "UsageError": "pivotune.errors",
    "analyze_layers": "pivotune.layers.measure",
    "deep_supervision_terms": "pivotune.objectives.deep_supervision",
    "evaluate_model": "pivotune.evaluation.run",
    "load_model": "pivotune.models.loading",
    "load_tokenizer": "pivotune.models.loading",
    "term_counts": "pivotune.objectives.deep_supervision",
}

__all__ = [
    "DeepSupervisionConfig",
    "DeepSupervisionTrainer",
    "SupervisionConfig",
    "UsageError",
    "__version__",
    "analyze_layers",
    "deep_supervision_terms",
    "evaluate_model",
    "load_model",
    "load_tokenizer",
    "term_counts",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pivotune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
