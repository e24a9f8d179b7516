"""What a batch holds in addition to a model's own inputs: which tokens are not scored, and where documents end."""

import torch
from torch import Tensor

IGNORED = -100  # the label of a token that is not scored, as in torch and transformers
DOCUMENT_ENDS = "document_ends"  # in a batch, where the documents of each row end
FEWEST_DOCUMENTS = 4  # that a row has room for: ends of few shapes keep the graphs of a compiler few


def document_ends(position_ids: Tensor, is_padding: Tensor) -> Tensor:
    """Return where the documents of each row end, `(B, K)` int32; unused ends of a row repeat its last one.

    K is a power of two, so that batches with some more or fewer documents have ends of one shape.

    Args:
        position_ids: `(B, T)`, 0 at the first token of each document.
        is_padding: `(B, T)`; the padding of a row counts as one document.

    Example:
        >>> document_ends(torch.tensor([[0, 1, 2, 0, 0, 0]]), torch.tensor([[0, 0, 0, 0, 1, 1]], dtype=torch.bool))
        tensor([[3, 4, 6, 6]], dtype=torch.int32)
    """
    rows, tokens = position_ids.shape
    later_starts = (position_ids[:, 1:] == 0) & ~(is_padding[:, 1:] & is_padding[:, :-1])
    documents = int(later_starts.sum(dim=1).max()) + 1
    ends = torch.full((rows, max(FEWEST_DOCUMENTS, 1 << (documents - 1).bit_length())), tokens, dtype=torch.int32)
    row, token = later_starts.nonzero(as_tuple=True)
    ends[row, later_starts.cumsum(dim=1)[row, token] - 1] = (token + 1).int()
    return ends
