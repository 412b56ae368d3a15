"""Local models that translate: encoder-decoders through Transformers or CTranslate2, and chat models (`chat.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from pivotune.errors import UsageError
from pivotune.models.loading import load_on_device, load_tokenizer, read_config
from pivotune.models.locating import one_line_errors
from pivotune.text.languages import find_language, known_language
from pivotune.translate.batches import rows_per_step, run_in_batches
from pivotune.translate.chat import ChatTranslator, prepare_chat

# Tokens of NLLB (`vie_Latn`), mBART-50 (`vi_VN`) and M2M100 (`__vi__`), which begin the translation, and of MADLAD-400
# (`<2vi>`) and Marian (`>>vie<<`), which begin the English text.
_LANGUAGE_TOKEN = re.compile(
    r"(?P<nllb>[a-z]{3}_[A-Z][a-z]{3})|(?P<mbart>[a-z]{2}_[A-Z]{2})|__(?P<m2m>\w{2,3})__"
    r"|(?P<prefix><2(?P<madlad>\w{2,11})>|>>(?P<marian>\w{2,11})<<)"
)
# Translation models are trained on sentences, and leave sentences out of longer texts.
_SENTENCE_END = re.compile(
    r"(?<=[。！？])(?![”’」』）])|(?:(?<=[.!?।۔؟])|(?<=[.!?][\"')\]”’]))(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bvs\.)(?<!\bMrs\.)"
    r"(?<!\be\.g\.)(?<!\bi\.e\.)[ \t]+(?=[\"'(\[“‘]?[^\W_a-z])"
)
# Characters of a part of an endless sentence: about 150 tokens of the 512 that models read.
_LONGEST_PART = re.compile(r".{1,600}(?:\s+|$)|\S+", re.DOTALL)
_SHORTEST_LIMIT = 32
# Tokens that models read if nothing limits them.
_LONGEST_INPUT = 512


class LanguageToken(NamedTuple):
    """The token of a language in a model's vocabulary, its code there, and True if it begins the English text."""

    token: str
    code: str
    is_prefix: bool


def find_language_token(vocabulary: Sequence[str], wanted: str) -> LanguageToken | None:
    """Return the token of a language: the one with the wanted code itself, else the shortest; None without one."""
    language = find_language(wanted)
    found = []
    for token in vocabulary:
        if (match := _LANGUAGE_TOKEN.fullmatch(token)) and match.lastgroup:
            code = next(match[name] for name in ("nllb", "mbart", "m2m", "madlad", "marian") if match[name])
            if known_language(code) == language:
                found.append(LanguageToken(token, code, match["prefix"] is not None))
    typed = wanted.strip().lower().replace("-", "_")
    return min(found, key=lambda entry: (entry.code.lower() != typed, len(entry.token), entry.token), default=None)


@dataclass
class LocalTranslator:
    """Translates sentences in batches of similar length, with the beams of the model's generation settings.

    Attributes:
        target: the language's token; None for a model with one target language.
        joint: text between two sentences.
    """

    model: Any
    tokenizer: Any
    target: LanguageToken | None
    joint: str = " "

    @property
    def device(self) -> str:
        return self.model.device.type

    @property
    def rows_per_step(self) -> int:
        return rows_per_step(self.device)

    def __call__(self, texts: Sequence[str]) -> list[str]:
        split = [_sentences(text) for text in texts]
        sentences = list(dict.fromkeys(part for parts in split for part in parts))
        answers = run_in_batches(sentences, self._translate_batch, self.device)
        known = {part: answer.strip() or part for part, answer in zip(sentences, answers, strict=True)}
        return [self.joint.join(known[part] for part in parts) for parts in split]

    def _translate_batch(self, texts: Sequence[str]) -> list[str]:
        if self.target and self.target.is_prefix:
            texts = [f"{self.target.token} {text}" for text in texts]
        return self._generate(list(texts), self.target if self.target and not self.target.is_prefix else None)

    def _generate(self, texts: list[str], first: LanguageToken | None) -> list[str]:
        """Return the translations of one batch, which begin with the token `first`."""
        import torch

        config, options = self.model.config, {}
        limit = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or _LONGEST_INPUT)
        if first:
            options["forced_bos_token_id"] = self.tokenizer.convert_tokens_to_ids(first.token)
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        # Room for languages with many tokens a word; without an end token a loop ends there.
        room = min(3 * inputs["input_ids"].shape[1] + _SHORTEST_LIMIT, limit - 1)
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=room, do_sample=False, **options)
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)


