"""One line for whatever goes wrong while a model is found and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

from pivotune.errors import UsageError
from pivotune.models.bundled import BUNDLED_MODELS, PREFIX

OFFLINE_MODEL = f"{PREFIX}{next(iter(BUNDLED_MODELS))}"


@contextmanager
def one_line_errors(name: str, what: str) -> Iterator[None]:
    """Turn what Transformers, PEFT and the Hub client raise for unusable files or options into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise UsageError(explain(name, error, what)) from error
    except Exception as error:
        # `tokenizers` raises bare `Exception` for a damaged tokenizer.json; any subclass is not for us.
        if type(error) is not Exception:
            raise
        raise UsageError(explain(name, error, what)) from error


@contextmanager
def about_base_of(name: str) -> Iterator[None]:
    """Say of a mistake in a base model which adapter asked for it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: its base model: {error}") from error


def explain(name: str, error: BaseException, what: str = "model") -> str:
    """What went wrong and what to do, from the errors that led to it; `what` is the part that cannot be loaded."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name}: a gated model: accept its terms on its Hub page, then log in with `hf auth login`"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f"{name}: no such folder, and no such model on the Hugging Face Hub (a private one needs "
            f"`hf auth login`); {OFFLINE_MODEL} needs neither"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{name}: the Hugging Face Hub has no such revision of this model"
    if "trust_remote_code" in str(error):
        return f"{name}: it needs code of its own to be run; set trust_remote_code to true if you trust its author"
    reason = shorten(str(error), width=300) or type(error).__name__
    return f"{name}: the {what} cannot be loaded: {reason}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
