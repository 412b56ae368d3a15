"""Models behind lm-evaluation-harness: its language model classes generate and score, on Transformers or vLLM.

On Transformers likelihoods are computed from the final hidden states of the continuation's tokens alone. The harness makes
logits for every token of every prompt, which for a vocabulary of 256,000 takes more memory than the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch

from pivotune.evaluation.cache import Answer, Generation, Likelihood, LogProbability, Pivot, Question, Request
from pivotune.evaluation.prompts import Prompter
from pivotune.forward.passes import PassRequest, choose_passes
from pivotune.kernels.cross_entropy import score_labels
from pivotune.models.architecture import ARCHITECTURES, find_architecture

_SCORED_TOKENS = {"cpu": 2048, "cuda": 32768}
# A step of generation on a CPU is bound by reading the weights: many rows cost little more than one.
_CPU_GENERATION_TOKENS = 32768
_MOST_GENERATION_ROWS = {"cpu": 64, "cuda": 512}
# Share of a GPU's memory beside the weights for keys and values; the rest is for temporary tensors of a step.
_CACHE_SHARE = 0.25


@dataclass
class Engine:
    """Answer requests in batches.

    Attributes:
        lm: a language model of lm-evaluation-harness.
        prompter: tokenizes as training did; the harness's own border rule moves white space between prompt and answer.
        device_type: `cpu` or `cuda`, for automatic batch sizes.
        generation_tokens: limit of prompt and answer tokens in one batch of generations, by memory of keys and values.
        generation_options: further options of the backend for every generation.
    """

    lm: Any
    prompter: Prompter
    batch_size: int | Literal["auto"]
    device_type: str
    generation_tokens: int = _CPU_GENERATION_TOKENS
    generation_options: Mapping[str, Any] = field(default_factory=dict)

    def batches(self, requests: Sequence[Question]) -> Iterator[list[Question]]:
        """Yield batches of one kind and similar length, longest first; likelihoods before generations.

        Equal requests always give equal batches, independent of the cache, so that an interrupted evaluation ends with
        the same figures, to the last bit, as an uninterrupted one.
        """
        groups: dict[tuple[Any, ...], list[Question]] = {(): []}
        for request in requests:
            settings = () if isinstance(request, Likelihood) else (request.max_new_tokens, request.stop)
            groups.setdefault(settings, []).append(request)
        for settings, group in groups.items():
            lengths = [(self._length(request), request) for request in group]
            # Then by text: equal prompts stand side by side.
            lengths.sort(key=lambda pair: (-pair[0], pair[1].context, getattr(pair[1], "continuation", "")))
            start = 0
            while start < len(lengths):
                rows = self._num_rows(lengths[start][0], *settings[:1])
                yield [request for _, request in lengths[start : start + rows]]
                start += rows

    def answer(self, batch: Sequence[Question]) -> dict[Request, Answer]:
        """Return the answers to one batch; a batch that does not fit the GPU's memory is halved."""
        self.lm.batch_size_per_gpu = len(batch)
        answer: Any = self._score if isinstance(batch[0], Likelihood) else self._generate
        try:
            return answer(batch)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError" or len(batch) == 1:
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        half = len(batch) // 2
        return {**self.answer(batch[:half]), **self.answer(batch[half:])}

    def _score(self, requests: Sequence[Likelihood]) -> dict[Request, Answer]:
        pairs = [self.prompter.encode_pair(request.context, request.continuation) for request in requests]
        encoded = [((r.context, r.continuation), *ids) for r, ids in zip(requests, pairs, strict=True)]
        # The harness's method for tokenized requests; its text method would tokenize anew.
        scores = self.lm._loglikelihood_tokens(encoded, disable_tqdm=True)
        return {
            request: LogProbability(float(score[0]), len(continuation))
            for request, score, (_, continuation) in zip(requests, scores, pairs, strict=True)
        }

    def _generate(self, requests: Sequence[Generation]) -> dict[Request, Answer]:
        from lm_eval.api.instance import Instance

        stop = self.lm.stop_strings = requests[0].stop
        # Stop strings count after the first word: the harness would end at a line break before it.
        options = {"until": [], "do_sample": False, **self.generation_options}
        instances = []
        for request in requests:
            arguments = (request.context, {**options, "max_gen_toks": request.max_new_tokens})
            instances.append(Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0))
        answers: dict[Request, Answer] = {}
        for request, text in zip(requests, self.lm.generate_until(instances, disable_tqdm=True), strict=True):
            text = text.lstrip()
            end = min((text.index(string) for string in stop if string in text), default=len(text))
            kept = len(stop[0]) if isinstance(request, Pivot) else 0
            answers[request] = text[: end + kept]
        return answers

    def _length(self, request: Question) -> int:
        if isinstance(request, Generation):
            return len(self.prompter.encode_context(request.context))
        return sum(map(len, self.prompter.encode_pair(request.context, request.continuation)))

    def _num_rows(self, tokens: int, max_new_tokens: int | None = None) -> int:
        """Return the rows of a batch with `tokens` tokens in the longest; `max_new_tokens` for generations."""
        if self.batch_size != "auto":
            return self.batch_size
        device = self.device_type if self.device_type in _SCORED_TOKENS else "cpu"
        if max_new_tokens is None:
            return max(1, _SCORED_TOKENS[device] // tokens)
        return max(1, min(_MOST_GENERATION_ROWS[device], self.generation_tokens // (tokens + max_new_tokens)))


def transformers_engine(
    model: Any, prompter: Prompter, *, batch_size: int | Literal["auto"], end_token_ids: Sequence[int]
) -> Engine:
    """Return an engine on a loaded Transformers model, on its device.

    `end_token_ids` end an answer. The model's other generation settings (sampling, penalties) are ignored: answers are
    greedy for every model.
    """
    from transformers import GenerationConfig

    tokenizer = prompter.tokenizer
    model.generation_config = GenerationConfig(
        eos_token_id=list(end_token_ids), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    # Hides warnings about an already loaded model and about padding.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    options = {"max_length": prompter.max_length or 1 << 20, "add_bos_token": bool(prompter.begin_ids)}
    harness_class = _language_model_class(model.config.model_type, prompter)
    lm = harness_class(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
    return Engine(lm, prompter, batch_size, model.device.type, _generation_tokens(model))


def _generation_tokens(model: Any) -> int:
    """Return how many tokens' keys and values fit beside the weights, from the GPU's total memory, which is constant."""
    if model.device.type != "cuda":
        return _CPU_GENERATION_TOKENS
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    free = torch.cuda.get_device_properties(model.device).total_memory - model.get_memory_footprint()
    return max(1, int(_CACHE_SHARE * free / bytes_per_token))


def vllm_engine(
    location: str,
    prompter: Prompter,
    *,
    batch_size: int | Literal["auto"],
    end_token_ids: Sequence[int],
    **options: Any,
) -> Engine:
    """Return an engine on vLLM; the harness loads the model with `options` (dtype, trust_remote_code, revision)."""
    from lm_eval.api.registry import get_model

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    backend: Any = get_model("vllm")
    options |= {"tokenizer": location, "tokenizer_revision": options.get("revision"), "batch_size": "auto"}
    options |= {"max_length": prompter.max_length, "add_bos_token": bool(prompter.begin_ids)}
    lm = backend(pretrained=location, **options)
    # Generation reads the same tokens as likelihoods.
    lm.tok_encode = lambda texts, **kwargs: [prompter.encode_context(text) for text in texts]
    # vLLM makes its own batches; ours only set how often answers are cached.
    size = 1024 if batch_size == "auto" else batch_size
    # An end token other than the tokenizer's own would otherwise stand in the answer.
    generation_options = {"stop_token_ids": list(end_token_ids), "skip_special_tokens": True}
    return Engine(lm, prompter, size, "cuda", generation_options=generation_options)


def _language_model_class(model_type: str, prompter: Prompter) -> Any:
    """Return the harness's class for Transformers with three changes.

    Likelihoods need no full logits (for known architectures), generation reads the same tokens as they, and stop strings
    end answers after the first word only.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import StoppingCriteriaList

    base: Any = HFLM

    class SelectiveHFLM(base):
        stop_strings: Sequence[str] = ()

        @torch.inference_mode()
        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            if model_type not in ARCHITECTURES:
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return _continuation_scores(self.model, [pair[1:] for pair in requests], self.max_length)

        def tok_batch_encode(
            self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = [prompter.encode_context(text)[-(left_truncate_len or 0) :] for text in strings]
            longest = max(map(len, rows))
            ids = [[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
            mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
            return torch.tensor(ids), torch.tensor(mask)

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            criterion = _StopAfterWord(self.tokenizer, context.shape[1], self.stop_strings)
            inputs = {"input_ids": context, "attention_mask": options["attention_mask"], "max_length": max_length}
            criteria = StoppingCriteriaList([criterion])
            return self.model.generate(**inputs, stopping_criteria=criteria, do_sample=False, use_cache=True)

    return SelectiveHFLM


class _StopAfterWord:
    """Stopping criterion of Transformers: a row ends at a stop string after its first word."""

    def __init__(self, tokenizer: Any, prompt_length: int, stop: Sequence[str]) -> None:
        self._tokenizer, self._start, self._stop = tokenizer, prompt_length, tuple(stop)
        self._ended: list[bool] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        self._ended = self._ended or [False] * input_ids.shape[0]
        if self._stop:
            running = [row for row, ended in enumerate(self._ended) if not ended]
            texts = self._tokenizer.batch_decode(input_ids[running, self._start :], skip_special_tokens=True)
            for row, text in zip(running, texts, strict=True):
                self._ended[row] = any(string in text.lstrip() for string in self._stop)
        return torch.tensor(self._ended, device=input_ids.device)


def _continuation_scores(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], max_length: int
) -> list[tuple[float, bool]]:
    """Return (log-probability, True for the greedy continuation) of every (context, continuation) of one batch."""
    # Choices of one token after the same prompt are equal inputs to the model, so rows are unique.
    rows: dict[tuple[int, ...], int] = {}
    places: list[tuple[int, int, int]] = []  # row, position of the first prediction, tokens
    targets: list[int] = []
    for context, continuation in pairs:
        # Tokens beyond the limit are cut from the left, as in the harness.
        ids = (context + continuation)[-(max_length + 1) :][:-1]
        row = rows.setdefault(tuple(ids), len(rows))
        scored = min(len(continuation), len(ids))
        places.append((row, len(ids) - scored, scored))
        targets += continuation[len(continuation) - scored :]
    architecture = find_architecture(model)
    length = max(map(len, rows))
    columns = {
        "input_ids": [[*row, *[row[-1]] * (length - len(row))] for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (length - len(row)) for row in rows],
    }
    batch = {name: torch.tensor(column, device=architecture.device) for name, column in columns.items()}
    states = choose_passes(model)(model, batch, PassRequest()).main.final  # after the final norm, (R, T, width)
    assert states is not None
    index = [(row, start + step) for row, start, count in places for step in range(count)]
    predicting = states[torch.tensor(index, device=states.device).unbind(1)]
    found = score_labels(architecture, predicting, torch.tensor(targets, device=states.device))
    logprobs, greedy = iter(found.log_probabilities.tolist()), iter(found.greedy.tolist())
    return [(sum(islice(logprobs, count)), all(list(islice(greedy, count)))) for *_, count in places]
