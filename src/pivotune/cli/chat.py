"""`pivotune chat`: talk to a model or a run, or see two of them answer side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli.common import console, print_json_line, printable, quiet_libraries, safe, stderr
from pivotune.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pivotune.data.examples import Encoder

EXIT_WORDS, RESET_WORD = ("/exit", "/quit"), "/reset"


def chat(
    run_or_model: Annotated[str, typer.Argument(help="Run folder, model folder, Hub name or bundled model.")],
    compare: Annotated[str | None, typer.Option(help="Another run or model, to answer side by side.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    template: Annotated[
        str | None, typer.Option(help="chat, alpaca or a Jinja file; without it what a run was trained with.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
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
    quiet_libraries()
    settings = Settings(max_new_tokens, temperature, seed)
    # All that can be wrong is found before the first weights are read.
    prepared = [_prepare(name, template, system) for name in names]
    chatters = [
        Chatter(name, encoder, _load(name), settings, system) for name, encoder in zip(names, prepared, strict=True)
    ]
    session = _Session(chatters, console(as_json), as_json)
    if prompt is not None:
        session.answer(prompt)
    elif sys.stdin.isatty():
        session.talk()
    else:
        session.answer_all(line for line in sys.stdin)


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are generated: greedily at temperature 0, sampled with a seed otherwise."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """For `generate`; top-k and top-p of the model's own settings are switched off."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}


@dataclass
class Chatter:
    """One model in conversation. Templates without room for earlier turns start anew with every prompt."""

    name: str
    encoder: Encoder
    model: Any
    settings: Settings
    system: str | None = None
    turns: list[Mapping[str, str]] = field(default_factory=list)
    dropped: int = 0

    def answer(self, prompt: str, on_text: Callable[[str], None] | None = None) -> str:
        """Answer, remember both, and give the text without the end token; `on_text` gets it piece by piece.

        Raises:
            UsageError: the prompt alone is longer than the model reads.
        """
        import torch

        ids = self._prompt_ids(prompt)
        inputs = torch.tensor([ids], device=next(self.model.parameters()).device)
        torch.manual_seed(self.settings.seed)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self._room(len(ids)),
                use_cache=True,
                pad_token_id=self.encoder.tokenizer.pad_token_id,
                eos_token_id=self._end_ids(),
                streamer=_streamer(self.encoder.tokenizer, on_text) if on_text else None,
                **self.settings.arguments(),
            )
        text = self.encoder.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
        self._remember(prompt, text)
        return text

    def reset(self) -> None:
        """Forget the conversation, not the system message."""
        self.turns.clear()

    def _prompt_ids(self, prompt: str) -> list[int]:
        """The prompt after as many earlier turns as leave room for the answer; the oldest are forgotten first."""
        ids = self._encode(prompt)
        while self.turns and self._room(len(ids)) < self.settings.max_new_tokens:
            del self.turns[:2]
            self.dropped += 1
            ids = self._encode(prompt)
        if self._room(len(ids)) < 1:
            raise UsageError(f"{self.name}: the prompt takes {len(ids)} tokens and the model reads {self._context}")
        return ids

    def _encode(self, prompt: str) -> list[int]:
        from pivotune.data.templates import Turn

        return self.encoder.encode_prompt(Turn(prompt, history=(*_system_turn(self.system), *self.turns)))

    def _remember(self, prompt: str, text: str) -> None:
        # Templates refuse an empty answer in the history, and it says nothing.
        if text and takes_history(self.encoder):
            self.turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]

    @property
    def _context(self) -> int | None:
        from pivotune.training.preparation import context_length

        return context_length(self.model.config)

    def _room(self, used: int) -> int:
        """How many tokens the answer may have after `used` ones."""
        longest = self.settings.max_new_tokens
        return longest if self._context is None else min(longest, self._context - used)

    def _end_ids(self) -> list[int]:
        """What ends an answer: end-of-text, the model's own stop tokens, and the last token of this template's answers."""
        from pivotune.data.templates import Turn
        from pivotune.training.heldout import end_token_ids

        tokenizer = self.encoder.tokenizer
        completion = self.encoder.template.render(Turn("question", "answer")).completion
        return sorted(
            {*end_token_ids(self.model, tokenizer), tokenizer(completion, add_special_tokens=False)["input_ids"][-1]}
        )


def takes_history(encoder: Encoder) -> bool:
    """Whether the template has room for earlier turns."""
    return _accepts(encoder, [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}])


