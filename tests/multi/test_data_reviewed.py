"""What a user's own samplers, datasets and files must not do in silence."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
)

import accelx as ax
from accelx.testing import RankError, run

pytestmark = pytest.mark.multi

ITEMS = list(range(10))


def fed(env, source, start=0, stop=None, seed=0):
    """The indices that this rank reads, step by step."""
    tx = ax.shard_loader(env, seed=seed)
    return [b.tolist() for b in ax.feed(tx, source, start=start, stop=stop)]


def alone(source, start=0, stop=None):
    return fed(ax.Env(), source, start, stop)


def refused(do):
    """What a rank says; None where it went on in silence."""
    try:
        do()
    except ax.DataError as error:
        return str(error)
    return None


class Drawing(Sampler):
    """A sampler that shuffles by a generator of its own, whatever it is called."""

    def __init__(self, kind):
        self.kind = kind
        self.own = {
            "python": random.Random,
            "numpy": numpy.random.default_rng,
            "torch": lambda seed: torch.Generator().manual_seed(seed),
        }[kind](0)

    def __len__(self):
        return 10

    def __iter__(self):
        if self.kind == "python":
            return iter(self.own.sample(ITEMS, 10))
        if self.kind == "numpy":
            return iter(self.own.permutation(10).tolist())
        return iter(torch.randperm(10, generator=self.own).tolist())


class Nested(BatchSampler):
    """A batch sampler of the user's own around a sampler with a generator."""


def nested():
    inner = RandomSampler(ITEMS, generator=torch.Generator().manual_seed(1))
    return DataLoader(ITEMS, batch_sampler=Nested(inner, 4, False))


def drawing(kind):
    return DataLoader(ITEMS, 4, sampler=Drawing(kind))


class Shuffled:
    """A sampler that shuffles its buckets in place, and holds them in a slot."""

    __slots__ = ("buckets",)

    def __init__(self, *buckets):
        self.buckets = list(buckets)

    def __len__(self):
        return 10

    def __iter__(self):
        for bucket in self.buckets:
            random.shuffle(bucket)
        return itertools.chain(*self.buckets)


class Several(Sampler):
    """Samplers in a list, of which each has a generator of its own."""

    def __init__(self):
        parts, drawn = [ITEMS[:5], ITEMS[5:]], torch.Generator()
        self.each = [RandomSampler(part, generator=drawn) for part in parts]

    def __len__(self):
        return 10

    def __iter__(self):
        first, second = map(list, self.each)
        return iter(first + [5 + i for i in second])


def shuffled(*buckets):
    return DataLoader(ITEMS, 4, sampler=Shuffled(*buckets))


