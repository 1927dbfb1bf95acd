"""Which candidates go on while they are drawn."""

import torch

from text_to_image.batch.prune import Pruning, repeat_last_row


def test_the_rest_of_a_grid_is_its_last_row():
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])
    assert repeat_last_row(tokens, 3).tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5], [6, 7, 8, 9, 10, 11, 9, 10, 11]]


def test_the_best_of_each_prompt_go_on():
    asked = []

    def score(grids, counts):
        asked.append((tuple(grids.shape), list(counts)))
        return grids[:, 0].tolist()

    pruning = Pruning(4, [5, 3], 1, score)
    scores = torch.tensor([1, 5, 3, 5, 2, 9, 9, 8])
    assert pruning(scores[:, None].expand(-1, 3)) is None
    kept = pruning(scores[:, None].expand(-1, 4))  # a row of four
    assert kept.tolist() == [1, 2, 3, 5, 6]  # 3 of 5, and 2 of 3
    assert pruning(scores[kept, None].expand(-1, 5)) is None
    assert pruning(scores[kept, None].expand(-1, 8)).tolist() == [0, 2, 3]  # 2 of 5, and 1 of 3: the earlier of equals
    assert asked == [((8, 16), [5, 3]), ((5, 16), [3, 2])]


def test_as_many_go_on_as_are_kept():
    pruning = Pruning(4, [4, 2], 3, lambda grids, counts: grids[:, 0].tolist())
    assert pruning(torch.arange(6)[:, None].expand(-1, 4)).tolist() == [1, 2, 3, 4, 5]
