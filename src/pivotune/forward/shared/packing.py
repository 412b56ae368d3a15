"""Many sequences in one forward pass without padding, and branches that leave it early.

All tokens of a batch lie behind each other in one row of length N: first the main sequences, then the tokens of the
branches, the branch that stays longest first. A branch continues the prompt of its row: its positions go on from the
prompt's last token, and its tokens see the prompt and themselves. Because the branches lie at the end, one that has
reached its layer leaves by cutting the end off, and nothing else moves.

Shapes: B rows, T tokens of the longest main sequence, N packed tokens, n tokens of one segment, R rows of one segment,
Q its longest row, K the longest row of keys (prompt and branch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pivotune.forward.shared.scatter import Scatter, moved, take

# Rows that are padded this little stay padded: taking padding out costs four copies of the attention's inputs and
# outputs in every block, about as much as computing this share of the tokens in vain (docs/performance.md).
PADDING_LEFT_IN = 0.02


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The main sequences, or the tokens of one branch: packed positions `start` to `stop`.

    Attributes:
        start: packed position of its first token.
        layer: the last layer k that the segment runs through; None for all.
        queries, keys: where its tokens, and the tokens that these may see, go for attention.
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

    def to(self, device: torch.device) -> Segment:
        """The same on `device`."""
        prompts = None if self.prompt_lengths is None else moved(self.prompt_lengths, device)
        queries = self.queries.to(device)
        keys = queries if self.keys is self.queries else self.keys.to(device)
        return replace(self, queries=queries, keys=keys, prompt_lengths=prompts, masks={})

    def mask(self, window: int | None, *, explicit: bool = False) -> Tensor | None:
        """Which key each query sees, (R or 1, 1, Q, K) bool; made once for all blocks.

        Args:
            window: how far back a query sees, itself included (sliding-window attention); None for no limit.
            explicit: give a mask also where plain causal attention does, instead of None.
        """
        if window is not None and window >= self.keys.length:
            window = None
        if (window, explicit) not in self.masks:
            plain = self.prompt_lengths is None and window is None and not explicit
            self.masks[window, explicit] = None if plain else self._mask(window)
        return self.masks[window, explicit]

    def _mask(self, window: int | None) -> Tensor:
        device = self.keys.gather.device
        # Queries stand at the end of the keys, prompts are laid against the branch, so distances are those of the text.
        offset = self.keys.length - self.queries.length
        distance = (
            torch.arange(self.queries.length, device=device)[:, None]
            + offset
            - torch.arange(self.keys.length, device=device)[None, :]
        )
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        if self.prompt_lengths is None:
            return seen[None, None]
        in_row = torch.arange(self.keys.length, device=device)[None, :] >= offset - self.prompt_lengths[:, None]
        return seen[None, None] & in_row[:, None, None, :]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Tokens that continue the prompts of some rows and leave after `layer`.

    Attributes:
        rows: (R,) rows of the batch that have this branch.
        tokens: (R, U) ids, padded right. A token that predicts nothing (the last one) is not among them.
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
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Sequence[Segment]
    predicting: Sequence[Tensor]

    def to(self, device: torch.device) -> Packing:
        """The same on `device`."""
        segments = [segment.to(device) for segment in self.segments]
        return Packing(
            input_ids=moved(self.input_ids, device),
            position_ids=moved(self.position_ids, device),
            segments=segments,
            predicting=[moved(positions, device) for positions in self.predicting],
        )

    @property
    def num_tokens(self) -> int:
        """N, of all segments."""
        return self.input_ids.shape[1]

    def present(self, num_tokens: int) -> Sequence[Segment]:
        """The segments that are still there when `num_tokens` packed tokens are left."""
        return [segment for segment in self.segments if segment.stop <= num_tokens and segment.stop > segment.start]

    def tokens_left(self, layer: int) -> int:
        """How many packed tokens block number `layer` (from 0) reads: those of segments that run beyond h_layer."""
        return max(s.stop for s in self.segments if s.layer is None or s.layer > layer)

    def padded(self, states: Tensor) -> Tensor:
        """Main states (B, T, width) from packed ones (1, N or fewer, width); what stands at padding is not to be read."""
        return take(states[0], self.segments[0].queries)


def pack(
    input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None, branches: Sequence[Branch] = ()
) -> Packing:
    """Lay the rows of a batch, and branches that continue their prompts, behind each other.

    Everything is small integers and counted here, so give it on the CPU and move the result.

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
    # Where each row starts in the packed tokens.
    starts = main.gather.view(main.rows, main.length)[:, 0]
    segments = [Segment(start=0, layer=None, queries=main, keys=main)]
    all_tokens, all_positions, predicting = [tokens], [positions], [torch.empty(0)] * len(branches)
    for index in sorted(range(len(branches)), key=lambda index: -branches[index].layer):
        branch = branches[index]
        assert prompt_lengths is not None
        segment, own_positions = _pack_branch(branch, segments[-1].stop, starts, prompt_lengths)
        segments.append(segment)
        all_tokens.append(branch.tokens[leading(branch.lengths, branch.tokens.shape[1])])
        all_positions.append(own_positions)
        predicting[index] = _predicting(branch, segment, starts, prompt_lengths)
    return Packing(
        input_ids=torch.cat(all_tokens)[None],
        position_ids=torch.cat(all_positions)[None],
        segments=segments,
        predicting=predicting,
    )


