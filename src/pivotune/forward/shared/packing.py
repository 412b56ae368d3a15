"""Many sequences in one forward pass without padding, and branches that leave it early.

All tokens of a batch lie behind each other in one row of length N: first the main sequences, then the tokens of the
branches, the branch with the highest layer first, so that one which has reached its layer leaves by cutting the end off. A
branch continues the prompt of its row: its positions go on from there, and its tokens see the prompt and themselves.

Shapes: B rows, T tokens of the longest main sequence, N packed tokens, n tokens of one segment, R rows of one segment,
Q its longest row, K the longest row of keys (prompt and branch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows with no more padding than this stay padded: taking padding out costs four copies of the attention's inputs and
# outputs in every block, about as much as computing this share of the tokens in vain (docs/performance.md).
PADDING_LEFT_IN = 0.02


# --- from packed tokens to padded rows and back --------------------------------------------------------------------


class _Take(torch.autograd.Function):
    """Rows of `source` at `gather`; gradients are copied, where indexing would add them up one by one.

    Of the rows taken only those at `places` (None: all) get a gradient; their sources must be distinct.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, gather: Tensor, places: Tensor | None) -> Tensor:
        ctx.save_for_backward(gather, places)
        ctx.size = len(source)
        return source.index_select(0, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gather, places = ctx.saved_tensors
        if places is not None:
            gather, gradient = gather[places], gradient.index_select(0, places)
        return gradient.new_zeros((ctx.size, *gradient.shape[1:])).index_copy_(0, gather, gradient), None, None


def pick(packed: Tensor, positions: Tensor) -> Tensor:
    """Return the tokens (m, ...) of `packed` (N, ...) at `positions` (m,), which must be distinct."""
    return _Take.apply(packed, positions, None)


def leading(lengths: Tensor, size: int) -> Tensor:
    """Return (rows, size) bool: True at the first `lengths[row]` places of every row."""
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Map between packed tokens and a padded tensor of shape (rows, length).

    Attributes:
        gather: (rows * length,) the packed position that fills each padded place. Padding repeats some token: it is not
            attended to and not read.
        padded: (m,) places that are no padding, flattened; each holds a packed token of its own.
        contiguous: (start, stop) of the packed tokens if they are the padded tensor, so that no copy is needed.
    """

    rows: int
    length: int
    gather: Tensor
    padded: Tensor
    contiguous: tuple[int, int] | None = None

    def to(self, device: torch.device) -> Scatter:
        """Copy to `device`, without waiting for it."""
        gather, padded = (tensor.to(device, non_blocking=True) for tensor in (self.gather, self.padded))
        return replace(self, gather=gather, padded=padded)

    def pad(self, packed: Tensor) -> Tensor:
        """Return packed tokens (N, ...) as a padded tensor (rows, length, ...)."""
        if self.contiguous is not None:
            start, stop = self.contiguous
            result = packed[start:stop]
        else:
            result = _Take.apply(packed, self.gather, self.padded)
        return result.unflatten(0, (self.rows, self.length))

    def unpad(self, padded: Tensor) -> Tensor:
        """Return the tokens of a padded tensor (rows, length, ...) as packed ones (m, ...), in packed order."""
        flat = padded.flatten(0, 1)
        return flat if self.contiguous is not None else pick(flat, self.padded)


# --- the packed batch ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PackedSegment:
    """The main sequences, or the tokens of one branch: packed positions `start` to `stop`.

    Attributes:
        layer: the last layer k that the segment runs through; None for all.
        queries, keys: maps to padded rows for attention, of its tokens and of the tokens that these may see.
        prompt_lengths: (R,) tokens of the prompt before each row of a branch; None for main sequences.
    """

    start: int
    layer: int | None
    queries: Scatter
    keys: Scatter
    prompt_lengths: Tensor | None = None
    masks: dict[tuple[int | None, bool], Tensor | None] = field(default_factory=dict, compare=False)

    @property
    def stop(self) -> int:
        """The packed position after its last token."""
        return self.start + len(self.queries.padded)

    def to(self, device: torch.device) -> PackedSegment:
        """Copy to `device`, without waiting for it."""
        prompts = None if self.prompt_lengths is None else self.prompt_lengths.to(device, non_blocking=True)
        queries = self.queries.to(device)
        keys = queries if self.keys is self.queries else self.keys.to(device)
        return replace(self, queries=queries, keys=keys, prompt_lengths=prompts, masks={})

    def mask(self, window: int | None, *, explicit: bool = False) -> Tensor | None:
        """Return the keys that each query sees, (R or 1, 1, Q, K) bool; made once for all blocks.

        With a `window` a query sees that many tokens, itself included. Plain causal attention gets a mask if `explicit`.
        """
        if window is not None and window >= self.keys.length:
            window = None
        if (window, explicit) not in self.masks:
            plain = self.prompt_lengths is None and window is None and not explicit
            self.masks[window, explicit] = None if plain else self._mask(window)
        return self.masks[window, explicit]

    def _mask(self, window: int | None) -> Tensor:
        keys = torch.arange(self.keys.length, device=self.keys.gather.device)[None, :]
        queries = torch.arange(self.queries.length, device=self.keys.gather.device)[:, None]
        # Queries stand at the end of the keys and prompts are aligned right, so distances are those of the text.
        offset = self.keys.length - self.queries.length
        distance = queries + offset - keys
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        if self.prompt_lengths is None:
            return seen[None, None]
        in_row = keys >= offset - self.prompt_lengths[:, None]
        return seen[None, None] & in_row[:, None, None, :]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Tokens that continue the prompts of some rows and leave after `layer`.

    Attributes:
        rows: (R,) rows of the batch that have this branch.
        tokens: (R, U) ids, padded right, without each row's last token, which predicts nothing.
        lengths: (R,) tokens of each row, 0 or more.
    """

    layer: int
    rows: Tensor
    tokens: Tensor
    lengths: Tensor


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A packed batch.

    Attributes:
        input_ids, position_ids: (1, N).
        segments: in packed order; the first holds the main sequences.
        predicting: for every branch, in the order given, the packed positions whose states predict its tokens: the
            prompt's last token, then the branch's own, row by row.
        trained: number of leading tokens, those of the main sequences, that train the weights; None for all tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Sequence[PackedSegment]
    predicting: Sequence[Tensor]
    trained: int | None = None

    def to(self, device: torch.device) -> Packing:
        """Copy to `device`, without waiting for it."""
        input_ids, position_ids, *predicting = (
            tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.position_ids, *self.predicting)
        )
        segments = [segment.to(device) for segment in self.segments]
        moved = {"input_ids": input_ids, "position_ids": position_ids, "segments": segments, "predicting": predicting}
        return replace(self, **moved)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    def present(self, num_tokens: int) -> Sequence[PackedSegment]:
        """Return the segments among the first `num_tokens` packed tokens."""
        return [segment for segment in self.segments if segment.stop <= num_tokens and segment.stop > segment.start]

    def tokens_left(self, layer: int) -> int:
        """Return how many packed tokens block number `layer` (from 0) reads: segments that run beyond h_layer."""
        return max(s.stop for s in self.segments if s.layer is None or s.layer > layer)

    def padded(self, states: Tensor) -> Tensor:
        """Return main states (B, T, width) from packed ones (1, N or fewer, width); padding must not be read."""
        return self.segments[0].queries.pad(states[0])