class ConvertedTranslator(LocalTranslator):
    """Translates with a model that was converted for CTranslate2, with its default of two beams."""

    @property
    def device(self) -> str:
        return self.model.device

    def _generate(self, texts: list[str], first: LanguageToken | None) -> list[str]:
        limit = min(self.tokenizer.model_max_length, _LONGEST_INPUT)
        ids = self.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        longest = 3 * max(map(len, ids)) + _SHORTEST_LIMIT
        tokens = [self.tokenizer.convert_ids_to_tokens(text) for text in ids]
        prefixes = [[first.token]] * len(texts) if first else None
        results = self.model.translate_batch(tokens, target_prefix=prefixes, max_decoding_length=longest)
        best = [self.tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
        return self.tokenizer.batch_decode(best, skip_special_tokens=True)


Translator = LocalTranslator | ChatTranslator


def _sentences(text: str) -> list[str]:
    return [part.rstrip() for sentence in _SENTENCE_END.split(text) for part in _LONGEST_PART.findall(sentence)]


def prepare_translator(
    name: str,
    wanted: str,
    source: str = "en",
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    engine: str = "hf",
) -> Callable[[], Translator]:
    """Check a model that translates one language into another; the function that is returned loads its weights.

    Args:
        wanted: code of the language to translate into.
        tokenizer: folder or Hub name of the tokenizer of a model that was converted for CTranslate2.
        engine: of a chat model, `hf` or `vllm`.

    Raises:
        UsageError: as `load_model`; no such language in the tokenizer's vocabulary, or another source; an option that
            does not go with the kind of the model.
    """
    converted = (Path(name).expanduser() / "model.bin").is_file()
    if tokenizer and not converted:
        raise UsageError(f"--tokenizer: goes with a model that was converted for CTranslate2; {name} has no model.bin")
    if converted and find_spec("ctranslate2") is None:
        raise UsageError(f"{name}: was converted for CTranslate2, which is not installed: pip install ctranslate2")
    is_chat = not converted and not read_config(name, revision=revision, translates=True).is_encoder_decoder
    if is_chat:
        return prepare_chat(name, find_language(source), find_language(wanted), revision=revision, engine=engine)
    if engine == "vllm":
        raise UsageError(f"--engine: vllm runs chat models, and {name} is an encoder-decoder; use --engine hf")
    loaded: Any
    if converted:
        from transformers import AutoTokenizer

        with one_line_errors(tokenizer or name, "tokenizer"):
            loaded = AutoTokenizer.from_pretrained(tokenizer or Path(name).expanduser())
    else:
        loaded = load_tokenizer(name, revision=revision, translates=True)
    parts = loaded, *_prepare_languages(name, loaded, wanted, source)
    if converted:
        return lambda: ConvertedTranslator(_load_converted(name), *parts)
    options: Any = {"gpu_dtype": "bfloat16", "revision": revision, "translates": True}
    return lambda: LocalTranslator(load_on_device(name, **options), *parts)


def _load_converted(name: str) -> Any:
    import ctranslate2  # pyright: ignore[reportMissingImports]

    device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    try:
        return ctranslate2.Translator(str(Path(name).expanduser()), device=device)
    except (RuntimeError, ValueError) as error:  # a damaged model, one of a later version, or a decoder
        raise UsageError(f"{name}: the model cannot be loaded: {error}") from error


def _prepare_languages(name: str, tokenizer: Any, wanted: str, source: str) -> tuple[LanguageToken | None, str]:
    """Set the tokenizer's source language; return the token of the target and the text between its sentences."""
    vocabulary, language = list(tokenizer.get_vocab()), find_language(wanted)
    target, own = (find_language_token(vocabulary, code) for code in (wanted, source))
    # Marian's tokenizer names its two languages; a model with one target has no tokens for them.
    known_source, known_target = (str(tokenizer.init_kwargs.get(f"{side}_lang") or "") for side in ("source", "target"))
    # A group of languages (`mul`, `roa`) is no language.
    if known_language(known_source) not in (None, find_language(source)):
        raise UsageError(f"{name}: translates from {known_source}, not from {find_language(source).name}")
    if target is None and known_language(known_target) != language:
        only = f"translates into {known_target} and" if known_target else "its tokenizer"
        raise UsageError(f"{name}: {only} has no token of {language.name}; choose a model that translates into it")
    if target and not target.is_prefix:
        if own is None:
            raise UsageError(f"{name}: its tokenizer has no token of {find_language(source).name}, the source language")
        tokenizer.src_lang = own.code
    # Thai and others without spaces between words have them between sentences.
    return target, "" if language.script in ("Hans", "Hant", "Jpan") else " "
