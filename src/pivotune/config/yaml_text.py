"""Run configurations as YAML text: read, changed with `--set`, written."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pivotune.config.messages import validate
from pivotune.config.settings import RunConfig
from pivotune.config.training_fields import check_training
from pivotune.errors import UsageError
from pivotune.text.redaction import redact_settings


def load_config(path: str | Path, changes: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `--set` changes such as `training.learning_rate=1e-4`.

    Raises:
        UsageError: no such file, broken YAML, unknown key, or a value that is not allowed or has no effect.
    """
    settings = apply_changes(read_yaml(Path(path)), changes)
    try:
        config = parse_config(settings, where=str(path))
        check_training(config.training, where=str(path))
    except UsageError as error:
        # Without the values, among which may be a token.
        keys = dict.fromkeys(change.partition("=")[0].strip() for change in changes)
        message = str(error).removeprefix(f"{path}: ")
        # The keys that the message names, or else those of the section that it names.
        by_part = ([key for key in keys if key.split(".")[part] in re.findall(r"\w+", message)] for part in (-1, 0))
        named = ", ".join(next(filter(None, by_part), []))
        raise UsageError(f"{path} with --set {named}: {message}" if named else f"{path}: {message}") from error
    return config


def parse_config(settings: Mapping[str, Any], *, where: str = "configuration") -> RunConfig:
    """Check settings and fill in defaults; `where` names them in messages."""
    return validate(RunConfig, settings, where=where)


def apply_changes(settings: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Return the settings with `key.path=value` changes applied; values are read as YAML."""
    result = copy.deepcopy(dict(settings))
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {change}: expected key=value, such as training.learning_rate=1e-4")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {change}: the value is not valid YAML") from error
        section = result
        *parents, last = key.strip().split(".")
        for name in parents:
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                raise UsageError(f"--set {change}: {name} is a value, not a section")
        section[last] = value
    return result


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML, with defaults and without secrets (`training.hub_token`)."""
    return to_yaml(redact_settings(config.model_dump(mode="json")))


def to_yaml(value: Any) -> str:
    """Return YAML that `load_config` reads back as `value`."""
    # A folded text could not stand behind a key with a comment.
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


_MOST_ALIASES = 20


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 2e-5 is a number, a date is text, and a repeated key is an error."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._num_aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Limit aliases: aliases of aliases grow exponentially when they are expanded."""
        if self.check_event(yaml.AliasEvent):
            self._num_aliases += 1
            if self._num_aliases > _MOST_ALIASES:
                problem = f"more than {_MOST_ALIASES} aliases (*name); write the values out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                problem = f"the key {key.value} stands here again, first in line {lines[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value if isinstance(key, yaml.ScalarNode) else id(key)] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quote texts that `_Loader` would read as another type."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 needs a point and a sign in the exponent and reads 2e-5 as text.
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
for _resolver in (_Loader, _Dumper):
    _resolver.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file.

    Raises:
        UsageError: no such file, not UTF-8, broken YAML, or no keys.
    """
    if not path.is_file():
        if path.is_dir():
            own = path / "config.yaml"
            raise UsageError(f"{path}: a folder; give a YAML file" + (f", such as {own}" if own.is_file() else ""))
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise UsageError(f"{path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise UsageError(f"{path}{line}: not valid YAML: {problem}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text") from error
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else type(settings).__name__
        raise UsageError(f"{path}: expected keys such as model: and data:, found {found}")
    return settings