def pack(
    input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None, branches: Sequence[Branch] = ()
) -> Packing:
    """Lay the rows of a batch, and branches that continue their prompts, behind each other; all tensors on the CPU.

    Args:
        input_ids, attention_mask: (B, T), padded right.
        prompt_lengths: (B,) tokens of each row's prompt; only needed with branches.
        branches: any number; their rows need a prompt of at least one token.

    Raises:
        ValueError: a row is not padded on the right.
    """
    if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError("attention_mask: rows must be padded on the right")
    main, tokens, positions = _pack_main(input_ids, attention_mask)
    # Packed position of each row's first token.
    starts = main.gather.view(main.rows, main.length)[:, 0]
    segments = [PackedSegment(start=0, layer=None, queries=main, keys=main)]
    all_tokens, all_positions, predicting = [tokens], [positions], [torch.empty(0)] * len(branches)
    for index in sorted(range(len(branches)), key=lambda index: -branches[index].layer):
        branch = branches[index]
        assert prompt_lengths is not None
        segment, own_positions = _pack_branch(branch, segments[-1].stop, starts, prompt_lengths)
        segments.append(segment)
        rows, length = branch.tokens.shape
        all_tokens.append(branch.tokens[leading(branch.lengths, length)])
        all_positions.append(own_positions)
        last_of_prompt = starts[branch.rows] + prompt_lengths[branch.rows] - 1
        candidates = torch.cat([last_of_prompt[:, None], segment.queries.gather.view(rows, length)], dim=1)
        predicting[index] = candidates[leading(branch.lengths + 1, length + 1)]
    input_ids, position_ids = torch.cat(all_tokens)[None], torch.cat(all_positions)[None]
    return Packing(input_ids=input_ids, position_ids=position_ids, segments=segments, predicting=predicting)


