"""Registries of methods, objectives and lenses: one line here adds one to YAML, checks and documents.

An entry names where its implementation lives and is imported on first use, so that a configuration is checked without
torch. Another package registers its own before a configuration is read:

    OBJECTIVES.register("toy", "my_package.toy:Toy", options=ToyOptions)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Generic, TypeVar

from pydantic_core import PydanticCustomError

_T = TypeVar("_T")


@dataclass
class Registry(Generic[_T]):
    """Names and their implementations.

    Args:
        entries: name -> `module:attribute`.
        aliases: other spellings -> name.
        options: name -> settings section (a pydantic model), for entries that have options.
    """

    entries: dict[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self.aliases

    def __getitem__(self, name: str) -> _T:
        """Import and return the implementation of a registered name or alias."""
        module, _, attribute = self.entries[self.aliases.get(name, name)].partition(":")
        return getattr(import_module(module), attribute)

    def register(self, name: str, target: str, *, options: Any = None) -> None:
        """Add an entry; `options` is the pydantic section that YAML may hold under this name."""
        self.entries[name] = target
        if options is not None:
            self.options[name] = options

    def check(self, name: str, *more: str) -> str:
        """Return the canonical name; `more` are allowed beside the registered names.

        Raises:
            PydanticCustomError: the name is not allowed; worded as pydantic words a literal.
        """
        if name not in self and name not in more:
            *names, last = map(repr, [*self.entries, *more])
            expected = f"{', '.join(names)} or {last}" if names else last
            raise PydanticCustomError("registered_name", "Input should be {expected}", {"expected": expected})
        return self.aliases.get(name, name)


METHODS: Registry[Any] = Registry(
    {
        "english-only": "pivotune.methods.baselines:ENGLISH_ONLY",
        "tft": "pivotune.methods.baselines:TFT",
        "deep-supervision": "pivotune.methods.deep_supervision:DEEP_SUPERVISION",
        "cross-lingual": "pivotune.methods.cross_lingual:CROSS_LINGUAL",
        "sdrrl": "pivotune.methods.sdrrl:SDRRL",
        "plug": "pivotune.methods.plug:PLUG",
    },
    # The paper's name: plain supervised fine-tuning on the English rows.
    aliases={"sft": "english-only"},
)
# The method that tables and figures compare others with.
BASELINE_METHOD = "tft"
# The names are the values of `signal`.
OBJECTIVES: Registry[Any] = Registry(
    {
        "logits": "pivotune.objectives.english_nll:build_english_nll",
        "feature": "pivotune.objectives.cosine:Cosine",
        "contrastive": "pivotune.objectives.contrastive:Contrastive",
        "cka": "pivotune.objectives.cka:CenteredKernelAlignment",
    }
)
LENSES: Registry[Any] = Registry(
    {
        "logit": "pivotune.lenses.logit:LogitLens",
        "tuned": "pivotune.lenses.tuned:TunedLens",
        "model": "pivotune.lenses.logit:ModelLens",
    }
)