KINDS = {
    **{kind: lambda kind=kind: drawing(kind) for kind in ("python", "numpy", "torch")},
    "nested": nested,
    "array": lambda: shuffled(numpy.arange(10)),
    "buckets": lambda: shuffled([8, 2, 4, 6, 0], [9, 1, 3, 5, 7]),
    "several": lambda: DataLoader(ITEMS, 4, sampler=Several()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_with_a_generator_of_its_own_goes_on_where_it_was(kind):
    """Steps 1 to 9 are those of the whole run, by the same loader and by a new one."""
    loader = KINDS[kind]()
    whole = alone(loader, 0, 9)
    for epoch in range(3):
        step = 3 * epoch
        assert sorted(i for b in whole[step : step + 3] for i in b) == ITEMS
    assert whole[:3] != whole[3:6]  # the control: it does shuffle
    assert alone(loader, 1, 9) == whole[1:]
    assert alone(KINDS[kind](), 4, 9) == whole[4:]


def test_ranks_do_not_change_the_order_of_a_sampler_with_its_own_generator():
    """Two ranks together read the batches that one reads."""
    one = alone(drawing("python"), 0, 6)
    first, second = run(2)(lambda env: fed(env, drawing("python"), 0, 6))()
    assert [a + b for a, b in zip(first, second, strict=True)] == one


class Told(Sampler):
    """A sampler whose order is that of the epoch that it is told."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 10

    def __iter__(self):
        drawn = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(10, generator=drawn).tolist())


def test_a_sampler_inside_a_batch_sampler_is_told_the_epoch():
    """As one outside is; its epochs are those that torch reads when it is told."""
    inner = Told()
    found = alone(DataLoader(ITEMS, batch_sampler=Nested(inner, 4, False)), 0, 6)
    told = []
    for epoch in range(2):
        inner.set_epoch(epoch)
        told += [b.tolist() for b in DataLoader(ITEMS, 4, sampler=inner)]
    assert found == told
    assert told[:3] != told[3:]


class Numbered(Sampler):
    """A sampler that holds a NumPy generator under torch's name."""

    def __init__(self):
        self.generator = numpy.random.default_rng(0)

    def __len__(self):
        return 10

    def __iter__(self):
        return iter(self.generator.permutation(10).tolist())


def test_generator_may_be_an_attribute_of_another_kind():
    """Each item comes once, and a resumed run reads the rest."""
    loader = DataLoader(ITEMS, 4, sampler=Numbered())
    whole = alone(loader)
    assert sorted(itertools.chain(*whole)) == ITEMS
    assert alone(loader, 1) == whole[1:]


class Endless(Sampler):
    """A sampler without an end, and without a length."""

    def __iter__(self):
        while True:
            yield from torch.randperm(10).tolist()


def test_an_endless_sampler_gives_as_many_steps_as_are_asked_for():
    """With stop= it neither hangs nor needs a length; resuming walks to its place."""

    def endless(env):
        source = DataLoader(ITEMS, 4, sampler=Endless())
        return fed(env, source, 0, 8), fed(env, source, 5, 8)

    try:
        ((whole, rest),) = run(1)(endless)()
    except RankError as error:
        pytest.fail(f"it hangs: {error}")
    assert [len(b) for b in whole] == [4] * 8
    assert sorted(itertools.chain(*whole[:5])) == sorted(2 * ITEMS)
    assert rest == whole[5:]


class Modest(Sampler):
    """A sampler that gives more than its length says."""

    def __init__(self, gives):
        self.gives = gives

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(range(self.gives))


def test_a_sampler_that_gives_more_than_its_length_is_refused():
    """What would be left out in silence is an error; an honest one goes on."""
    with pytest.raises(ax.DataError, match="__len__"):
        alone(DataLoader(ITEMS, 4, sampler=Modest(10)))
    with pytest.raises(ax.DataError, match="__len__"):
        alone(DataLoader(ITEMS, 4, sampler=Modest(10)), 1, 5)
    assert alone(DataLoader(ITEMS, 4, sampler=Modest(8))) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


class Reusing(Sampler):
    """A batch sampler that yields one list, again and again with other indices."""

    def __len__(self):
        return 5

    def __iter__(self):
        batch = [0, 0]
        for low in range(0, 10, 2):
            batch[:] = low, low + 1
            yield batch


def test_a_batch_sampler_may_fill_one_list_again_and_again():
    """The batches are those of torch's loader."""
    loader = DataLoader(ITEMS, batch_sampler=Reusing())
    assert alone(loader) == [b.tolist() for b in loader]


class Faulty(Dataset):
    """Twelve rows, of which some do not come as they should."""

    def __init__(self, fault=None):
        self.fault = fault
        if fault == "fewer":
            self.__getitems__ = lambda some: [torch.tensor(i) for i in some if i % 6]

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if self.fault == "stop" and index == 5:
            raise StopIteration
        return torch.tensor(index)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["fewer", "stop"])
def test_a_dataset_that_gives_fewer_rows_than_asked_for_is_an_error(fault, workers):
    """From __getitems__, or by a StopIteration, which would end the epoch there."""
    with pytest.raises((ax.DataError, RuntimeError)):
        alone(DataLoader(Faulty(fault), 4, num_workers=workers))
    assert len(alone(DataLoader(Faulty(), 4, num_workers=workers))) == 3


class Epochal(Dataset):
    """Items that know the epoch in which they are read."""

    epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([index, self.epoch])


def test_two_feeds_of_one_dataset_do_not_take_each_others_epoch():
    """The training goes on in its epoch after an evaluation of the same rows."""
    data, tx = Epochal(), ax.shard_loader(ax.Env())
    training = ax.feed(tx, DataLoader(data, 2), start=4, stop=8)
    epochs = {int(next(training)[0, 1])}
    for batch in ax.feed(tx, DataLoader(data, 4)):
        assert batch[:, 1].tolist() == [0] * 4
    assert epochs | {e for b in training for e in b[:, 1].tolist()} == {1}


@pytest.mark.parametrize(
    "wrap", [lambda d: Subset(d, range(8)), lambda d: ConcatDataset([d])]
)
def test_a_dataset_inside_a_subset_or_a_row_of_them_is_told_the_epoch(wrap):
    """As the bare one is."""
    for data in (Epochal(), wrap(Epochal())):
        found = alone(DataLoader(data, 4), 2)
        assert {epoch for batch in found for _, epoch in batch} == {1}


PRIOR = torch.ones(3)


def beside(items):
    """A batch that holds a tensor of the program's own before its rows."""
    return {"prior": PRIOR, "x": torch.stack([x for (x,) in items])}


def weighed(env, evaluate):
    """Loss and weight of each step, with an evaluation between batch and step."""

    def make():
        model = nn.Linear(1, 1)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    def loss(model, batch):
        return model(batch["x"]).square().mean()

    tx = ax.chain(ax.shard_loader(env), ax.shard_model(env))
    state = ax.init(tx, make, lambda m: torch.optim.SGD(m.parameters(), 0.0))
    step = ax.step(tx, loss)
    rows = TensorDataset(torch.arange(10.0).view(10, 1))
    found = []
    for batch in ax.feed(tx, DataLoader(rows, 4, collate_fn=beside)):
        if evaluate:
            few = Subset(rows, range(3))
            list(ax.feed(tx, DataLoader(few, 4, collate_fn=beside)))
        state, out = step(state, batch)
        found.append((float(out.loss), float(out.weight)))
    return found


def test_a_tensor_that_batches_share_does_not_carry_one_batchs_rows_to_another():
    """Losses and weights are those of the closed form, or the batch is refused."""
    means = [(3.5, 4.0), (31.5, 4.0), (72.5, 2.0)]

    def both(env):
        return weighed(env, evaluate=False), weighed(env, evaluate=True)

    for plain, between in run(2)(both)():
        assert torch.tensor(plain).allclose(torch.tensor(means))  # the control
        assert torch.tensor(between).allclose(torch.tensor(means))


def gathered(env):
    """Batches of columns, gathered as the lists that they are."""
    found = []
    for columns in (1, 2):
        data = TensorDataset(*(torch.arange(7) + 100 * c for c in range(columns)))
        for batch in ax.feed(ax.shard_loader(env), DataLoader(data, 4)):
            whole = ax.gather_rows(env, batch, batch)
            found.append([column.tolist() for column in whole])
    return found


def test_a_list_of_columns_is_gathered_as_columns_whatever_the_number_of_rows():
    """Also where a rank has as many rows as there are columns."""
    wanted = [
        [[i + 100 * c for i in rows] for c in range(columns)]
        for columns in (1, 2)
        for rows in (range(4), range(4, 7))
    ]
    assert run(1)(gathered)() == [wanted]  # the control
    assert run(2)(gathered)() == [wanted] * 2


def written(folder, name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"n": n}) for n in rows))
    return str(path)