def _pack_main(input_ids: Tensor, attention_mask: Tensor) -> tuple[Scatter, Tensor, Tensor]:
    """Where the main sequences lie, their tokens (n,) and positions (n,)."""
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
    # Padding repeats the row's first token; a row without any (all padding) points at another row's.
    starts = (counts.cumsum(0) - counts).clamp(max=max(packed - 1, 0))
    gather = starts[:, None].repeat(1, length).flatten().index_copy(0, padded, own)
    contiguous = (0, packed) if packed == places.numel() else None
    scatter = Scatter(rows=rows, length=length, gather=gather, padded=padded, contiguous=contiguous)
    return scatter, input_ids[places], positions[places]


def _pack_branch(branch: Branch, start: int, starts: Tensor, prompt_lengths: Tensor) -> tuple[Segment, Tensor]:
    """The segment of one branch that begins at packed position `start`, and the positions (n,) of its tokens."""
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
    # Prompts are laid against the right, so that key p of row r stands `prompts[r] - p` before the branch.
    columns = torch.arange(longest, device=device)[None, :] - (longest - prompts[:, None])
    in_prompt = columns >= 0
    prompt_positions = starts[branch.rows][:, None] + columns.clamp(min=0)
    gather = torch.cat([prompt_positions, queries.gather.view(rows, length)], dim=1)
    taken = torch.cat([in_prompt, places], dim=1).flatten().nonzero()[:, 0]
    gather = gather.flatten()
    keys = Scatter(rows=rows, length=longest + length, gather=gather, padded=taken)
    positions = prompts[:, None] + torch.arange(length, device=device)[None, :]
    segment = Segment(
        start=start,
        layer=branch.layer,
        queries=queries,
        keys=keys,
        prompt_lengths=prompts,
    )
    return segment, positions[places]


def _predicting(branch: Branch, segment: Segment, starts: Tensor, prompt_lengths: Tensor) -> Tensor:
    last_of_prompt = starts[branch.rows] + prompt_lengths[branch.rows] - 1
    rows, length = branch.tokens.shape
    candidates = torch.cat([last_of_prompt[:, None], segment.queries.gather.view(rows, length)], dim=1)
    return candidates[leading(branch.lengths + 1, length + 1)]


def leading(lengths: Tensor, size: int) -> Tensor:
    """(rows, size) bool: the first `lengths[row]` places of every row."""
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]