def _pack_main(input_ids: Tensor, attention_mask: Tensor) -> tuple[Scatter, Tensor, Tensor]:
    """Return the map of the main sequences, their tokens (n,) and positions (n,)."""
    rows, length = input_ids.shape
    places = attention_mask.bool()
    packed = int(places.sum())
    if packed >= (1 - PADDING_LEFT_IN) * places.numel():
        places = torch.ones_like(places)
        packed = places.numel()
    positions = torch.arange(length, device=input_ids.device).expand(rows, length)
    padded = places.flatten().nonzero()[:, 0]
    own = torch.arange(packed, device=input_ids.device)
    counts = places.sum(1)
    # Padding repeats the row's first token; a row of padding alone repeats another row's.
    starts = (counts.cumsum(0) - counts).clamp(max=max(packed - 1, 0))
    gather = starts[:, None].repeat(1, length).flatten().index_copy(0, padded, own)
    contiguous = (0, packed) if packed == places.numel() else None
    scatter = Scatter(rows=rows, length=length, gather=gather, padded=padded, contiguous=contiguous)
    return scatter, input_ids[places], positions[places]


def _pack_branch(branch: Branch, start: int, starts: Tensor, prompt_lengths: Tensor) -> tuple[PackedSegment, Tensor]:
    """Return the segment of a branch that begins at packed position `start`, and the positions (n,) of its tokens."""
    device = branch.tokens.device
    rows, length = branch.tokens.shape
    prompts = prompt_lengths[branch.rows]
    longest = int(prompts.max()) if rows else 0
    places = leading(branch.lengths, length)
    padded = places.flatten().nonzero()[:, 0]
    own = torch.arange(start, start + len(padded), device=device)
    queries = Scatter(
        rows=rows,
        length=length,
        gather=torch.zeros(rows * length, dtype=torch.long, device=device).index_copy(0, padded, own),
        padded=padded,
        contiguous=(start, start + len(padded)) if len(padded) == places.numel() else None,
    )
    # Prompts are aligned right, so that key p of row r stands `prompts[r] - p` before the branch.
    columns = torch.arange(longest, device=device)[None, :] - (longest - prompts[:, None])
    prompt_positions = starts[branch.rows][:, None] + columns.clamp(min=0)
    keys = Scatter(
        rows=rows,
        length=longest + length,
        gather=torch.cat([prompt_positions, queries.gather.view(rows, length)], dim=1).flatten(),
        padded=torch.cat([columns >= 0, places], dim=1).flatten().nonzero()[:, 0],
    )
    positions = prompts[:, None] + torch.arange(length, device=device)[None, :]
    segment = PackedSegment(start=start, layer=branch.layer, queries=queries, keys=keys, prompt_lengths=prompts)
    return segment, positions[places]
