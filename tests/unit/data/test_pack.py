"""Packed sequences hold every token once, and no token meets another document's."""

from __future__ import annotations

import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from accelx.data.mix import mix
from accelx.data.pack import Pack, Packed, block_mask, pack
from accelx.errors import DataError

DOCUMENTS = st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=12)
CUTS = st.builds(pack, st.integers(1, 12), drop_last=st.booleans())
WHOLES = st.builds(pack, st.integers(9, 14), cut=st.just(False), pad=st.integers(0, 3))
PACKS = CUTS | WHOLES
DOCS = [[5, 6, 7], [], [8], [9, 1, 2, 3, 4, 5], [4, 4]]


class Documents(Dataset):
    """Documents that note which of them are read."""

    def __init__(self, documents):
        self.documents, self.reads, self.epoch = documents, [], None

    def __len__(self):
        return len(self.documents)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, i):
        self.reads.append(i)
        return self.documents[i]


def columns(sequence):
    """A sequence as rows of (token, position, document, label), one for each place."""
    names = ("input_ids", "position_ids", "document_ids", "labels")
    assert tuple(sequence) == names
    assert all(sequence[name].dtype == torch.int64 for name in names)
    return list(zip(*(sequence[name].tolist() for name in names), strict=True))


def by_hand(settings, documents):
    """The judge: one token after another, in plain Python."""
    length, found, row = settings.length, [], []

    def close():
        left = length - len(row)
        fill = [(settings.pad, at, -1, -100) for at in range(left)]
        found.append([*row, *fill])
        row.clear()

    for number, document in enumerate(documents):
        if not settings.cut and len(row) + len(document) > length:
            close()
        at = 0
        for token in document:
            if len(row) == length:
                close()
                at = 0
            row.append((token, at, number, token if at else -100))
            at += 1
    if row and (len(row) == length or not settings.drops):
        close()
    return found


@settings(max_examples=300)
@given(PACKS, DOCUMENTS)
def test_a_stream_is_what_a_loop_over_tokens_makes(settings, documents):
    """Tokens, positions, document numbers and labels, place by place."""
    assert [columns(s) for s in settings(iter(documents))] == (
        by_hand(settings, documents)
    )


@settings(max_examples=300)
@given(PACKS, DOCUMENTS, st.data())
def test_a_dataset_gives_the_sequences_of_the_stream(settings, documents, data):
    """Any of them by its number, in any order, one by one and many at once."""
    packed = settings(documents, [len(one) for one in documents])
    judged = by_hand(settings, documents)
    assert len(packed) == len(judged)
    assume(judged)
    wanted = data.draw(st.lists(st.sampled_from(range(len(judged))), max_size=5))
    assert [columns(packed[j]) for j in wanted] == [judged[j] for j in wanted]
    many = packed.__getitems__(wanted)
    assert [columns(one) for one in many] == [judged[j] for j in wanted]


@settings(max_examples=200)
@given(PACKS, DOCUMENTS)
def test_no_token_is_lost_or_told_from_another_document(settings, documents):
    """All tokens come once, in order; each label is told from its own document."""
    found = [place for s in settings(documents) for place in columns(s)]
    tokens = [token for token, _, document, _ in found if document >= 0]
    whole = list(chain.from_iterable(documents))
    kept = len(whole) // settings.length * settings.length
    assert tokens == (whole[:kept] if settings.drops else whole)
    for before, here in zip([None, *found], found, strict=False):
        if here[3] != -100:
            assert before[2] == here[2] >= 0
            assert here[1] == before[1] + 1


def test_an_example_by_hand():
    """Three documents over sequences of four, the third cut and numbered anew."""
    first, second, third = map(columns, pack(4)(DOCS))
    assert first == [(5, 0, 0, -100), (6, 1, 0, 6), (7, 2, 0, 7), (8, 0, 2, -100)]
    assert second == [(9, 0, 3, -100), (1, 1, 3, 1), (2, 2, 3, 2), (3, 3, 3, 3)]
    assert third == [(4, 0, 3, -100), (5, 1, 3, 5), (4, 0, 4, -100), (4, 1, 4, 4)]


