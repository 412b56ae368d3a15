"""Where tokens lie in a packed batch, and the way there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pivotune.forward.shared.packing import Branch, Packing, pack, pick

# Two rows of 6 and 3 tokens; prompts of 4 and 2.
IDS = torch.tensor([[10, 11, 12, 13, 14, 15], [20, 21, 22, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
PROMPTS = torch.tensor([4, 2])


def branch(layer: int, tokens: list[list[int]], rows: list[int]) -> Branch:
    lengths = torch.tensor([len(row) for row in tokens])
    padded = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in tokens], dtype=torch.long)
    return Branch(layer=layer, rows=torch.tensor(rows), tokens=padded, lengths=lengths)


@pytest.fixture
def packing() -> Packing:
    """One branch of row 1 that leaves after layer 1, and one of both rows that leaves after layer 3."""
    return pack(IDS, MASK, PROMPTS, [branch(1, [[50, 51]], [1]), branch(3, [[60], [70, 71, 72]], [0, 1])])


def test_the_branch_that_stays_longest_lies_first_and_positions_go_on_from_the_prompt(packing):
    assert packing.input_ids.tolist() == [[10, 11, 12, 13, 14, 15, 20, 21, 22, 60, 70, 71, 72, 50, 51]]
    assert packing.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 4, 2, 3, 4, 2, 3]]
    # In the order given: the last token of the prompt, then the branch's own.
    assert [positions.tolist() for positions in packing.predicting] == [[7, 13, 14], [3, 9, 7, 10, 11, 12]]


def test_every_block_reads_those_that_have_not_left(packing):
    assert [packing.tokens_left(block) for block in range(4)] == [15, 13, 13, 9]
    assert [len(packing.present(count)) for count in (15, 13, 9)] == [3, 2, 1]


def seen_by(packing: Packing, segment: int, window: int | None = None) -> list[list[int]]:
    """For every query of a segment, the packed positions that it sees."""
    part = packing.segments[segment]
    mask = part.mask(window, explicit=True)
    mask = mask.expand(part.queries.rows, 1, -1, -1)[:, 0]
    keys = part.keys.gather.view(part.keys.rows, part.keys.length)
    seen = [keys[row][mask[row, query]].tolist() for row in range(len(mask)) for query in range(mask.shape[1])]
    return [seen[place] for place in part.queries.padded.tolist()]


def test_a_branch_sees_its_prompt_and_itself(packing):
    assert seen_by(packing, 1) == [[0, 1, 2, 3, 9], [6, 7, 10], [6, 7, 10, 11], [6, 7, 10, 11, 12]]
    assert seen_by(packing, 2) == [[6, 7, 13], [6, 7, 13, 14]]


def test_a_main_sequence_sees_itself(packing):
    assert packing.segments[0].mask(None) is None
    assert seen_by(packing, 0) == [list(range(end + 1)) for end in range(6)] + [[6], [6, 7], [6, 7, 8]]


def test_a_sliding_window_counts_positions_of_the_text(packing):
    assert seen_by(packing, 0, 2) == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [6], [6, 7], [7, 8]]
    assert seen_by(packing, 1, 3) == [[2, 3, 9], [6, 7, 10], [7, 10, 11], [10, 11, 12]]
    # As long as every row: no window is needed.
    assert packing.segments[0].mask(6) is None


def test_there_and_back(packing):
    states = torch.randn(15, 2, 3)
    for segment in packing.segments:
        assert torch.equal(segment.queries.unpad(segment.queries.pad(states)), states[segment.start : segment.stop])
    padded = packing.padded(states[None])
    assert torch.equal(padded[MASK.bool()], states[:9])


def grad_of(function, states: Tensor) -> bool:
    return torch.autograd.gradcheck(function, (states.double().requires_grad_(),))


def test_gradients_of_the_way(packing):
    states = torch.randn(15, 2)
    for segment in packing.segments:
        for scatter in (segment.queries, segment.keys):
            real = torch.zeros(scatter.rows * scatter.length, 1, dtype=torch.double)
            real[scatter.padded] = 1
            # What stands at padding is not read, so it has no gradient either.
            assert grad_of(lambda x, s=scatter, r=real: s.pad(x).flatten(0, 1) * r, states)
    assert grad_of(lambda x: pick(x, packing.predicting[1][:4]), states)


def test_a_row_without_any_token_takes_no_place():
    packed = pack(IDS, torch.tensor([[0] * 6, [1, 1, 1, 0, 0, 0]]))
    assert packed.input_ids.tolist() == [[20, 21, 22]]
    assert packed.padded(torch.arange(3.0)[None, :, None])[1, :3, 0].tolist() == [0, 1, 2]


def test_rows_of_one_length_are_not_moved():
    packed = pack(IDS[:1], MASK[:1])
    states = torch.randn(6, 2)
    assert packed.segments[0].queries.pad(states).data_ptr() == states.data_ptr()


def test_a_branch_whose_rows_have_one_token_each_is_only_predicted():
    packed = pack(IDS, MASK, PROMPTS, [branch(2, [[], []], [0, 1])])
    assert packed.input_ids.shape == (1, 9)
    assert packed.predicting[0].tolist() == [3, 7]
    assert [len(packed.present(9)), packed.tokens_left(0)] == [1, 9]
