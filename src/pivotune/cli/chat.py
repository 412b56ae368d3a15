"""`pivotune chat`: a conversation with a model or a run, or with two of them side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli.common import check_inputs, console, print_lines, printable, quiet_libraries, safe, stderr
from pivotune.errors import UsageError
from pivotune.text.escaping import printable_json

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.data.examples import Encoder

EXIT_WORDS, RESET_WORD = ("/exit", "/quit"), "/reset"


def chat(
    run_or_model: Annotated[str, typer.Argument(help="Run folder, model folder, Hub name or bundled model.")],
    compare: Annotated[str | None, typer.Option(help="Another run or model, to answer side by side.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    template: Annotated[str | None, typer.Option(help="chat, alpaca or a Jinja file; default: the run's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, or part of one (method plug).")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt on stdout.")] = False,
) -> None:
    """Talk to a model. /reset forgets the conversation, /exit leaves; prompts may also come from stdin, one a line."""
    names = [run_or_model] if compare is None else [run_or_model, compare]
    if len(set(names)) < len(names):
        raise UsageError(f"--compare: {compare} is the model itself; name another one")
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt: is empty")
    check_inputs(names)
    quiet_libraries()
    # Every mistake is found before the first weights are read.
    chatters = []
    for name in names:
        encoder, markers = prepare_encoder(name, template, system), _markers_of(name)
        limit = 2 * max_new_tokens if markers else max_new_tokens
        chatters.append(Chatter(name, encoder, None, limit, temperature, seed, system, markers))
    from pivotune.models.loading import load_on_device

    for chatter in chatters:
        with stderr.status(f"Loading {safe(chatter.name)}"):
            chatter.model = load_on_device(chatter.name)
    session = _Session(chatters, console(as_json), as_json)
    if prompt is not None:
        session.answer(prompt)
    elif sys.stdin.isatty():
        session.talk()
    else:
        session.answer_all(_prompts(sys.stdin))


def _prompts(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of stdin; bytes that are not UTF-8 are an error or stand there as surrogates, by the locale."""
    is_empty = True
    try:
        for line in lines:
            line.encode()
            is_empty = is_empty and not line.strip()
            yield line
    except UnicodeError as error:
        raise UsageError("stdin: not UTF-8 text") from error
    if is_empty:
        raise UsageError("stdin: holds no prompt")


@dataclass
class Chatter:
    """One model in conversation: greedy at temperature 0, else sampled with a seed, without top-k and top-p.

    A template without earlier turns starts anew with every prompt. Where answers have two parts with one of `markers`
    between them, later prompts follow the second part alone, as in training.
    """

    name: str
    encoder: Encoder
    model: Any
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    system: str | None = None
    markers: Sequence[str] = ()
    turns: list[Mapping[str, str]] = field(default_factory=list)
    dropped: int = 0

    def answer(self, prompt: str, on_text: Callable[[str], None] | None = None) -> str:
        """Return the answer without the end token and remember the turn; `on_text` gets the text piece by piece.

        Raises:
            UsageError: the prompt alone is longer than the model's context.
        """
        import torch
        from transformers import TextStreamer

        from pivotune.training.heldout import end_token_ids

        tokenizer = self.encoder.tokenizer
        streamer: Any = None
        if on_text is not None:
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
        ids, room = self._prompt_ids(prompt)
        inputs = torch.tensor([ids], device=next(self.model.parameters()).device)
        torch.manual_seed(self.seed)
        sampling: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            sampling |= {"temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=room,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=end_token_ids(self.model, tokenizer, self.encoder.template),
                streamer=streamer,
                **sampling,
            )
        text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
        # Templates refuse an empty answer in the history.
        if text and accepts(self.encoder, ["user", "assistant"]):
            last = min((part for m in self.markers if (part := text.rpartition(m)[2])), key=len, default=text)
            self.turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": last}]
        return text

    def _prompt_ids(self, prompt: str) -> tuple[list[int], int]:
        """Encode the prompt, and return the tokens left for the answer; the oldest turns that leave too few are dropped."""
        from pivotune.data.templates import Turn
        from pivotune.training.preparation import context_length

        context = context_length(self.model.config)
        system = [{"role": "system", "content": self.system}] if self.system else []
        while True:
            ids = self.encoder.encode_prompt(Turn(prompt, history=(*system, *self.turns)))
            room = self.max_new_tokens if context is None else min(self.max_new_tokens, context - len(ids))
            if not self.turns or room >= self.max_new_tokens:
                break
            del self.turns[:2]
            self.dropped += 1
        if room < 1:
            raise UsageError(f"{self.name}: the prompt takes {len(ids)} tokens and the model reads {context}")
        return ids, room


