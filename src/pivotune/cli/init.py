"""`pivotune init`: a commented run configuration to start from."""

from __future__ import annotations

from typing import Annotated

import typer

from pivotune.errors import UsageError

_DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HEAD = """\
# pivotune train run.yaml            (change any key with --set, e.g. --set training.num_train_epochs=1)
model: {model}   # Hub name, folder, or bundled:smollm2-135m-instruct
preset: recommended                   # or paper: unweighted inner losses through the logit lens, no English rows;
                                      # keys behind a # below show what it gives, and change it without the #
method: {method}                 # {methods}

data:
  train: {data}                  # rows with prompt, completion, prompt_en, completion_en (or Alpaca, or messages)
  validation: 0.05                    # held out: number of rows, share below 1 (at most 500 rows), or a file
  language: {language}                        # code of the target language, for reports
  # template: chat                    # chat | alpaca | a Jinja file; chat where the tokenizer has a chat template
  {ratio}                 # share of the rows trained in English, so that English is not forgotten
  max_prompt_tokens: 256
  max_completion_tokens: 256
  on_bad_row: error                   # error | skip
"""

_SUPERVISION = """
supervision:
  thinking: {signal: logits, layer: auto} # English thinking, weight 0.3: logits | feature | contrastive | cka
  # conversion: {signal: logits, layer: auto} # language conversion at a bottom layer; off unless given
  # schedule: linear                  # constant | linear | cosine, down to 0 at the last step
  # lens: tuned                       # logit (raw states) | tuned (fitted before training) | model (its upper layers)
  # logits: {gradient: prompt}        # prompt | all; with all the English tokens train the layers, too
  # layers: reading                   # rule for `auto`: reading (what each layer can say) | paper (entropy curve)
  # balance: {mode: none}             # bounds: none | gradient (inner gradients at most half of the task's)
  # keep_english: {kl: 0}             # weight of the KL from the starting model, on rows trained in English
  # phase: {steps: 0}                 # optimizer steps that train the inner losses alone, before plain training
  feature: {pooling: mean, span: query, english: detached} # mean | last; query | query+answer; detached | joint | frozen
"""

# Sections of methods, by the method's name.
_SECTIONS = {
    "cross-lingual": """
# cross_lingual:                      # shares of the rows; the others have prompt and answer in the target language
#   english_answers: 0.333            # target prompt, English answer
#   english_prompts: 0                # English prompt, target answer
#   translations: 0                   # of the answer, half of them into English
""",
    "sdrrl": """
# sdrrl:                              # weights of the kinds of rows, relative to their sum
#   target_target: 1                  # question and answer in the target language
#   target_english: 1                 # question in the target language, English answer
#   english_target: 1
#   english_english: 1
#   translation: 1                    # of the answer, half of them into English
#   completion: 1                     # of the target answer, from its first half
#   name_language: true               # the question asks for the answer's language where that is the other one
#   code_switching: {share: 0.5, probability: 0.3} # share of the questions; of their words; dictionary: words.tsv
""",
}

_TAIL = """
training:                             # fields of transformers.TrainingArguments
  num_train_epochs: 3
  learning_rate: 2.0e-5
  lr_scheduler_type: cosine
  warmup_steps: 0.03                  # a share of all steps
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 4
  save_strategy: epoch
  save_total_limit: 2

# ema: 0.99                           # save a moving average of the weights
# interpolate: 0.7                    # save 0.7 times the trained and 0.3 times the starting weights
faults: {nonfinite: stop}             # stop | skip; on a non-finite loss or gradient
lora: null                            # or {r: 16, alpha: 32, dropout: 0.05, target_modules: all-linear}
output_dir: runs/{run}
seed: 0
"""


def init(
    method: Annotated[
        str, typer.Option(help="deep-supervision, cross-lingual, sdrrl, plug, tft or english-only.")
    ] = "deep-supervision",
    model: Annotated[str, typer.Option(help="Hub name, folder or bundled model.")] = _DEFAULT_MODEL,
    data: Annotated[str, typer.Option(help="Training rows.")] = "pairs.jsonl",
    language: Annotated[str, typer.Option("--lang", "--language", help="Code of the target language.")] = "vi",
) -> None:
    """Print a commented run configuration: `pivotune init > run.yaml`."""
    from pivotune.config.registry import METHODS
    from pivotune.text.languages import check_language

    if method not in METHODS:
        raise UsageError(f"--method: {method!r} is not allowed; allowed: {', '.join(METHODS)}")
    method = METHODS.check(method)
    check_language(language, "--lang")
    print(render(method, model=model, data=data, language=language), end="")


def render(method: str, *, model: str, data: str, language: str) -> str:
    """Return the configuration as YAML text with comments."""
    from pivotune.config.registry import METHODS
    from pivotune.config.yaml_text import to_yaml

    def scalar(value: str) -> str:
        return to_yaml(value).removesuffix("...\n").strip()

    ratio = "# english_ratio: 0.25" if METHODS[method].replay else "english_ratio: 0"
    texts = {"model": scalar(model), "data": scalar(data), "language": scalar(language), "methods": " | ".join(METHODS)}
    head = _HEAD.format(method=method, ratio=ratio, **texts)
    tail = _TAIL.replace("runs/{run}", scalar(f"runs/{language}-{method}"))
    own = _SUPERVISION if METHODS[method].inner_losses else _SECTIONS.get(method, "")
    return head + own + tail
