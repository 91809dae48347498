"""Which tokens of which documents stand in one sequence of a fixed length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, overload

import attrs
import torch
from torch import Tensor

from accelx import fetch
from accelx.data.lengths import INTEGERS, Lengths, as_lengths, greedy_ends, whole
from accelx.data.mix import Mixture
from accelx.errors import DataError
from accelx.records import code

IGNORED = -100  # the label that torch's and transformers' losses leave out

Piece = tuple[int, Tensor]  # the document's number, and its tokens here: (n,) int64


def pack(
    length: int,
    *,
    key: str | None = None,
    drop_last: bool | None = None,
    cut: bool = True,
    pad: int = 0,
) -> Pack:
    """Documents of any lengths as sequences of `length` tokens: a pure function.

    `pack(length)(documents)` takes an iterable of documents: lists, arrays or tensors
    of whole numbers, or with `key` what mappings hold under it. It gives an iterator of
    dicts of int64 tensors of shape (length,):

    input_ids     the tokens of one document after another
    position_ids  from 0 in each document, and again where a document goes on from the
                  sequence before, whose tokens it cannot attend to
    document_ids  the number of each token's document, counted from 0
    labels        input_ids, with -100 at each place where position_ids is 0, so that
                  no token is to be foretold from another document

    `pack(length)(dataset, lengths)` gives the same sequences as a map-style dataset,
    each found by arithmetic from how many tokens each document has, and read alone.

    Documents are cut where a sequence is full. A last sequence that is not full is left
    out, or with `drop_last=False` filled up. With `cut=False` no document is cut: one
    that does not fit begins the next sequence, and what is left is filled up; nothing
    is left out, and a document longer than `length` is refused. Filled places hold the
    token `pad`, a document number of -1, positions from 0 and labels of -100. Raises
    DataError.
    """
    return Pack(length, key, None if drop_last is cut else drop_last, cut, pad)


@attrs.frozen(repr=False)
class Pack:
    """What `pack` gives: a function of streams of documents, or of a dataset."""

    length: int = attrs.field(validator=whole(1))  # tokens of a sequence
    key: str | None = None  # where a document holds its tokens
    drop_last: bool | None = None  # no last sequence that is not full; None: as `cut`
    cut: bool = True  # a document goes on in the next sequence
    pad: int = 0  # the token that fills up

    def __attrs_post_init__(self) -> None:
        if self.drop_last and not self.cut:
            raise DataError(
                "cut=False keeps every document, got drop_last=True, which would lose "
                "those of the last sequence; leave drop_last out"
            )

    @property
    def drops(self) -> bool:
        """Whether a last sequence that is not full is left out."""
        return self.cut if self.drop_last is None else self.drop_last

    @overload
    def __call__(self, documents: Iterable[Any]) -> Iterator[dict[str, Tensor]]: ...
    @overload
    def __call__(self, documents: Any, lengths: Any) -> Packed: ...
    def __call__(self, documents: Any, lengths: Any = None) -> Any:
        """The sequences of a stream, or with `lengths` those of a dataset."""
        if lengths is None:
            return self._stream(documents)
        return Packed(documents, as_lengths(lengths), self)

    def _stream(self, documents: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
        pieces, room = list[Piece](), self.length
        for number, document in enumerate(documents):
            tokens = _tokens(document, self.key, number)
            if not self.cut:
                _check_fits(len(tokens), self.length, number)
                if len(tokens) > room:
                    yield _sequence(pieces, self.length, self.pad)
                    pieces, room = [], self.length
            while len(tokens) >= room:
                pieces.append((number, tokens[:room]))
                yield _sequence(pieces, self.length, self.pad)
                tokens, pieces, room = tokens[room:], [], self.length
            if len(tokens):
                pieces.append((number, tokens))
                room -= len(tokens)
        if pieces and not self.drops:
            yield _sequence(pieces, self.length, self.pad)

    def __repr__(self) -> str:
        return code("pack", self)


@attrs.frozen(eq=False, repr=False)
class Packed:
    """Sequences of a map-style dataset of documents, any of them in O(log documents).

    Sequence j is that of the stream, and reads only the documents that are in it.
    """

    dataset: Any
    lengths: Lengths
    settings: Pack
    _ends: Tensor = attrs.field(init=False)  # (documents,): tokens up to and with each
    _first: Tensor | None = attrs.field(init=False)  # uncut: where each sequence begins

    def __attrs_post_init__(self) -> None:
        _check_documents(self.dataset, self.lengths)
        values, first = self.lengths.values, None
        if not self.settings.cut:
            longest = int(values.argmax())
            _check_fits(int(values[longest]), self.settings.length, longest)
            # what has no tokens belongs to the sequence before, if there is one
            first = torch.tensor(greedy_ends(values, self.settings.length))
            first = first[: -1 if int(values.sum()) else 0]
        object.__setattr__(self, "_ends", values.cumsum(0))
        object.__setattr__(self, "_first", first)

    def __len__(self) -> int:
        if self._first is not None:
            return len(self._first)
        total, length = int(self._ends[-1]), self.settings.length
        return total // length if self.settings.drops else -(-total // length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        spans = [self._span(int(index)) for index in indices]
        wanted = sorted({number for span in spans for number, *_ in span})
        items = fetch.items(self.dataset, wanted) if wanted else []
        read = {n: self._read(n, item) for n, item in zip(wanted, items, strict=True)}
        cut = [[(n, read[n][low:high]) for n, low, high in span] for span in spans]
        return [_sequence(one, self.settings.length, self.settings.pad) for one in cut]

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, if it wants to know."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def _span(self, index: int) -> list[tuple[int, int, int]]:
        """Each document in a sequence, and which of its tokens: (number, low, high)."""
        if not 0 <= index < len(self):
            raise IndexError(
                f"a sequence is one of 0 to {len(self) - 1}, got {index}; count from 0"
            )
        low, high = self._tokens_of(index)
        first = int(torch.searchsorted(self._ends, low, right=True))
        last = int(torch.searchsorted(self._ends, high))
        sizes = self.lengths.values[first : last + 1].tolist()
        span, begin = list[tuple[int, int, int]](), int(self._ends[first]) - sizes[0]
        for number, size in enumerate(sizes, first):
            if size:
                span.append((number, max(low - begin, 0), min(high - begin, size)))
            begin += size
        return span

    def _tokens_of(self, index: int) -> tuple[int, int]:
        """Which tokens of all documents in a row are in a sequence: [low, high)."""
        length, total = self.settings.length, int(self._ends[-1])
        if self._first is None:
            return index * length, min((index + 1) * length, total)
        documents = self._first[index : index + 2]
        begins = self._ends[documents] - self.lengths.values[documents]
        low, high, *_ = *begins.tolist(), total
        return low, high

    def _read(self, number: int, document: Any) -> Tensor:
        tokens = _tokens(document, self.settings.key, number)
        said = int(self.lengths.values[number])
        if len(tokens) != said:
            raise DataError(
                f"document {number} must have as many tokens as its length says, "
                f"{said}, got {len(tokens)}; count lengths after tokenizing"
            )
        return tokens

    def __repr__(self) -> str:
        held = f"<{type(self.dataset).__name__} of {len(self.dataset)}>"
        return f"{self.settings!r}({held}, {self.lengths!r})"


def block_mask(document_ids: Tensor) -> Tensor:
    """Which token may attend to which: earlier ones, and itself, of its own document.

    `document_ids` is (batch, length); the result (batch, 1, length, length), bool, on
    the same device, as scaled_dot_product_attention takes it. The tokens of a document
    must stand together. Memory is quadratic: attention that reads `position_ids`, or
    flex_attention, needs none of it.
    """
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def _sequence(pieces: list[Piece], length: int, pad: int) -> dict[str, Tensor]:
    """What `pack` says of one sequence; pieces are of at least one token each."""
    left = length - sum(len(tokens) for _, tokens in pieces)
    if left:
        pieces = [*pieces, (-1, torch.full((left,), pad))]
    sizes = torch.tensor([len(tokens) for _, tokens in pieces])
    starts = sizes.cumsum(0) - sizes
    input_ids = torch.cat([tokens for _, tokens in pieces])
    numbers = torch.tensor([number for number, _ in pieces])
    labels = input_ids.clone()
    labels[starts] = IGNORED
    if left:
        labels[-left:] = IGNORED
    return {
        "input_ids": input_ids,
        "position_ids": torch.arange(length) - starts.repeat_interleave(sizes),
        "document_ids": numbers.repeat_interleave(sizes),
        "labels": labels,
    }


_REMEDY = 'tokenize first, and name what holds tokens by pack(..., key="input_ids")'


def _tokens(document: Any, key: str | None, number: int) -> Tensor:
    """The tokens of a document: (n,) int64, on the CPU."""
    held = document if key is None else document[key]
    try:  # not as_tensor, which warns of an array that cannot be written to
        found = held if isinstance(held, Tensor) else torch.tensor(held)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"a document must be a row of whole numbers, got {type(held).__name__} for "
            f"document {number} ({error}); {_REMEDY}"
        ) from error
    if found.dim() == 1 and (found.dtype in INTEGERS or not len(found)):
        return found.detach().to("cpu", torch.int64)
    raise DataError(
        f"a document must be a row of whole numbers, got shape {tuple(found.shape)} of "
        f"{found.dtype} for document {number}; {_REMEDY}"
    )


def _check_fits(size: int, length: int, number: int) -> None:
    if size > length:
        raise DataError(
            f"cut=False wants documents of at most {length} tokens, got {size} in "
            f"document {number}; write pack({size}, cut=False) or more, or leave out "
            "cut=False"
        )


def _check_documents(dataset: Any, lengths: Lengths) -> None:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            "pack(...)(dataset, lengths) wants documents by index, got "
            f"{type(dataset).__name__}; leave out lengths for a stream"
        )
    if isinstance(dataset, Mixture):
        raise DataError(
            "pack wants documents in a fixed row, got a mixture, whose rows are drawn; "
            "pack each source and mix what comes out"
        )
    if len(dataset) != len(lengths):
        raise DataError(
            f"pack wants one length for each of {len(dataset)} documents, got "
            f"{len(lengths)}; write [len(document) for document in dataset]"
        )
