"""Count the code: files, lines, functions, and the files and functions that one training step enters.

python -m benchmarks.structure
"""

from __future__ import annotations

import ast
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import pivotune

SOURCE = Path(pivotune.__file__).parent


def count_code() -> dict[str, Any]:
    """Count files with content, lines, functions, their median length and the share of private ones."""
    texts = [path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    private = [node for node in functions if node.name.startswith("_") and not node.name.endswith("__")]
    return {
        "files": sum(bool(text.strip()) for text in texts),
        "lines": sum(text.count("\n") for text in texts),
        "functions": len(functions),
        "median lines of a function": median((node.end_lineno or 0) - node.lineno + 1 for node in functions),
        "private functions": f"{len(private) / len(functions):.0%}",
    }


def overridden_private_methods() -> list[str]:
    """Return the private methods of `transformers.Trainer` that the trainer overrides."""
    from transformers import Trainer

    from pivotune import DeepSupervisionTrainer

    own = {
        name for cls in DeepSupervisionTrainer.__mro__ if cls.__module__.startswith("pivotune") for name in vars(cls)
    }
    return sorted(name for name in own & vars(Trainer).keys() if name.startswith("_") and not name.endswith("__"))


def trace_step() -> dict[str, set[str]]:
    """Train two steps on a tiny random model; return file -> functions that the second step enters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from pivotune import DeepSupervisionConfig, DeepSupervisionTrainer, SupervisionConfig
    from pivotune.data.examples import Pair, Side

    entered: dict[str, set[str]] = {}

    def trace(frame: Any, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(SOURCE)):
            function = frame.f_code.co_qualname
            if not function.endswith(("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<lambda>")):
                entered.setdefault(str(Path(name).relative_to(SOURCE)), set()).add(function)

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sys.setprofile(trace if state.global_step == 1 else None)

    class Tokenizer:
        pad_token_id = eos_token_id = 0
        model_input_names = ("input_ids",)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, pad_token_id=0
    )
    ids = torch.arange(3, 15, dtype=torch.int32).numpy()
    pairs = [Pair(Side(ids, (1, 4), 6, 9), Side(ids[:10], (1, 4), 5, 9), row) for row in range(1, 17)]
    layers = {"conversion": {"layer": 1}, "thinking": {"layer": 3}}
    with tempfile.TemporaryDirectory() as folder:
        args = DeepSupervisionConfig(
            folder, max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, supervision=SupervisionConfig.model_validate(layers),
        )  # fmt: skip
        tokenizer: Any = Tokenizer()
        trainer = DeepSupervisionTrainer(
            LlamaForCausalLM(config), args, train_dataset=pairs, processing_class=tokenizer, callbacks=[Watch()]
        )
        trainer.train()
    sys.setprofile(None)
    return entered


def main() -> None:
    """Print all figures."""
    for name, value in count_code().items():
        print(f"{name}: {value}")
    methods = overridden_private_methods()
    print(f"private methods of Trainer overridden: {len(methods)} ({', '.join(methods)})")
    entered = trace_step()
    print(f"one training step enters {len(entered)} files, {sum(map(len, entered.values()))} functions")
    for file, functions in sorted(entered.items()):
        print(f"  {file}: {len(functions)}")


if __name__ == "__main__":
    main()