def differing(env, what, folder):
    """What this rank says where ranks were given different data."""
    last = bool(env.rank)
    if what == "empty":
        return refused(lambda: fed(env, DataLoader(range(5 * env.rank), 2)))
    if what == "start":
        return refused(lambda: fed(env, DataLoader(ITEMS, 4), 9 * env.rank, 9))
    if what == "settings":
        source = DataLoader(ITEMS, 4, drop_last=last)
        return refused(lambda: fed(env, source, 0, 5))
    if what == "nothing":  # the control
        return refused(lambda: fed(env, DataLoader(ITEMS, 4)))
    if what == "mixture":
        held = {"a": range(8), "b": range(8, 16)}
        turned = dict(reversed(held.items())) if last else held
        return refused(lambda: fed(env, DataLoader(ax.mix(turned, [1, 1]), 4)))
    names = [written(folder / str(env.rank), f"{k}.jsonl", range(4)) for k in "ab"]
    files = ax.from_files(names[::-1] if last else names)
    tx = ax.shard_loader(env)
    return refused(lambda: list(ax.feed(tx, DataLoader(files, 4))))


@pytest.mark.parametrize(
    "what", ["empty", "start", "settings", "files", "mixture", "nothing"]
)
def test_ranks_with_different_data_hear_of_it_together(what, tmp_path):
    """No rows or nothing to do on one rank; other settings, files, order of sources."""
    try:
        texts = run(2)(differing)(what, tmp_path)
    except RankError as error:
        pytest.fail(f"ranks part: {str(error)[-300:]}")
    if what == "nothing":
        assert texts == [None, None]
    else:
        assert all(text is not None and "each rank" in text for text in texts), texts


def test_a_mixture_under_another_order_is_refused():
    """A sampler or a subset would take its indices for rows, of one source alone."""
    mixture = ax.mix({"a": range(1000), "b": range(30)}, [0.5, 0.5], length=100)
    plain = alone(DataLoader(mixture, 10, shuffle=True))
    assert sum(map(len, plain)) == 100
    with pytest.raises(ax.DataError):
        alone(DataLoader(mixture, 10, sampler=RandomSampler(mixture, num_samples=50)))
    with pytest.raises(ax.DataError):
        alone(DataLoader(Subset(mixture, range(50)), 10))
    with pytest.raises(ax.DataError):
        alone(DataLoader(ConcatDataset([mixture]), 10))


