"""Other libraries measured beside ours; each is left out where it is not installed."""

from __future__ import annotations

from typing import Any


def trl_trainer(model: Any, settings: dict[str, Any]) -> Any | None:
    return None