def _accepts(encoder: Encoder, history: list[Mapping[str, str]]) -> bool:
    from pivotune.data.templates import Turn

    try:
        encoder.template.render(Turn("question", history=history))
    except UsageError:
        return False
    return True


def _system_turn(system: str | None) -> list[Mapping[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _prepare(name: str, template: str | None, system: str | None) -> Encoder:
    """Check a model and read its tokenizer and template; a run's own template unless another is asked for."""
    from pivotune.data.examples import Encoder
    from pivotune.data.templates import load_template
    from pivotune.models.loading import check_model, load_tokenizer
    from pivotune.runs.folder import read_run_config

    is_run = (Path(name).expanduser() / "config.yaml").is_file()
    if template is None and is_run:
        template = read_run_config(Path(name).expanduser()).data.template
    check_model(name)
    tokenizer = load_tokenizer(name)
    encoder = Encoder(tokenizer, load_template(template, tokenizer))
    if system and not _accepts(encoder, _system_turn(system)):
        raise UsageError(f"--system: the template {encoder.template.name} of {name} takes no system message")
    return encoder


def _load(name: str) -> Any:
    import torch

    from pivotune.models.loading import load_model

    with stderr.status(f"Loading {safe(name)}"):
        model: Any = load_model(name)
    return model.to("cuda") if torch.cuda.is_available() else model


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class _Streamer(TextStreamer):
        """Hands over text as soon as a word is whole."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


@dataclass
class _Session:
    """Prompts in, answers out: streamed for one model, side by side for two, or as JSON."""

    chatters: list[Chatter]
    out: Console
    as_json: bool
    told: set[str] = field(default_factory=set)

    def talk(self) -> None:
        """Read prompts from a terminal until /exit, Ctrl-D or Ctrl-C."""
        self.out.print("[dim]/reset forgets the conversation, /exit leaves[/]")
        try:
            self.answer_all(self._typed(), lenient=True)
        except KeyboardInterrupt:
            self.out.print()

    def answer_all(self, prompts: Iterator[str], *, lenient: bool = False) -> None:
        """Answer prompts as one conversation; `lenient` goes on after a prompt that cannot be answered."""
        for prompt in map(str.strip, prompts):
            if prompt in EXIT_WORDS:
                return
            if prompt == RESET_WORD:
                for chatter in self.chatters:
                    chatter.reset()
            elif prompt:
                self._answer_or_say_why(prompt, lenient)

    def answer(self, prompt: str) -> None:
        """Answer one prompt."""
        # Undecodable bytes of a terminal are no Unicode and tokenizers fail on them.
        prompt = prompt.encode(errors="replace").decode()
        if self.as_json:
            self._print_json(prompt)
        elif len(self.chatters) == 1:
            self._stream(prompt)
        else:
            self._print_columns(prompt)
        self._tell_dropped()

    def _answer_or_say_why(self, prompt: str, lenient: bool) -> None:
        try:
            self.answer(prompt)
        except UsageError as error:
            if not lenient:
                raise
            stderr.print(f"error: {printable(str(error))}", style="red", markup=False, soft_wrap=True)

    def _typed(self) -> Iterator[str]:
        question = "" if self.as_json else "you> "
        while True:
            try:
                yield input(question)
            except EOFError:
                self.out.print()
                return

    def _stream(self, prompt: str) -> None:
        chatter = self.chatters[0]
        chatter.answer(prompt, lambda text: self.out.out(printable(text), end="", highlight=False))
        self.out.print()

    def _print_columns(self, prompt: str) -> None:
        from rich.table import Table
        from rich.text import Text

        answers = [Text(printable(chatter.answer(prompt))) for chatter in self.chatters]
        table = Table(title=Text(printable(prompt)), expand=True)
        for chatter in self.chatters:
            table.add_column(Text(printable(chatter.name)), ratio=1, overflow="fold")
        table.add_row(*answers)
        self.out.print(table)

    def _print_json(self, prompt: str) -> None:
        answers = {chatter.name: chatter.answer(prompt) for chatter in self.chatters}
        print_json_line({"prompt": prompt, "answers": answers})

    def _tell_dropped(self) -> None:
        for chatter in self.chatters:
            if chatter.dropped and chatter.name not in self.told:
                note = (
                    f"{chatter.name}: the conversation is longer than the model reads; its oldest turns are forgotten"
                )
                stderr.print(printable(note), style="dim", markup=False, soft_wrap=True)
                # Once is enough: from here on every prompt would say it.
                self.told.add(chatter.name)