@pytest.mark.parametrize("make", [ax.by_tokens, ax.by_length])
def test_lengths_of_another_number_of_items_are_refused(make):
    """Too few would leave items out in silence."""
    right = DataLoader(ITEMS, batch_sampler=make(8, [1] * 10))
    assert sorted(itertools.chain(*alone(right))) == ITEMS
    with pytest.raises(ax.DataError, match="10 items"):
        alone(DataLoader(ITEMS, batch_sampler=make(8, [1] * 9)))


def test_a_pattern_leaves_out_hidden_files_as_a_shell_does(tmp_path):
    """Copies that editors and notebooks keep would be read as rows again."""
    written(tmp_path, "a.jsonl", range(3))
    written(tmp_path, ".a.jsonl", range(3))
    written(tmp_path, ".ipynb_checkpoints/a-checkpoint.jsonl", range(3))
    assert len(ax.from_files(f"{tmp_path}/*.jsonl")) == 3
    assert len(ax.from_files(f"{tmp_path}/**/*.jsonl")) == 3
    assert len(ax.from_files(f"{tmp_path}/.*.jsonl")) == 3  # asked for by name


def test_a_tar_with_links_in_place_of_files_does_not_lose_them(tmp_path):
    """GNU tar stores the second of two hard links as a link: no sample may go."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.LNKTYPE, "a.txt"
        tar.addfile(link)
    said = refused(lambda: len(ax.from_files(str(path))))
    assert (said is not None and "b.txt" in said) or len(ax.from_files(str(path))) == 2


def test_columns_that_hold_other_things_are_refused(tmp_path):
    """Lists of numbers beside lists of texts; structs beside other structs."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, one, other in [("list", [1], ["x"]), ("struct", {"a": 1}, {"b": "x"})]:
        paths = [str(tmp_path / f"{name}-{k}.parquet") for k in range(2)]
        for path, value in zip(paths, (one, other), strict=True):
            parquet.write_table(pyarrow.table({"c": [value]}), path)
        assert len(ax.from_files([paths[0]])) == 1
        with pytest.raises(ax.DataError, match="same columns"):
            ax.from_files(paths)


def test_fit_batch_leaves_the_batch_as_it_was():
    """A loss that changes its rows in place is tried on rows of its own."""
    env = ax.Env()
    tx = ax.chain(ax.shard_loader(env), ax.shard_model(env))
    state = ax.init(
        tx, lambda: nn.Linear(1, 1), lambda m: torch.optim.SGD(m.parameters(), 0.1)
    )

    def loss(model, batch):
        return model(batch[0].div_(255)).square().mean()

    rows = TensorDataset(torch.arange(8.0).view(8, 1))
    first = next(ax.feed(tx, DataLoader(rows, 8)))
    before = first[0].clone()
    ax.fit_batch(env, tx, loss, first, state=state)
    assert torch.equal(first[0], before)


def packed(env, start):
    lengths = [(7 * i) % 13 + 1 for i in range(60)]
    sources = {"a": torch.arange(37), "b": torch.arange(100, 111)}
    mixture = ax.mix(sources, {"a": 0.7, "b": 0.3}, seed=2, length=43)
    tokens = ax.by_tokens(32, lengths, shuffle=True, padded=True, window=3)
    loaders = [
        DataLoader(torch.arange(60), batch_sampler=tokens),
        DataLoader(mixture, 5, num_workers=env.world - 1),
    ]
    tx = ax.shard_loader(env, seed=4)
    return [
        [ax.gather_rows(env, b, b).tolist() for b in ax.feed(tx, one, start, 30)]
        for one in loaders
    ]


def test_tokens_and_mixtures_go_on_on_other_ranks_and_workers():
    """Held at review: a run on 1 rank is gone on with on 2, from inside an epoch."""
    (whole,) = run(1)(packed)(0)
    assert run(2)(packed)(17) == [[steps[17:] for steps in whole]] * 2


def broken_off(env):
    source = DataLoader(range(8), 4, num_workers=1, persistent_workers=True)
    epochs = ax.shard_loader(env)(source)
    found = []
    for _ in range(3):
        for batch in epochs:
            found.append(batch.tolist())
            if env.rank:
                break
    return found


def test_a_rank_that_breaks_off_an_epoch_does_not_disturb_the_next():
    """Held at review: with workers that stay, and a break on one rank alone."""
    assert run(2)(broken_off)() == [[[0, 1], [4, 5]] * 3, [[2, 3]] * 3]
