"""Rows that begin alike as one sequence: nothing is lost, nothing is read twice, no row sees another."""

import torch

from fgpt_hf.evaluation.prefix_tree import PrefixTree, Row, batch_trees, build_prefix_tree, collate_trees

ROWS = [Row((1, 2, 3, 7, 8), 2), Row((1, 2, 3, 7, 9, 4), 3), Row((1, 2, 3, 5), 1)]


def predictions(tree: PrefixTree) -> set[tuple[int, int, int]]:
    """(row, token from which it is predicted, scored token)."""
    scored = zip(tree.row_of_target, tree.source_of_target, tree.target_ids, strict=True)
    return {(row, tree.token_ids[tree.source_tokens[source]], target) for row, source, target in scored}


def test_what_is_shared_is_read_once_and_last_tokens_are_not_read() -> None:
    tree = build_prefix_tree("abc", ROWS)
    assert tree.token_ids == [1, 2, 3, 7, 9]
    assert tree.parents == [-1, 0, 1, 2, 3]


def test_every_scored_token_is_predicted_from_the_token_before_it() -> None:
    tree = build_prefix_tree("abc", ROWS)
    assert predictions(tree) == {(0, 3, 7), (0, 7, 8), (1, 3, 7), (1, 7, 9), (1, 9, 4), (2, 3, 5)}
    assert len(tree.source_tokens) == len(set(tree.source_tokens)) == 3


def test_rows_with_nothing_in_common_stand_side_by_side() -> None:
    tree = build_prefix_tree("ab", [Row((1, 2), 1), Row((3, 4, 5), 1)])
    assert (tree.token_ids, tree.parents) == ([1, 3, 4], [-1, -1, 1])


def test_a_token_sees_its_ancestors_and_itself() -> None:
    batch = collate_trees(
        [build_prefix_tree("abc", [Row((1, 2, 3, 4, 0), 1), Row((1, 2, 5, 6, 0), 1), Row((1, 2, 5, 7, 0), 1)])]
    )
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 3]]
    expected = ["x......", "xx.....", "xxx....", "xxxx...", "xx..x..", "xx..xx.", "xx..x.x"]
    assert ["".join("x" if bit else "." for bit in row) for row in batch.visible[0].tolist()] == expected


def test_padding_sees_itself_alone_and_is_seen_by_no_one() -> None:
    batch = collate_trees([build_prefix_tree("abc", ROWS), build_prefix_tree("d", [Row((6, 7, 8), 1)])])
    assert batch.is_token.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert torch.equal(batch.visible[1, :, 2:], torch.eye(5, dtype=torch.bool)[:, 2:])


def test_batches_keep_to_their_budget_and_do_not_depend_on_the_order() -> None:
    trees = [build_prefix_tree([number], [Row(tuple(range(number + 2)), 1)]) for number in range(30)]
    found = list(batch_trees(trees, 64))
    assert sorted(key for batch in found for tree in batch for key in tree.keys) == list(range(30))  # type: ignore[type-var]
    assert all(len(batch) * max(len(tree.token_ids) for tree in batch) <= 64 for batch in found)
    assert list(batch_trees(trees[::-1], 64)) == found


def test_a_tree_beyond_the_budget_is_a_batch_by_itself() -> None:
    assert [
        len(batch) for batch in batch_trees([build_prefix_tree("a", ROWS[:1]), build_prefix_tree("b", ROWS[1:2])], 1)
    ] == [1, 1]


def test_batch_point_at_the_same_tokens_as_their_trees() -> None:
    trees = [build_prefix_tree("abc", ROWS), build_prefix_tree("d", [Row((6, 7), 1)])]
    batch = collate_trees(trees)
    tokens = batch.input_ids.flatten()[batch.source_tokens][batch.source_of_target]
    scored = set(zip(batch.row_of_target.tolist(), tokens.tolist(), batch.target_ids.tolist(), strict=True))
    assert scored == predictions(trees[0]) | {(3, 6, 7)}
