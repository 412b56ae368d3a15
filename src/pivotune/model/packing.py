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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Rows that are padded this little stay padded: taking padding out costs four copies of the attention's inputs and
# outputs in every block, about as much as computing this share of the tokens in vain (docs/performance.md).
PADDING_LEFT_IN = 0.02


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Where packed tokens go in a padded tensor of shape (rows, length).

    Attributes:
        gather: (rows * length,) the packed position that fills each padded place. Padding repeats some token: whatever
            stands there is not attended to and not read.
        packed: (m,) packed positions that are really taken, each once.
        padded: (m,) their places in the padded tensor, flattened.
        contiguous: (start, stop) where the padded tensor is this very stretch of the packed one, so that no copy is needed.
    """

    rows: int
    length: int
    gather: Tensor
    packed: Tensor
    padded: Tensor
    contiguous: tuple[int, int] | None = None

    def to(self, device: torch.device) -> Scatter:
        """The same on `device`."""
        moved = {name: _moved(getattr(self, name), device) for name in ("gather", "packed", "padded")}
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The main sequences, or the tokens of one branch: packed positions `start` to `stop`.

    Attributes:
        layer: the last layer k that the segment runs through; None for all.
        queries, keys: where its tokens, and the tokens that these may see, go for attention.
        prompt_lengths: (R,) tokens of the prompt before each row of a branch; None for main sequences.
    """

    start: int
    stop: int
    layer: int | None
    queries: Scatter
    keys: Scatter
    prompt_lengths: Tensor | None = None
    masks: dict[int | None, Tensor | None] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> Segment:
        """The same on `device`."""
        prompts = None if self.prompt_lengths is None else _moved(self.prompt_lengths, device)
        queries = self.queries.to(device)
        keys = queries if self.keys is self.queries else self.keys.to(device)
        return replace(self, queries=queries, keys=keys, prompt_lengths=prompts, masks={})

    def mask(self, window: int | None) -> Tensor | None:
        """Which key each query sees, (R or 1, 1, Q, K) bool; None where plain causal attention does.

        Args:
            window: how far back a query sees, itself included (sliding-window attention); None for no limit.
        """
        if window is not None and window >= self.keys.length:
            window = None
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return self.masks[window]

    def _mask(self, window: int | None) -> Tensor | None:
        if self.prompt_lengths is None and window is None:
            return None
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
            input_ids=_moved(self.input_ids, device),
            position_ids=_moved(self.position_ids, device),
            segments=segments,
            predicting=[_moved(positions, device) for positions in self.predicting],
        )

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
    """
    main, tokens, positions = _pack_main(input_ids, attention_mask)
    # Where each row starts in the packed tokens.
    starts = main.gather.view(main.rows, main.length)[:, 0]
    segments = [Segment(start=0, stop=len(tokens), layer=None, queries=main, keys=main)]
    all_tokens, all_positions, predicting = [tokens], [positions], [torch.empty(0)] * len(branches)
    for index in sorted(range(len(branches)), key=lambda index: -branches[index].layer):
        branch = branches[index]
        assert prompt_lengths is not None
        segment, own_positions = _pack_branch(branch, segments[-1].stop, starts, prompt_lengths)
        segments.append(segment)
        all_tokens.append(branch.tokens[_places(branch.lengths, branch.tokens.shape[1])])
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
    scatter = Scatter(rows=rows, length=length, gather=gather, packed=own, padded=padded, contiguous=contiguous)
    return scatter, input_ids[places], positions[places]


def _pack_branch(branch: Branch, start: int, starts: Tensor, prompt_lengths: Tensor) -> tuple[Segment, Tensor]:
    """The segment of one branch that begins at packed position `start`, and the positions (n,) of its tokens."""
    device = branch.tokens.device
    rows, length = branch.tokens.shape
    prompts = prompt_lengths[branch.rows]
    longest = int(prompts.max()) if rows else 0
    places = _places(branch.lengths, length)
    padded = places.flatten().nonzero()[:, 0]
    own = torch.arange(start, start + len(padded), device=device)
    queries = Scatter(
        rows=rows,
        length=length,
        gather=torch.zeros(rows * length, dtype=torch.long, device=device).index_copy(0, padded, own),
        packed=own,
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
    keys = Scatter(rows=rows, length=longest + length, gather=gather, packed=gather[taken], padded=taken)
    positions = prompts[:, None] + torch.arange(length, device=device)[None, :]
    segment = Segment(
        start=start,
        stop=start + len(padded),
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
    return candidates[_places(branch.lengths + 1, length + 1)]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def _places(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]


class _Take(torch.autograd.Function):
    """Packed (N, ...) to padded (rows * length, ...). Every packed place is taken at most once, so its gradient is a copy."""

    @staticmethod
    def forward(ctx: FunctionCtx, packed: Tensor, gather: Tensor, sources: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(sources, places)
        ctx.num_tokens = len(packed)  # type: ignore[attr-defined]
        return packed.index_select(0, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        sources, places = ctx.saved_tensors  # type: ignore[attr-defined]
        result = gradient.new_zeros((ctx.num_tokens, *gradient.shape[1:]))  # type: ignore[attr-defined]
        return result.index_copy_(0, sources, gradient.index_select(0, places)), None, None, None


class _Give(torch.autograd.Function):
    """Padded (rows * length, ...) to packed (m, ...): the other way round; padding gets no gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(padded)  # type: ignore[attr-defined]
        return padded.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient.new_zeros((ctx.size, *gradient.shape[1:])).index_copy_(0, places, gradient), None  # type: ignore[attr-defined]


