"""Remove secrets from all output: access tokens, passwords, keys.

A secret is recognized by its key (`hub_token`, `password`, `api_key`...), by its form (a Hugging Face token, the
credentials of a URL...), or as the value of an environment variable with such a name (`HF_TOKEN`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"
_NAME = r"(?:token|secret|password|passwd|passphrase|(?:api|access|secret|private)[_-]?key|credentials?)"
_SECRET_NAME = re.compile(rf"(?:.*[_.-])?{_NAME}", re.IGNORECASE)
# Tokens of a tokenizer, not of a service.
_TEXT_TOKEN = re.compile(
    r"(?:.*[_.-])?(?:pad|eos|bos|unk|cls|sep|mask|eot|eom|boi|eoi|image|audio|video|special|end|begin|start|stop)_token",
    re.IGNORECASE,
)
# Forms that GitHub, GitLab, OpenAI, AWS, Google and Slack publish; keys are long and have no other meaning.
_FORMS = re.compile(
    r"(?<![A-Za-z0-9])()(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{20,}|AIza[A-Za-z0-9_-]{35}|AKIA[A-Z0-9]{16}|xox[abpr]-[A-Za-z0-9-]{20,})"
)
# Also with one slash, because a path loses the other. Up to the last `@`, because a password may contain one.
_URL_CREDENTIALS = re.compile(r"(?<=:/)(/?)[^\s/\"']+(?=@)")
_BEARER = re.compile(r"(?i)(?<=bearer )()[A-Za-z0-9._~+/=-]{8,}")
# Only after `authorization`: `basic` alone is an ordinary word.
_HEADER = re.compile(r"(?i)(authorization[\"']?\s*[=:]\s*[\"']?(?:basic|token)\s+)[^\s\"',;}]+")
# `hub_token=x`, `hub_token: "x"`, `'hub_token': 'x'`, `?token=x`.
_NAMED = re.compile(
    rf"(?<![A-Za-z0-9_.-])(?P<name>[A-Za-z0-9_.-]*?{_NAME})(?P<mark>[\"']?\s*[=:]\s*)"
    # Within quotes a quote is escaped by a backslash or doubled; quotes may also be left open.
    r"(?P<value>\"(?:[^\"\\]|\\.|\"\")*\"|'(?:[^'\\]|\\.|'')*'|[\"']?[^\s,;&}\])\"']+)",
    re.IGNORECASE,
)
# `--hub-token x` within a sentence, but not `--hub-token together with`: a word of small letters is no secret.
_OPTION = re.compile(
    rf"(?<![\w-])--(?P<name>(?:[a-z0-9]+[_.-])*{_NAME})(?P<mark>\s+)(?P<value>(?!(?-i:[a-z]+)(?![^\s,;]))[^\s,;]{{8,}})",
    re.IGNORECASE,
)
_SHORTEST = 8  # characters of a secret in an environment variable


def is_secret_name(name: str) -> bool:
    """Return True for the key of a secret: `hub_token`, but not `pad_token` or `max_prompt_tokens`."""
    return _SECRET_NAME.fullmatch(name) is not None and _TEXT_TOKEN.fullmatch(name) is None


def redact(text: str) -> str:
    """Replace everything in a text that looks like a secret."""
    values = (value.strip() for name, value in os.environ.items() if is_secret_name(name))
    # The longest first, because one may be a part of another.
    for value in sorted({value for value in values if len(value) >= _SHORTEST}, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    for pattern in (_FORMS, _URL_CREDENTIALS, _BEARER, _HEADER):
        text = pattern.sub(rf"\g<1>{REDACTED}", text)
    return _OPTION.sub(_without_value, _NAMED.sub(_without_value, text))


def redact_settings(value: Any) -> Any:
    """Drop secrets under their own key from plain settings, and replace those within texts.

    A dropped key is read back as not set, so that no placeholder is ever used as a token.
    """
    if isinstance(value, Mapping):
        return {
            key: redact_settings(item)
            for key, item in value.items()
            # A flag or an empty value under such a key is no secret.
            if item is None or isinstance(item, bool) or not (isinstance(key, str) and is_secret_name(key))
        }
    if isinstance(value, (list, tuple)):
        return [redact_settings(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def redact_command(words: Sequence[str]) -> list[str]:
    """Redact the words of a command line: the value behind `--token` as well as that of `token=`."""
    shown, hide_next = [], False
    for word in words:
        shown.append(REDACTED if hide_next else redact(word))
        hide_next = word.startswith("--") and "=" not in word and is_secret_name(word.lstrip("-").replace("-", "_"))
    return shown


def _without_value(match: re.Match[str]) -> str:
    """Replace the value behind a name, which may be an option's; in a text `mytoken` is one too."""
    if _TEXT_TOKEN.fullmatch(match["name"].replace("-", "_")) or match["value"] == REDACTED:
        return match.group()
    return match.group().removesuffix(match["value"]) + REDACTED
