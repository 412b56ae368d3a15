"""The settings of a run as one typed tree, shared by YAML, `--set` and `DeepSupervisionConfig`; imports no torch.

Defaults stand beside their reason; the measured ones are explained in docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pivotune.config.messages import LIST_TAG
from pivotune.config.registry import METHODS
from pivotune.config.supervision import Section, SupervisionConfig, check_signals
from pivotune.config.training_ranges import check_ranges
from pivotune.text.languages import check_language, is_english

MethodName = Annotated[str, AfterValidator(METHODS.check)]


def _language_code(value: Any, option: str) -> Any:
    """Check a language code; YAML reads the code of Norwegian as false."""
    value = "no" if value is False else value
    if isinstance(value, str):
        check_language(value, option)
    return value


class EncodingConfig(Section):
    """Settings of the encoding: the part of `data` that a trainer needs beside its rows."""

    # A list names every language of the rows. Rows that name none are of the first.
    language: str | list[str] | None = None
    # The share of a language in an epoch is proportional to rows^(1/temperature).
    language_temperature: float = Field(default=1.0, ge=1, le=1000)
    template: str | None = None  # chat where the tokenizer has one, alpaca otherwise
    turns: Literal["all", "last"] = "all"  # answers of a conversation that are trained
    fold_system: bool = False  # a system message becomes the beginning of the first user text
    # A quarter keeps the model able to answer in English, which inner logits losses otherwise destroy (measured).
    english_ratio: float = Field(default=0.25, ge=0, lt=1)
    max_prompt_tokens: int = Field(default=256, ge=1)
    max_completion_tokens: int = Field(default=256, ge=1)
    # Tokens of the rows of an epoch: rows are taken in an order drawn by the seed until it is full; None for all rows.
    token_budget: Annotated[int, Field(ge=1)] | None = None
    on_bad_row: Literal["error", "skip"] = "error"

    @property
    def saved_template(self) -> str | None:
        """Return the template to use with the saved tokenizer: it holds the text of a Jinja file as its chat template."""
        return self.template if self.template in (None, "chat", "alpaca") else "chat"

    @property
    def languages(self) -> list[str]:
        """Return the codes of `language`; none where it is not set."""
        return [self.language] if isinstance(self.language, str) else self.language or []

    @field_validator("language", mode="before")
    @classmethod
    def _check_codes(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return _language_code(value, "data.language")
        codes = [_language_code(code, "data.language") for code in value]
        if not codes or not all(isinstance(code, str) for code in codes):
            raise ValueError(f"data.language: {value} is not allowed; allowed: a code, or a list of codes")
        for code in codes:
            if codes.count(code) > 1:
                raise ValueError(f"data.language: {code} is named twice")
            if len(codes) > 1 and is_english(code):
                raise ValueError(f"data.language: {code} is English, the other side of every row")
        return codes


class DataSource(Section):
    """One file or Hub dataset of several to train on; text alone is its path."""

    path: str
    english: str | None = None  # one aligned English file beside it
    # Times that a row is seen in an epoch, held-out rows aside: 2 is every row twice, 0.5 a half drawn once by the seed.
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    language: str | None = None  # of rows that name none themselves; `data.language` if absent

    @field_validator("language", mode="before")
    @classmethod
    def _check_code(cls, value: Any) -> Any:
        return _language_code(value, "data.train: language")


class DataConfig(EncodingConfig):
    """Training and held-out rows, and their encoding."""

    # The discriminator keeps the form that was not meant out of messages.
    train: Annotated[
        Annotated[str, Tag("str")] | Annotated[list[DataSource], Tag(LIST_TAG)],
        Discriminator(lambda train: "str" if isinstance(train, str) else LIST_TAG),
    ]
    english: str | None = None  # one aligned English file beside `train`
    # Rows, share (at most 500 rows) or file.
    validation: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] | str = 0.05
    validation_english: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None  # rows of each source

    @property
    def sources(self) -> list[DataSource]:
        """Return the sources of `train`."""
        return [DataSource(path=self.train, english=self.english)] if isinstance(self.train, str) else self.train

    @field_validator("train", mode="before")
    @classmethod
    def _text_is_a_path(cls, train: Any) -> Any:
        if isinstance(train, str):
            return train
        entries = [train] if isinstance(train, Mapping) else train
        kinds = (str, Mapping, DataSource)
        if not (isinstance(entries, list) and entries and all(isinstance(entry, kinds) for entry in entries)):
            raise PydanticCustomError(
                "sources", "a file, a Hub dataset, or a list of them and of {path, english, weight, language}"
            )
        return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]

    @model_validator(mode="after")
    def _sources_are_distinct(self) -> DataConfig:
        if self.english is not None and not isinstance(self.train, str):
            raise ValueError("data.english: belongs to one file; write {path: FILE, english: FILE} into data.train")
        paths = [Path(source.path).expanduser().absolute() for source in self.sources]
        for source, path in zip(self.sources, paths, strict=True):
            if paths.count(path) > 1:
                # Its rows would be trained on and held out.
                raise ValueError(f"data.train: {source.path} is named twice; give it weight: 2")
        return self


class CrossLingualConfig(Section):
    """Shares of the rows of `method: cross-lingual`; the others are translated rows."""

    english_answers: Annotated[float, Field(ge=0, le=1)] = 1 / 3  # target prompt, English answer
    english_prompts: Annotated[float, Field(ge=0, le=1)] = 0.0  # English prompt, target answer
    translations: Annotated[float, Field(ge=0, le=1)] = 0.0  # of the answer, half of them into English

    @model_validator(mode="after")
    def _shares_of_one(self) -> CrossLingualConfig:
        total = self.english_answers + self.english_prompts + self.translations
        if total > 1 + 1e-9:
            raise ValueError(f"cross_lingual: the shares add up to {total:g}; allowed: at most 1")
        return self


class CodeSwitchingConfig(Section):
    """Prompts of `method: sdrrl` in which words are replaced by their counterparts in the other language."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.5  # of the rows with a question and its answer
    probability: Annotated[float, Field(gt=0, le=1)] = 0.3  # for each word that has a counterpart
    dictionary: str | None = None  # file of `English word, TAB, target word`; None: aligned in the prompts of the rows

    @model_validator(mode="after")
    def _dictionary_is_used(self) -> CodeSwitchingConfig:
        if self.dictionary is not None and not self.share:
            raise ValueError("sdrrl.code_switching: share: 0 does not use the dictionary; leave one of them out")
        return self


