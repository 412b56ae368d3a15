"""Which kind of device a tensor counts as: its own, or the one that an estimate is made for on another machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_assumed: ContextVar[str | None] = ContextVar("assumed_device_kind", default=None)


def device_kind(tensor: Tensor) -> str:
    """`cpu`, `cuda`...: what choices between kernels and chunk sizes go by."""
    return _assumed.get() or tensor.device.type


@contextmanager
def assumed_device_kind(kind: str) -> Iterator[None]:
    """Inside the context every tensor counts as one of `kind`."""
    token = _assumed.set(kind)
    try:
        yield
    finally:
        _assumed.reset(token)
