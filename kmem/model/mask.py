"""What attention sees: `Documents` of packed sequences, or masks, bool [B, 1, T, S], True where a query may attend to a
key. None means plain causal attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Shape letters: B sequences, T tokens (queries), S tokens with keys, the cached ones included.


class Documents:
    """Causal attention within the documents of packed sequences, without a mask: documents of similar length become one
    batch, padded on the right, where causal attention needs no mask. Needs memory for the tokens, not for their pairs.

    Args:
        index: int64 [P] the token, of the B T tokens of all sequences, that each place of the padded batches holds;
            padding repeats the last token of its document.
        place: int64 [B T] the place of each token.
        batches: (documents, tokens of the longest) of each batch; P is the sum of their products.
    """

    def __init__(self, index: Tensor, place: Tensor, batches: Sequence[tuple[int, int]]) -> None:
        self.index, self.place, self.batches = index, place, batches

    @classmethod
    def of(cls, document_ids: Tensor) -> "Documents | None":
        """Of sequences whose documents `document_ids` [B, T] number, best on the host: the lengths are read there.

        None if every sequence is one document: that is plain causal attention.
        """
        rows, length = document_ids.shape
        begins = torch.ones(rows, length, dtype=torch.bool)
        begins[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]).cpu()
        start = begins.flatten().nonzero().flatten()
        if len(start) == rows:
            return None
        lengths = start.diff(append=start.new_tensor([rows * length]))
        padded = torch.tensor([_padded(size) for size in lengths.tolist()])
        indexes, held, batches = [], [], []
        for longest in padded.unique().tolist():
            chosen = padded == longest
            within, ends = torch.arange(longest), lengths[chosen, None]
            indexes.append((start[chosen, None] + within.minimum(ends - 1)).flatten())
            held.append((within < ends).flatten())
            batches.append((len(ends), longest))
        index, places = torch.cat(indexes), torch.cat(held).nonzero().flatten()
        place = torch.empty_like(places)
        place[index[places]] = places
        return cls(index, place, batches).to(document_ids.device)

    def to(self, device: torch.device) -> "Documents":
        return Documents(self.index.to(device), self.place.to(device), self.batches)

    def pad(self, heads_BTND: Tensor) -> list[Tensor]:
        """[B, T, heads, D] -> [documents, tokens, heads, D] of each batch."""
        padded = _Pad.apply(heads_BTND.flatten(0, 1), self.index, self.place)
        parts = padded.split([documents * tokens for documents, tokens in self.batches])
        return [part.unflatten(0, batch) for part, batch in zip(parts, self.batches, strict=True)]

    def unpad(self, batches: Sequence[Tensor], rows: int) -> Tensor:
        """[documents, tokens, ..] of each batch -> [B, T, ..] for B rows."""
        padded = torch.cat([batch.flatten(0, 1) for batch in batches])
        return _Unpad.apply(padded, self.index, self.place).unflatten(0, (rows, -1))


def _padded(length: int) -> int:
    """The length to which a document is padded: 32, 48, 64, 96, 128 .. It follows from its own length alone, so that
    the same document is computed alike, to the bit, whatever is beside it. Less than a third of it is padding, but for
    short documents; and lengths are few, since each has the fixed costs of its kernels."""
    power = 1 << max(5, (length - 1).bit_length())
    return 3 * power // 4 if power > 32 and length <= 3 * power // 4 else power


class _Pad(torch.autograd.Function):
    """Rows [N, ..] -> [P, ..] at their places. Padding has no gradient: no output comes from it. (Autograd's own
    gradient of an index would add up rows, which takes longer than to gather them.)"""

    @staticmethod
    def forward(context, rows: Tensor, index: Tensor, place: Tensor) -> Tensor:
        context.save_for_backward(place)
        return rows[index]

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None, None]:
        (place,) = context.saved_tensors
        return gradient[place], None, None


class _Unpad(torch.autograd.Function):
    """Rows [P, ..] -> [N, ..], without the padding, whose gradient is 0."""

    @staticmethod
    def forward(context, rows: Tensor, index: Tensor, place: Tensor) -> Tensor:
        context.save_for_backward(place)
        context.size = len(index)
        return rows[place]

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None, None]:
        (place,) = context.saved_tensors
        padded = gradient.new_zeros(context.size, *gradient.shape[1:])
        padded[place] = gradient
        return padded, None, None


def padding_mask(attention_mask: Tensor, queries: int) -> Tensor | None:
    """Causal attention of the last `queries` tokens to the keys that `attention_mask` [B, S] marks with 1.

    A padded query attends only to itself, so that no row of the softmax is empty. None if nothing is padded.
    """
    if bool(attention_mask.all()):
        return None
    keys = attention_mask.shape[1]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=attention_mask.device).tril(keys - queries)
    itself = causal & ~causal.tril(keys - queries - 1)
    return (causal & attention_mask[:, None, None, :].bool()) | itself


def padded_positions(attention_mask: Tensor) -> Tensor:
    """Position ids [B, S] that count the tokens marked with 1; padding before the first such token gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