_Weight = Annotated[float, Field(ge=0, le=1000)]


class SdrrlConfig(Section):
    """Weights of the kinds of rows of `method: sdrrl`, relative to their sum."""

    # Question and answer: target_english is a question in the target language with its English answer.
    target_target: _Weight = 1.0
    target_english: _Weight = 1.0
    english_target: _Weight = 1.0
    english_english: _Weight = 1.0
    translation: _Weight = 1.0  # of the answer, half of them into English
    completion: _Weight = 1.0  # of the target answer from its first half
    name_language: bool = True  # the prompt asks for the answer's language where it has another
    code_switching: CodeSwitchingConfig = CodeSwitchingConfig()

    @property
    def shares(self) -> list[float]:
        """Return the shares of the kinds in the order above, which add up to 1."""
        total = sum(self._weights())
        return [weight / total for weight in self._weights()]

    def _weights(self) -> list[float]:
        names = ("target_target", "target_english", "english_target", "english_english", "translation", "completion")
        return [getattr(self, name) for name in names]

    @model_validator(mode="after")
    def _some_weight(self) -> SdrrlConfig:
        if not any(self._weights()):
            raise ValueError("sdrrl: all weights are 0; allowed: at least one above 0")
        return self


class LoraSettings(Section):
    """Low-rank adapters in place of full fine-tuning."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class FaultsConfig(Section):
    """Reactions to faults of a training (docs/reliability.md)."""

    # A non-finite number means that rows or settings are wrong: stopping shows it.
    nonfinite: Literal["stop", "skip"] = "stop"
    skip_limit: Annotated[int, Field(ge=0)] = 10  # optimizer steps that a run may skip
    # Seconds that a collective of several processes may wait; longer than any pause of a healthy run. 0: a week.
    hang_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1800.0


# Settings in place of the defaults above; keys that are given change them.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    # arXiv 2503.01275: unweighted inner losses all the way, read through the logit lens, translated rows only.
    "paper": {
        "data": {"english_ratio": 0.0},
        "supervision": {
            "conversion": {"weight": 1.0},
            "thinking": {"weight": 1.0},
            "schedule": "constant",
            "lens": "logit",
            "layers": "paper",
            "logits": {"gradient": "all"},
        },
    },
}


def merged(defaults: Any, given: Any) -> Any:
    """Return nested settings in which `given` values replace `defaults`."""
    if not (isinstance(defaults, Mapping) and isinstance(given, Mapping)):
        return given
    both = {key: merged(defaults[key], given[key]) for key in defaults.keys() & given.keys()}
    return {**defaults, **given, **both}


class RunConfig(Section):
    """Everything `pivotune train` reads."""

    model: str
    preset: Literal["recommended", "paper"] = "recommended"
    method: MethodName = "deep-supervision"
    data: DataConfig
    supervision: SupervisionConfig = SupervisionConfig()
    cross_lingual: CrossLingualConfig = CrossLingualConfig()
    sdrrl: SdrrlConfig = SdrrlConfig()
    training: dict[str, Any] = Field(default_factory=dict)  # fields of transformers.TrainingArguments
    faults: FaultsConfig = FaultsConfig()
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of a moving average of the weights, which is saved
    # Share of the trained weights; the rest are the starting ones.
    interpolate: Annotated[float, Field(gt=0, le=1)] = 1.0
    lora: LoraSettings | None = None
    quantize: Literal["4bit"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    output_dir: str
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, settings: Any) -> Any:
        preset = settings.get("preset") if isinstance(settings, Mapping) else None
        return merged(PRESETS[preset], settings) if isinstance(preset, str) and preset in PRESETS else settings

    @field_validator("training")
    @classmethod
    def _numbers_and_strategies(cls, training: dict[str, Any]) -> dict[str, Any]:
        """Check numbers; YAML reads `save_strategy: no` as false."""
        check_ranges(training)
        return {key: "no" if value is False and key.endswith("_strategy") else value for key, value in training.items()}

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.quantize and self.lora is None:
            raise ValueError("quantize: 4bit trains adapters only; add lora: {r: 16}")
        check_signals(self.method, self.supervision)
        return self