def test_only_the_documents_of_a_sequence_are_read():
    """Once for all sequences that are asked for together, and none without tokens."""
    documents = Documents(DOCS)
    packed = pack(4)(documents, [len(one) for one in DOCS])
    assert documents.reads == []
    columns(packed[0])
    assert documents.reads == [0, 2]
    documents.reads.clear()
    packed.__getitems__([2, 1])
    assert documents.reads == [3, 4]
    packed.set_epoch(7)
    assert documents.epoch == 7
    assert torch.equal(
        pickle.loads(pickle.dumps(packed))[1]["input_ids"], packed[1]["input_ids"]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_loads_it(workers):
    """torch's own DataLoader stacks sequences, and shuffles them as it does any."""
    documents = [list(range(i, i + i % 7)) for i in range(40)]
    packed = pack(8)(documents, [len(one) for one in documents])
    loader = DataLoader(packed, 3, num_workers=workers)
    whole = list(chain.from_iterable(documents))
    found = torch.cat([batch["input_ids"] for batch in loader])
    assert found.flatten().tolist() == whole[: found.numel()]
    assert len(found) == len(packed)


@pytest.mark.parametrize(
    "made",
    [
        lambda one: one,
        torch.tensor,
        lambda one: torch.tensor(one, dtype=torch.int32),
        lambda one: np.array(one, dtype=np.uint16),
        lambda one: np.broadcast_to(np.array(one), (len(one),)),  # not writable
        tuple,
    ],
)
def test_documents_may_be_lists_arrays_and_tensors(made):
    """Under a key or not, they pack the same; what else an item holds is left."""
    judged = [columns(s) for s in pack(4)(DOCS)]
    documents = [made(one) for one in DOCS]
    assert [columns(s) for s in pack(4)(documents)] == judged
    held = [{"text": "x", "ids": one} for one in documents]
    assert [columns(s) for s in pack(4, key="ids")(held)] == judged
    packed = pack(4, key="ids")(held, [len(one) for one in DOCS])
    assert [columns(packed[j]) for j in range(3)] == judged


def test_a_sequence_owns_its_memory():
    """What becomes of a document later does not change what was packed of it."""
    document = torch.arange(4)
    (sequence,) = pack(4)([document])
    document.zero_()
    assert sequence["input_ids"].tolist() == [0, 1, 2, 3]


def test_the_mask_is_each_documents_own_triangle():
    """The judge: torch.block_diag of lower triangles, padding one of them."""
    ids = torch.tensor([[0, 0, 0, 2, 3, 3], [4, 5, 5, 5, -1, -1]])
    mask = block_mask(ids)
    assert mask.shape == (2, 1, 6, 6)
    assert mask.dtype == torch.bool
    for row, sizes in zip(mask, [(3, 1, 2), (1, 3, 2)], strict=True):
        parts = [torch.ones(n, n).tril() for n in sizes]
        assert torch.equal(row[0], torch.block_diag(*parts).bool())
    assert mask.any(-1).all()  # a row without any would be nan in a softmax


def test_attention_under_the_mask_is_each_documents_own():
    """scaled_dot_product_attention takes it as it is; causal alone is another thing."""
    torch.manual_seed(0)
    (sequence,) = pack(9, cut=False)([[1] * 3, [2] * 4])
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    mask = block_mask(sequence["document_ids"][None])
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    for low, high in ((0, 3), (3, 7)):
        part = [x[:, :, low:high] for x in (q, k, v)]
        alone = F.scaled_dot_product_attention(*part, is_causal=True)
        assert torch.allclose(whole[:, :, low:high], alone, atol=1e-6)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert not torch.allclose(whole[:, :, 3:7], causal[:, :, 3:7], atol=1e-3)


def llama(attention):
    """A tiny Llama with random weights, and its documents."""
    tf = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        attn_implementation=attention,
    )
    return tf.LlamaForCausalLM(config).eval()


WORDS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [2, 1]]


@torch.no_grad()
def apart(model, sequence, **given_arguments):
    """How far a sequence's logits lie from those of its documents, each alone."""
    ids = sequence["input_ids"][None]
    logits = model(input_ids=ids, **given_arguments).logits[0]
    gaps = []
    for number, words in enumerate(WORDS):
        alone = model(input_ids=torch.tensor([words])).logits[0]
        gaps.append((logits[sequence["document_ids"] == number] - alone).abs().max())
    return float(max(gaps))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_model_computes_each_document_alone(attention):
    """Llama by positions and a mask, or by positions without a cache; controls fail."""
    model = llama(attention)
    (sequence,) = pack(13, cut=False)(WORDS)
    positions = {"position_ids": sequence["position_ids"][None]}
    mask = block_mask(sequence["document_ids"][None])
    if attention == "eager":  # which adds its mask
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    assert apart(model, sequence, **positions, attention_mask=mask) < 1e-5
    assert apart(model, sequence, **positions, use_cache=False) < 1e-5
    assert apart(model, sequence) > 1e-2
    plain = torch.ones_like(sequence["input_ids"])[None]
    assert apart(model, sequence, **positions, attention_mask=plain) > 1e-3


