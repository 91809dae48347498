"""Rows come back as the dataset has them."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx.testing import run

pytestmark = pytest.mark.multi
DATA = TensorDataset(torch.arange(11.0))


def delivered(env, fn):
    tx = ax.shard_loader(env)
    return [fn(env, b) for b in ax.feed(tx, DataLoader(DATA, batch_size=4))]


def joined(items):
    """Items of several lengths joined to one tensor, as nodes of graphs are."""
    xs = [x for (x,) in items]
    return {"nodes": torch.cat([x.repeat(2) for x in xs]), "y": torch.stack(xs)}


def of_graphs(env):
    """The rows of `y`; the nodes, of which each row has two, are refused as rows."""
    got, tx = [], ax.shard_loader(env)
    for batch in ax.feed(tx, DataLoader(DATA, 4, collate_fn=joined)):
        got += ax.gather_rows(env, batch["y"] * 2, batch).tolist()
        with pytest.raises(ax.DataError, match=r"wants \d rows in values, got \(\d,\)"):
            ax.gather_rows(env, batch["nodes"], batch)
        with pytest.raises(ax.DataError, match=r"has \d rows here, but its .* have \d"):
            ax.row_weights(batch)
    return got


def rows(env, batch):
    (x,) = batch
    values = {"double": x * 2, "text": [f"row {int(v)}" for v in x]}
    return ax.gather_rows(env, values, batch)


PAIRS = torch.randn(11, 2, 3, generator=torch.Generator().manual_seed(0)).double()


def tower():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).double()


def contrasted(left, right):
    """Each row of one side is told from all rows of the other."""
    return torch.nn.functional.cross_entropy(left @ right.T, torch.arange(len(left)))


def contrast(env, cut=False):
    """Losses and last weights of a run whose loss looks at the rows of all ranks."""

    def loss(model, batch):
        both = model(batch)
        both = ax.gather_rows(env, both.detach() if cut else both, batch)
        both = (both + 0 * model(batch).sum()) if cut else both
        return contrasted(both[:, 0], both[:, 1])

    tx = ax.chain(ax.shard_loader(env), ax.shard_model(env))
    state = ax.init(tx, tower, lambda m: torch.optim.SGD(m.parameters(), 0.1))
    step, losses = ax.step(tx, loss), []
    for batch in ax.feed(tx, DataLoader(PAIRS, 4), stop=5):
        state, out = step(state, batch)
        losses.append(float(out.loss))
    return losses


def alone():
    """The same by torch alone, over whole batches."""
    model, losses = tower(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in [*PAIRS.split(4), *PAIRS.split(4)][:5]:
        both = model(batch)
        loss = contrasted(both[:, 0], both[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def graphs(env):
    """Gradients for a vector and a scalar; and of one rank alone, which is refused."""
    x, s = torch.ones(env.rank, requires_grad=True), torch.ones((), requires_grad=True)
    whole = ax.gather(env, {"x": x, "s": s, "plain": torch.ones(2)})
    assert not whole["plain"].requires_grad
    weights = torch.arange(1.0, 1 + len(whole["x"])) * (1 + env.rank)
    (
        (whole["x"] * weights).sum() + (env.rank + 1) * whole["s"].square().sum()
    ).backward()
    with torch.no_grad():
        assert not ax.gather(env, x).requires_grad
    one = torch.ones(1, requires_grad=not env.main)
    with pytest.raises(ax.CollectiveError, match=r"in none on rank 0, in a graph on"):
        ax.gather(env, one)
    return x.grad.tolist(), float(s.grad)


def test_gradients_come_back_to_the_rank_of_a_row():
    """Sums over ranks of what each says; what only some ranks train is refused."""
    assert run(3)(graphs)() == [([], 12), ([6], 12), ([12, 18], 12)]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_each_sample_comes_once_and_in_order(world):
    """Also where a rank only got a placeholder; plain gather is the control."""
    wanted = alone()
    ran = run(world)(
        lambda env: (
            delivered(env, rows),
            contrast(env),
            contrast(env, cut=True) if world == 2 else [],
        )
    )()
    for batches, losses, cut in ran:
        assert losses == pytest.approx(wanted, abs=1e-12)
        assert cut != pytest.approx(wanted, abs=1e-3)
        double = torch.cat([b["double"] for b in batches])
        assert double.tolist() == [2.0 * i for i in range(11)]
        texts = [text for b in batches for text in b["text"]]
        assert texts == [f"row {i}" for i in range(11)]
    plain = run(world)(lambda env: delivered(env, lambda e, b: ax.gather(e, b[0])))()
    assert (len(torch.cat(plain[0])) == 11) == (world < 4)


@pytest.mark.filterwarnings("ignore:.*items were read for the batch")
def test_what_is_no_row_of_the_batch_is_never_cut_as_one():
    """Nodes of graphs, or two views of an image: rows are those that were read."""
    assert run(2)(of_graphs)() == [[2.0 * i for i in range(11)]] * 2


@pytest.mark.parametrize("pads", [False, True])
def test_rows_of_a_microbatch_are_not_the_rows_of_a_batch(pads):
    """A loss that compares rows would be another one; what is reported is joined."""

    def loss(model, batch, trains=True):
        both = model(batch)
        ax.gather_rows(env, both.detach(), batch)
        ax.gather_rows(env, both if trains else both.detach(), batch)
        w = ax.row_weights(batch)
        return ax.Mean((both.square().mean((1, 2)) * w).sum(), w.sum())

    env = ax.Env()
    loader = ax.shard_loader(env, static_shapes=pads)
    (batch, *_), n = ax.feed(loader, DataLoader(PAIRS, 4)), 2
    state = ax.init(ax.identity, tower, lambda m: torch.optim.SGD(m.parameters(), 0.1))
    with pytest.raises(ax.DataError, match=r"compares its rows, got values of a micro"):
        ax.step(ax.accumulate(n), loss)(state, batch)
    state, _ = ax.step(ax.accumulate(n), loss)(state, batch, False)
    ax.step(ax.accumulate(1), loss)(state, batch)


def test_a_leaf_without_rows_says_what_to_use():
    """A number of the whole batch is no row."""
    env = ax.Env()
    with pytest.raises(ax.DataError, match=r"wants 3 rows in values\['n'\].*ax.reduce"):
        ax.gather_rows(env, {"n": torch.tensor(1.0)}, torch.ones(3))
