"""Rows that begin alike as one sequence: nothing is lost, nothing is read twice, no branch sees another."""

import torch

from fgpt_hf.trees import PADDING, Row, as_tensors, attention_mask, batches, plant

ROWS = [Row((1, 2, 3, 7, 8), 2), Row((1, 2, 3, 7, 9, 4), 3), Row((1, 2, 3, 5), 1)]


def test_the_shared_context_is_read_once_and_last_tokens_are_not_read() -> None:
    tree = plant("abc", ROWS)
    assert tree.ids == [1, 2, 3, 7, 7, 9]
    assert tree.positions == [0, 1, 2, 3, 3, 4]
    assert tree.branches == [0, 0, 0, 1, 2, 2]


def test_every_scored_token_is_predicted_from_the_token_before_it() -> None:
    tree = plant("abc", ROWS)
    predicted = {
        (owner, tree.ids[source], target)
        for owner, source, target in zip(tree.owners, tree.sources, tree.targets, strict=True)
    }
    assert predicted == {(0, 3, 7), (0, 7, 8), (1, 3, 7), (1, 7, 9), (1, 9, 4), (2, 3, 5)}


def test_rows_with_nothing_in_common_stand_side_by_side() -> None:
    tree = plant("ab", [Row((1, 2), 1), Row((3, 4, 5), 1)])
    assert (tree.ids, tree.positions, tree.branches) == ([1, 3, 4], [0, 0, 1], [1, 2, 2])


def test_a_token_sees_its_own_branch_and_the_context_up_to_itself() -> None:
    seen = attention_mask(torch.tensor([[0, 0, 1, 1, 2, PADDING]]))[0, 0]
    expected = ["x.....", "xx....", "xxx...", "xxxx..", "xx..x.", "xx...x"]
    assert ["".join("x" if bit else "." for bit in row) for row in seen.tolist()] == expected


def test_batches_keep_to_their_budget_and_do_not_depend_on_the_order() -> None:
    trees = [plant([number], [Row(tuple(range(number + 2)), 1)]) for number in range(30)]
    found = list(batches(trees, 64))
    assert sorted(key for batch in found for tree in batch for key in tree.keys) == list(range(30))
    assert all(len(batch) * max(len(tree.ids) for tree in batch) <= 64 for batch in found)
    assert list(batches(trees[::-1], 64)) == found


def test_a_tree_beyond_the_budget_is_a_batch_by_itself() -> None:
    assert [len(batch) for batch in batches([plant("a", ROWS[:1]), plant("b", ROWS[1:2])], 1)] == [1, 1]


def test_tensors_point_at_the_same_tokens_as_their_trees() -> None:
    trees = [plant("abc", ROWS), plant("d", [Row((6, 7), 1)])]
    tensors = as_tensors(trees)
    flat = tensors.input_ids.flatten()
    expected = [
        (tree.ids[source], target) for tree in trees for source, target in zip(tree.sources, tree.targets, strict=True)
    ]
    assert list(zip(flat[tensors.sources].tolist(), tensors.targets.tolist(), strict=True)) == expected
    assert tensors.owners.tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert (tensors.branches[1, 1:] == PADDING).all()