def test_the_loss_of_a_packed_model_is_that_of_its_documents():
    """Labels leave out what is told across a boundary: sums over documents agree."""
    model = llama("sdpa")
    (sequence,) = pack(13, cut=False)(WORDS)
    batch = {name: column[None] for name, column in sequence.items()}
    ids, labels = batch["input_ids"], batch["labels"]
    logits = model(
        input_ids=ids, position_ids=batch["position_ids"], use_cache=False
    ).logits

    def total(scores, wanted):
        return F.cross_entropy(scores[0, :-1], wanted[0, 1:], reduction="sum")

    alone = [torch.tensor([words]) for words in WORDS if len(words) > 1]
    judged = sum(total(model(input_ids=one).logits, one) for one in alone)
    assert torch.allclose(total(logits, labels), judged, rtol=1e-5)
    assert not torch.allclose(total(logits, ids), judged, rtol=1e-2)


def test_transformers_finds_the_boundaries_that_positions_tell():
    """Both of its ways, of masks and of flash attention, find where documents begin."""
    masking = pytest.importorskip("transformers.masking_utils")
    flash = pytest.importorskip("transformers.modeling_flash_attention_utils")
    find = getattr(masking, "find_packed_sequence_indices", None)
    prepare = getattr(flash, "prepare_fa_kwargs_from_position_ids", None)
    if find is None or prepare is None:
        pytest.skip("this transformers finds them by other functions")
    rows, ends = list(pack(4, drop_last=False)([*DOCS, [1] * 9])), [0]
    for sequence in rows:
        positions, ids = sequence["position_ids"][None], sequence["document_ids"]
        starts = [0, *(i for i in range(1, 4) if ids[i] != ids[i - 1]), 4]
        sizes = torch.tensor(starts).diff()
        numbers = torch.arange(len(sizes)).repeat_interleave(sizes)
        found = find(positions)
        assert (numbers == 0).all() if found is None else torch.equal(found[0], numbers)
        (bounds, _), _ = prepare(positions)
        assert bounds.tolist() == starts
        ends += (sizes.cumsum(0) + ends[-1]).tolist()
    flat = torch.cat([row["position_ids"] for row in rows])[None]
    (bounds, _), _ = prepare(flat)  # which wants a batch as one row
    assert bounds.tolist() == ends


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: pack(0), "length must be .* got 0"),
        (lambda: pack(4, cut=False, drop_last=True), "leave drop_last out"),
        (lambda: list(pack(4)([[0.5]])), "torch.float32 for document 0"),
        (lambda: list(pack(4)([[1], [[2]]])), r"shape \(1, 1\) .*document 1"),
        (lambda: list(pack(4)(["text"])), "got str for document 0"),
        (lambda: list(pack(4)([{"ids": [1]}])), 'got dict .*key="input_ids"'),
        (lambda: list(pack(4)([[1, [2]]])), "got list for document 0"),
        (lambda: list(pack(4, cut=False)([[1], [2] * 5])), "got 5 in document 1"),
        (lambda: pack(4, cut=False)([[1], [2] * 5], [1, 5]), "got 5 in document 1"),
        (lambda: pack(4)(DOCS, [1]), "each of 5 documents, got 1"),
        (lambda: pack(4)(iter(DOCS), [1]), "by index, got list_iterator"),
        (lambda: pack(4)(DOCS, [3, 0, 1, 6, -2]), "at least 0, got -2 for item 4"),
        (lambda: pack(3)([[1, 2, 3]], [4])[0], "length says, 4, got 3"),
        (lambda: pack(4)(mix({"a": DOCS}, [1]), [1]), "mixture, whose rows are drawn"),
    ],
)
def test_what_cannot_be_packed_is_refused(make, match):
    """With the document's number and what came."""
    with pytest.raises(DataError, match=match):
        make()


@pytest.mark.parametrize("index", [-1, 3])
def test_a_sequence_that_is_not_there_is_refused(index):
    """Numbers go from 0 to the last sequence."""
    packed = pack(4)(DOCS, [len(one) for one in DOCS])
    with pytest.raises(IndexError, match=f"0 to 2, got {index}"):
        packed[index]


def test_documents_without_tokens_make_no_sequence():
    """In both forms, cut or whole."""
    for settings_of in (pack(3, drop_last=False), pack(3, cut=False)):
        assert list(settings_of([[], []])) == []
        assert len(settings_of([[], []], [0, 0])) == 0


def test_it_prints_as_the_code_that_makes_it():
    """Only what is not at its default; equal settings are equal."""
    for made in (
        pack(8),
        pack(8, drop_last=True),
        pack(8, key="ids", drop_last=False, pad=3),
        pack(8, cut=False),
    ):
        assert eval(repr(made)) == made
    assert repr(pack(8, drop_last=True)) == "pack(8)"
    assert repr(pack(8, cut=False)) == "pack(8, cut=False)"
    packed = pack(8)([[1, 2]], [2])
    assert repr(packed) == "pack(8)(<list of 1>, [2])"
    assert isinstance(packed, Packed)
    assert isinstance(packed.settings, Pack)
