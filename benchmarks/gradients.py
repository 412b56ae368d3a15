"""What the inner losses ask of a model before training: KL of each lens, loss, and gradient beside the task's, by layer.

    python -m benchmarks.gradients --model bundled:smollm2-135m-instruct --data rows.jsonl --layers 3,14,20,24

Prints the table of docs/experiments.md for any model and parallel rows: for each lens, loss (LC, ET), gradient (`all`,
`prompt`) and layer, KL(p_L || p_k) of the lens from the output in nats, the loss in nats per English token, the norm of the
gradient relative to that of L_TFT, and its cosines with L_TFT in the target language and in English. Gradients are of one
batch at the start, over the blocks below the layer.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

import torch

from pivotune.config.supervision import SupervisionConfig, TunedLensConfig
from pivotune.data.collator import DeepSupervisionCollator
from pivotune.data.datasets import side_examples, spread
from pivotune.data.examples import Encoder, Example, Limits
from pivotune.data.sources import load_rows
from pivotune.data.templates import load_template
from pivotune.lenses.base import Lens
from pivotune.lenses.logit import LogitLens, ModelLens
from pivotune.lenses.tuned import fit_tuned_lens, lens_texts
from pivotune.models.architecture import find_architecture
from pivotune.models.loading import load_model, load_tokenizer
from pivotune.objectives.deep_supervision import DeepSupervisionLoss
from pivotune.training.arguments import bf16_is_native
from pivotune.training.gradient_balance import measure_gradients

_FITTED_ON = 400


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--data", required=True)
    parser.add_argument("--english", help="aligned English file beside the data")
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")], default=[3, 14, 20, 24])
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch whose gradients are measured")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--lenses", type=lambda text: text.split(","), default=["logit", "tuned", "model"])
    options = parser.parse_args()

    tokenizer: Any = load_tokenizer(options.model)
    model: Any = load_model(options.model, dtype="float32").to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    architecture = find_architecture(model)
    limits = Limits(options.max_tokens, options.max_tokens)
    encoder = Encoder(tokenizer, load_template(None, tokenizer), limits)
    rows = load_rows(options.data, english=options.english, need_english=True)
    pairs = encoder.encode(spread(rows, _FITTED_ON + 2 * options.rows), on_bad_row="skip")
    fitted, measured = pairs[2 * options.rows :], pairs[: options.rows]
    collate = DeepSupervisionCollator(tokenizer.pad_token_id or 0)
    examples = [Example(main=pair.target, parallel=pair.english) for pair in measured if pair.target]
    batch, english = (
        {name: tensor.to(architecture.device) for name, tensor in collate(found).items()}
        for found in (examples, list(side_examples(pairs[options.rows : 2 * options.rows], "english")))
    )
    autocast = torch.autocast(architecture.device.type, torch.bfloat16) if bf16_is_native() else nullcontext()
    with autocast:
        tuned, figures = fit_tuned_lens(model, lens_texts(fitted, "english"), options.layers, TunedLensConfig())
        lenses: dict[str, Lens] = {
            "logit": LogitLens(architecture), "tuned": tuned, "model": ModelLens(architecture)
        }  # fmt: skip
        print("| loss | lens | gradient | layer | KL | loss at start | gradient / TFT's | cos target | cos English |")
        print("|---" * 9 + "|")
        for term, other in (("conversion", "thinking"), ("thinking", "conversion")):
            for lens in options.lenses:
                for gradient in ("all", "prompt"):
                    for layer in options.layers:
                        supervision = SupervisionConfig.model_validate(
                            {term: {"layer": layer}, other: {"signal": "none"}, "logits": {"gradient": gradient}}
                        )
                        losses = DeepSupervisionLoss(supervision, lens=lenses[lens])
                        found = measure_gradients(model, batch, losses, {term: layer}, english)[term]
                        with torch.no_grad():
                            value = losses.terms(model, batch)[term]
                        kl = {"logit": figures[layer].logit_kl, "tuned": figures[layer].kl, "model": 0.0}[lens]
                        cells = f"{kl:.1f} | {value.sum / value.count:.1f} | {found.ratio:.2f} | {found.cosine:.2f}"
                        name = "LC" if term == "conversion" else "ET"
                        print(
                            f"| {name} | {lens} | {gradient} | {layer} | {cells} | {found.english_cosine:.2f} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
