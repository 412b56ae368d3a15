"""Models behind lm-evaluation-harness: its language model classes generate and score, on Transformers or vLLM.

The Transformers class is the harness's own, except that likelihoods are computed from the final hidden states of the
continuation's tokens alone: the harness makes logits for every token of every prompt, which for a vocabulary of 256,000
is more memory than the model.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from pivotune.errors import UsageError
from pivotune.evaluation.prompts import Prompter
from pivotune.evaluation.requests import Answer, Generation, Likelihood, LogProbability, Question, Request

if TYPE_CHECKING:
    import torch

Backend = Literal["hf", "vllm"]
BACKENDS: tuple[Backend, ...] = ("hf", "vllm")

_SCORED_TOKENS = {"cpu": 2048, "cuda": 32768}
# A step of generation on a CPU is bound by reading the weights: many rows cost little more than one.
_CPU_GENERATION_TOKENS = 32768
_MOST_GENERATION_ROWS = {"cpu": 64, "cuda": 512}
# Share of a GPU's memory beside the weights that keys and values may take; the rest is for what a step makes.
_CACHE_SHARE = 0.25


def check_backend(backend: str) -> None:
    """Raise for a backend that is unknown or not installed, before anything slow."""
    if backend not in BACKENDS:
        raise UsageError(f"--backend: {backend!r} found; allowed: {', '.join(BACKENDS)}")
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("evaluation needs lm-evaluation-harness: pip install 'pivotune[eval]'")
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UsageError("--backend: vllm is not installed: pip install vllm, or use --backend hf")


@dataclass
class Engine:
    """Answers requests in batches.

    Attributes:
        lm: a language model of lm-evaluation-harness.
        prompter: tokenizes as training did; the harness's own border rule moves white space between prompt and answer.
        batch_size: requests at once, or `auto`.
        device_type: `cpu` or `cuda`, for the automatic sizes.
        generation_options: what else this backend is told with every generation.
        generation_tokens: prompt and answer tokens of one batch of generations, whose keys and values are in memory.
    """

    lm: Any
    prompter: Prompter
    batch_size: int | Literal["auto"]
    device_type: str
    generation_tokens: int = _CPU_GENERATION_TOKENS
    generation_options: Mapping[str, Any] = field(default_factory=dict)

    def batches(self, requests: Sequence[Question]) -> Iterator[list[Question]]:
        """Requests of one kind and similar length together, longest first.

        The same requests always give the same batches, whatever is cached, so an evaluation that was interrupted ends
        with the same figures, to the last bit, as one that was not.
        """
        likelihoods = [request for request in requests if isinstance(request, Likelihood)]
        generations = [request for request in requests if isinstance(request, Generation)]
        yield from _cut(self._longest_first(likelihoods), self._scored_rows)
        by_settings: dict[Any, list[Question]] = {}
        for request in generations:
            by_settings.setdefault((request.max_new_tokens, request.stop), []).append(request)
        for (max_new_tokens, _), group in by_settings.items():
            yield from _cut(self._longest_first(group), partial(self._generated_rows, max_new_tokens))

    def answer(self, batch: Sequence[Question]) -> dict[Request, Answer]:
        """Answers to one batch; a batch that does not fit the GPU's memory is halved."""
        try:
            return self._answer(batch)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError" or len(batch) == 1:
                raise
            _empty_cuda_cache()
        half = len(batch) // 2
        return {**self.answer(batch[:half]), **self.answer(batch[half:])}

    def _answer(self, batch: Sequence[Question]) -> dict[Request, Answer]:
        likelihoods = [request for request in batch if isinstance(request, Likelihood)]
        generations = [request for request in batch if isinstance(request, Generation)]
        return {**self._score(likelihoods), **self._generate(generations)}

    def _score(self, requests: Sequence[Likelihood]) -> dict[Request, Answer]:
        if not requests:
            return {}
        pairs = [self.prompter.encode_pair(request.context, request.continuation) for request in requests]
        encoded = [
            ((request.context, request.continuation), *pair) for request, pair in zip(requests, pairs, strict=True)
        ]
        self.lm.batch_size_per_gpu = len(requests)
        # The harness's method for requests that are tokenized already; its text method would tokenize anew.
        scores = self.lm._loglikelihood_tokens(encoded, disable_tqdm=True)
        return {
            request: LogProbability(float(score[0]), len(continuation))
            for request, score, (_, continuation) in zip(requests, scores, pairs, strict=True)
        }

    def _generate(self, requests: Sequence[Generation]) -> dict[Request, Answer]:
        if not requests:
            return {}
        from lm_eval.api.instance import Instance

        self.lm.batch_size_per_gpu = len(requests)
        self.lm.stop_strings = requests[0].stop
        instances = [
            Instance(
                request_type="generate_until",
                doc={},
                arguments=(
                    request.context,
                    {
                        # Stop strings count from the first word on: the harness would end at a line break before it.
                        "until": [],
                        "max_gen_toks": request.max_new_tokens,
                        "do_sample": False,
                        **self.generation_options,
                    },
                ),
                idx=0,
            )
            for request in requests
        ]
        texts = self.lm.generate_until(instances, disable_tqdm=True)
        return {request: _until(text, request.stop) for request, text in zip(requests, texts, strict=True)}

    def _longest_first(self, requests: Sequence[Question]) -> list[tuple[int, Question]]:
        """(tokens, request), sorted by length and then by text: equal prompts stand side by side."""
        lengths = [(self._length(request), request) for request in requests]
        return sorted(lengths, key=lambda pair: (-pair[0], pair[1].context, getattr(pair[1], "continuation", "")))

    def _length(self, request: Question) -> int:
        if isinstance(request, Generation):
            return len(self.prompter.encode_context(request.context))
        return sum(map(len, self.prompter.encode_pair(request.context, request.continuation)))

    def _scored_rows(self, tokens: int) -> int:
        """How many likelihoods go into one batch whose longest has so many tokens."""
        if self.batch_size != "auto":
            return self.batch_size
        return max(1, _SCORED_TOKENS.get(self.device_type, _SCORED_TOKENS["cpu"]) // tokens)

    def _generated_rows(self, max_new_tokens: int, tokens: int) -> int:
        """How many prompts go into one batch whose longest has so many tokens."""
        if self.batch_size != "auto":
            return self.batch_size
        most = _MOST_GENERATION_ROWS.get(self.device_type, _MOST_GENERATION_ROWS["cpu"])
        return max(1, min(most, self.generation_tokens // (tokens + max_new_tokens)))


def _until(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string after its first word."""
    text = text.lstrip()
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


def _cut(requests: Sequence[tuple[int, Question]], rows: Callable[[int], int]) -> Iterator[list[Question]]:
    start = 0
    while start < len(requests):
        count = rows(requests[start][0])
        yield [request for _, request in requests[start : start + count]]
        start += count


def _empty_cuda_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def transformers_engine(
    model: Any, prompter: Prompter, *, batch_size: int | Literal["auto"], end_token_ids: Sequence[int]
) -> Engine:
    """An engine on a loaded Transformers model, on the device it is on.

    Args:
        end_token_ids: tokens that end an answer. The model's other generation settings (sampling, penalties) are set aside:
            answers are greedy for every model alike.
    """
    from transformers import GenerationConfig

    tokenizer = prompter.tokenizer
    model.generation_config = GenerationConfig(
        eos_token_id=list(end_token_ids), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    # Remarks on a model that was loaded before, and on padding.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = _language_model_class(model.config.model_type)(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=1,
        max_length=prompter.max_length or 1 << 20,
        add_bos_token=bool(prompter.begin_ids),
    )
    return Engine(lm, prompter, batch_size, model.device.type, _generation_tokens(model))


def _generation_tokens(model: Any) -> int:
    """How many tokens' keys and values fit beside the weights; from the device's total memory, so that it is the same
    every time."""
    import torch

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
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Engine:
    """An engine on vLLM, through the harness, which loads the model itself; arguments as in `transformers_engine`."""
    from lm_eval.api.registry import get_model

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    backend: Any = get_model("vllm")
    lm = backend(
        pretrained=location,
        tokenizer=location,
        revision=revision,
        tokenizer_revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        batch_size="auto",
        max_length=prompter.max_length,
        add_bos_token=bool(prompter.begin_ids),
    )
    # vLLM makes its own batches; ours only say how often progress is kept.
    size = 1024 if batch_size == "auto" else batch_size
    # An end token that is not the tokenizer's own would otherwise stand in the answer.
    options = {"stop_token_ids": list(end_token_ids), "skip_special_tokens": True}
    return Engine(lm, prompter, size, "cuda", generation_options=options)


def _language_model_class(model_type: str) -> Any:
    """The harness's class for Transformers, with likelihoods that need no full logits (in families we know) and answers
    that end at stop strings from their first word on."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import StoppingCriteriaList

    from pivotune.models.architecture import ARCHITECTURES

    base: Any = HFLM

    class SelectiveHFLM(base):
        """See above; equal prompts are computed once."""

        stop_strings: Sequence[str] = ()

        @torch.inference_mode()
        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            if model_type not in ARCHITECTURES:
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return _continuation_scores(self.model, [pair[1:] for pair in requests], self.max_length)

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            ends = _StopAfterWord(self.tokenizer, context.shape[1], self.stop_strings)
            return self.model.generate(
                input_ids=context,
                attention_mask=options["attention_mask"],
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([ends]),
                do_sample=False,
                use_cache=True,
            )

    return SelectiveHFLM


class _StopAfterWord:
    """Says which rows have come to a stop string behind their first word; a stopping criterion of Transformers."""

    def __init__(self, tokenizer: Any, prompt_length: int, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._start = prompt_length
        self._stop = tuple(stop)
        self._ended: list[bool] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        import torch

        self._ended = self._ended or [False] * input_ids.shape[0]
        if self._stop:
            going = [row for row, ended in enumerate(self._ended) if not ended]
            texts = self._tokenizer.batch_decode(input_ids[going, self._start :], skip_special_tokens=True)
            for row, text in zip(going, texts, strict=True):
                self._ended[row] = any(string in text.lstrip() for string in self._stop)
        return torch.tensor(self._ended, device=input_ids.device)


def _continuation_scores(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], max_length: int
) -> list[tuple[float, bool]]:
    """(log-probability of the continuation, whether it is the greedy one) for every (context, continuation) of one batch.

    Tokens beyond `max_length` are cut from the left, as the harness does.
    """
    import torch

    from pivotune.models.architecture import find_architecture

    # Choices of one token after the same prompt differ in nothing that the model reads.
    rows: dict[tuple[int, ...], int] = {}
    places: list[tuple[int, int, int]] = []  # row, position of the first prediction, tokens
    for context, continuation in pairs:
        ids = (context + continuation)[-(max_length + 1) :][:-1]
        row = rows.setdefault(tuple(ids), len(rows))
        scored = min(len(continuation), len(ids))
        places.append((row, len(ids) - scored, scored))
    architecture = find_architecture(model)
    states = _final_states(model, list(rows), architecture.device)
    index = torch.tensor([(row, start + step) for row, start, count in places for step in range(count)])
    targets = torch.tensor([token for (_, c), (*_, n) in zip(pairs, places, strict=True) for token in c[len(c) - n :]])
    logprobs, greedy = _log_probabilities(architecture, states, index, targets)
    scores, start = [], 0
    for *_, count in places:
        part = slice(start, start + count)
        scores.append((sum(logprobs[part]), all(greedy[part])))
        start += count
    return scores


def _final_states(model: Any, rows: Sequence[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    """States after the final norm, (R, T, width)."""
    import torch

    from pivotune.forward.passes import PassRequest, choose_passes

    length = max(map(len, rows))
    input_ids = torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows], device=device)
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    final = choose_passes(model)(model, batch, PassRequest()).main.final
    assert final is not None
    return final


def _log_probabilities(
    architecture: Any, states: torch.Tensor, index: torch.Tensor, targets: torch.Tensor
) -> tuple[list[float], list[bool]]:
    from pivotune.kernels.cross_entropy import score_labels

    index, targets = index.to(states.device), targets.to(states.device)
    scores = score_labels(architecture, states[index[:, 0], index[:, 1]], targets)
    return cast("list[float]", scores.log_probabilities.tolist()), cast("list[bool]", scores.greedy.tolist())