def _markers_of(name: str) -> list[str]:
    """Return the texts between the two parts of a run's answers, by language; none for other models and methods."""
    from pivotune.config.registry import METHODS
    from pivotune.methods.base import marker_in
    from pivotune.runs.folder import find_run_config

    run = find_run_config(name)
    marker = METHODS[run.method].pivot_marker if run else None
    return [marker_in(marker, code) for code in run.data.languages] if run and marker else []


def accepts(encoder: Encoder, roles: Sequence[str]) -> bool:
    """Return True if the template accepts turns of these roles before a question."""
    from pivotune.data.templates import Turn

    try:
        encoder.render(Turn("question", history=[{"role": role, "content": "text"} for role in roles]))
    except UsageError:
        return False
    return True


def prepare_encoder(name: str, template: str | None, system: str | None) -> Encoder:
    """Check a model and read its tokenizer and template: the run's own unless another is named."""
    from pivotune.data.examples import Encoder
    from pivotune.data.templates import load_template
    from pivotune.models.loading import check_model, load_tokenizer
    from pivotune.runs.folder import find_run_config

    fold_system = False
    if template is None and (run := find_run_config(name)):
        template, fold_system = run.data.saved_template, run.data.fold_system
    check_model(name)
    tokenizer = load_tokenizer(name)
    encoder = Encoder(tokenizer, load_template(template, tokenizer), fold_system=fold_system)
    if system and not accepts(encoder, ["system"]):
        raise UsageError(f"--system: the template {encoder.template.name} of {name} takes no system message")
    return encoder


@dataclass
class _Session:
    """Answers prompts: streamed for one model, side by side for two, or as JSON."""

    chatters: list[Chatter]
    out: Console
    as_json: bool
    warned: set[str] = field(default_factory=set)

    def talk(self) -> None:
        """Read prompts from a terminal until /exit, Ctrl-D or Ctrl-C."""
        self.out.print("[dim]/reset forgets the conversation, /exit leaves[/]")
        try:
            self.answer_all(self._typed(), lenient=True)
        except KeyboardInterrupt:
            self.out.print()

    def answer_all(self, prompts: Iterable[str], *, lenient: bool = False) -> None:
        """Answer prompts as one conversation; `lenient` continues after a prompt that cannot be answered."""
        for prompt in map(str.strip, prompts):
            if prompt in EXIT_WORDS:
                return
            if prompt == RESET_WORD:
                for chatter in self.chatters:
                    chatter.turns.clear()
            elif prompt:
                try:
                    self.answer(prompt)
                except UsageError as error:
                    if not lenient:
                        raise
                    print_lines(stderr, f"error: {error}", style="red")

    def answer(self, prompt: str) -> None:
        """Answer one prompt."""
        # A terminal may deliver bytes that are not Unicode, on which tokenizers fail.
        prompt = prompt.encode(errors="replace").decode()
        if self.as_json:
            answers = {chatter.name: chatter.answer(prompt) for chatter in self.chatters}
            # Flushed: a program may wait for the line.
            print(printable_json(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False)), flush=True)
        elif len(self.chatters) == 1:
            self.chatters[0].answer(prompt, lambda text: self.out.out(printable(text), end="", highlight=False))
            self.out.print()
        else:
            from rich.table import Table
            from rich.text import Text

            answers = [Text(printable(chatter.answer(prompt))) for chatter in self.chatters]
            table = Table(title=Text(printable(prompt)), expand=True)
            for chatter in self.chatters:
                table.add_column(Text(printable(chatter.name)), ratio=1, overflow="fold")
            table.add_row(*answers)
            self.out.print(table)
        for chatter in self.chatters:
            if chatter.dropped and chatter.name not in self.warned:
                note = "the conversation is longer than the model reads; its oldest turns are forgotten"
                print_lines(stderr, f"{chatter.name}: {note}", style="dim")
                self.warned.add(chatter.name)

    def _typed(self) -> Iterator[str]:
        with suppress(EOFError):
            while True:
                yield input("" if self.as_json else "you> ")
        self.out.print()