def take(packed: Tensor, scatter: Scatter) -> Tensor:
    """Packed tokens (N, ...) as a padded tensor (rows, length, ...)."""
    if scatter.contiguous is not None:
        start, stop = scatter.contiguous
        result = packed[start:stop]
    else:
        result = _Take.apply(packed, scatter.gather, scatter.packed, scatter.padded)
    return result.unflatten(0, (scatter.rows, scatter.length))


def give(padded: Tensor, scatter: Scatter) -> Tensor:
    """The tokens of a padded tensor (rows, length, ...) as packed ones (m, ...), in packed order."""
    flat = padded.flatten(0, 1)
    return flat if scatter.contiguous is not None else _Give.apply(flat, scatter.padded)


def pick(packed: Tensor, positions: Tensor) -> Tensor:
    """The tokens (m, ...) of `packed` (N, ...) at `positions` (m,), each of which is there once."""
    return _Give.apply(packed, positions)


def packed_attention(
    packing: Packing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every segment to its own rows.

    Args:
        query: (1, heads, N, head size), with rotary positions applied; `key` and `value` (1, key heads, N, head size),
            where key heads divide heads (grouped-query attention).
        scaling: of the products; None for 1 / sqrt(head size).
        window: sliding window, in tokens, itself included.
        softcap: c of `c * tanh(products / c)` before the softmax (Gemma-2).

    Returns:
        (1, N, heads, head size).
    """
    # Under autocast rotary embeddings leave queries and keys in float32; attention would round them anyway.
    tokens = [states.to(value.dtype).transpose(1, 2)[0] for states in (query, key, value)]
    outputs = []
    for segment in packing.present(query.shape[2]):
        places = (segment.queries, segment.keys, segment.keys)
        padded = [take(states, scatter).transpose(1, 2) for states, scatter in zip(tokens, places, strict=True)]
        attend = _plain_attention if softcap is None else _capped_attention
        attended = attend(*padded, segment.mask(window), scaling, dropout, softcap)
        outputs.append(give(attended.transpose(1, 2), segment.queries))
    return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None]


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float, _: None
) -> Tensor:
    # Without a mask every fast kernel applies; with one, those of CUDA want the key heads repeated.
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask is not None and query.is_cuda:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    """Written out, because no fused kernel of torch caps the products; softmax in float32 as in Transformers."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    products = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    products = softcap * torch.tanh(products / softcap)
    if mask is None:
        mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).tril()
    products = products.masked_fill(~mask, torch.finfo(products.dtype).min)
    weights = torch.softmax(products, dim=-1, dtype=torch.float32).to(value.dtype)
    return F.dropout(weights, dropout) @ value
