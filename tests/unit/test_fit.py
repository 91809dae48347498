"""The largest microbatch is found by trying, and a trial leaves nothing behind."""

import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import accelx as ax
from accelx.fit import _joined, _Tried, counts, fit_batch, foreseen
from accelx.fit_kept import unmade
from accelx.fit_memory import is_full, let_go, meter
from accelx.passes.accumulate import accumulate
from accelx.rows import Rows, mark, rows_of, stamp
from accelx.testing import run
from tests.limits import limit

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ALONE = ax.Env()
MB = 2**20
ROWS = 16


class Wide(nn.Module):
    """One weight, and activations that are wide."""

    def __init__(self, width=8):
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x):
        return torch.tanh(x.expand(-1, self.width) * self.scale)


def wide_loss(model, x):
    return model(x).square().mean()


def adam(model):
    return torch.optim.AdamW(model.parameters(), 0.01)


def limited(more):
    """Let this process have so much more memory than it has, and no more."""
    ax.step(ax.identity, wide_loss)(wide_state(), torch.ones(1, 1))  # imports and pools
    limit(more)


def wide_state(width=8):
    return ax.init(ax.identity, Wide(width), adam)


def fitted(env, more):
    x = torch.linspace(-1, 1, ROWS).view(-1, 1)
    limited(more)
    found = fit_batch(ALONE, ax.identity, wide_loss, x, state=wide_state(MB))
    n = found.find("accumulate").n
    ran = {}
    for k in (n, n // 2):
        try:
            ax.step(accumulate(k), wide_loss)(wide_state(MB), x)
            ran[k] = True
        except RuntimeError as error:
            ran[k] = not is_full(error)
    return n, ran


@linux
@pytest.mark.multi
def test_what_is_found_fits_and_twice_as_much_does_not():
    """Under a real limit of this process: the step with n runs, that with n / 2 not."""
    ((n, ran),) = run(1)(fitted)(110 * MB)
    assert 1 < n < ROWS
    assert ran == {n: True, n // 2: False}


def hopeless(env):
    x = torch.linspace(-1, 1, ROWS).view(-1, 1)
    limited(2 * MB)
    with pytest.raises(ax.PlacementError) as caught:
        fit_batch(ALONE, ax.identity, wide_loss, x, state=wide_state(MB))
    return str(caught.value)


@linux
@pytest.mark.multi
def test_a_row_that_does_not_fit_is_told_with_the_numbers():
    """And with what the allocator said."""
    (text,) = run(1)(hopeless)()
    assert "a microbatch of 1 of the 16 rows of a rank on cpu" in text
    assert "allocate memory" in text


def test_a_batch_that_fits_is_not_cut():
    """And the chain with it computes what the chain without it does."""
    x = torch.linspace(-1, 1, 6).view(-1, 1)
    tx = fit_batch(ALONE, ax.clip(1.0), wide_loss, x, state=wide_state())
    assert tx == accumulate(1)
    whole = ax.step(ax.clip(1.0), wide_loss)(wide_state(), x)[1]
    tried = ax.step(ax.chain(ax.clip(1.0), tx), wide_loss)(wide_state(), x)[1]
    assert torch.equal(whole.loss, tried.loss)
    assert torch.equal(whole.norm, tried.norm)


class Moody(nn.Module):
    """Running statistics, dropout, a counter as a buffer, and half of it in eval."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(5), nn.Dropout())
        self.still = nn.Dropout().eval()
        self.head = nn.Linear(8, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flat", torch.ones(1).expand(4))

    def forward(self, x):
        self.calls += 1
        return self.head(self.still(self.net(x)))


def moody_loss(model, x):
    """Draws from every generator, flips modes, puts a buffer in another's place."""
    noise = random.random() + np.random.rand() + torch.rand(())
    model.still.train()
    model.calls = model.calls + 1
    if len(x) > 6:
        torch.empty(2**46)  # no machine has it: a real error of the allocator
    return (model(x) + noise).square().mean()


def everything(state):
    """All that a trial might change, as things that compare."""
    return {
        "tensors": {k: v.clone() for k, v in state.model.state_dict().items()},
        "identity": [id(b) for b in state.model.buffers()],
        "modes": [m.training for m in state.model.modules()],
        "grads": [p.grad for p in state.model.parameters()],
        "optimizer": [
            {k: v.clone() for k, v in one.items()} for one in state.optim.state.values()
        ],
        "slots": dict(state.slots),
        "step": (state.step, state.skipped, state.spent, state.pending),
        "draws": (random.getstate(), np.random.get_state()[1].tolist()),
        "torch": torch.get_rng_state(),
    }


def changed(one, other):
    """Which parts differ by a bit."""
    return {k for k in one if not _same(one[k], other[k])}


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def nudge(grads):
    """A pass that climbs before it takes the gradient, and does not come back."""

    def climbed(state, *args):
        with torch.no_grad():
            for p in state.model.parameters():
                p.add_(0.1)
        return grads(state, *args)

    return climbed


@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize(
    "tx",
    [ax.identity, ax.with_precision("fp16"), ax.transform("nudge", backward=nudge)],
    ids=["identity", "fp16", "wrapped"],
)
def test_a_trial_leaves_nothing_behind(tx, updates):
    """State, modes and generators are the same to the bit; one trial ran out."""
    x = torch.randn(12, 5, 3)
    tx = ax.chain(ax.shard_model(ALONE), tx)
    state = ax.init(tx, Moody(), adam)
    step = ax.step(tx, moody_loss)
    for _ in range(updates):
        state, _ = step(state, x[:6])
    state.model.still.eval()
    before = everything(state)
    found = fit_batch(ALONE, tx, moody_loss, x, state=state)
    assert found == accumulate(2)
    assert changed(before, everything(state)) == set()
    with pytest.warns(ax.NeutralityWarning, match="forward changes calls, and"):
        state, out = ax.step(ax.chain(tx, found), moody_loss)(state, x)
    assert out.stepped or out.skipped


def test_the_control_sees_what_a_trial_changes():
    """The same loss without care moves modes, buffers, gradients and generators."""
    state = ax.init(ax.identity, Moody(), adam)
    before = everything(state)
    moody_loss(state.model, torch.randn(4, 5, 3)).backward()
    touched = {"tensors", "identity", "modes", "grads", "draws", "torch"}
    assert changed(before, everything(state)) == touched


def test_an_error_of_the_loss_is_raised_and_leaves_nothing_behind():
    """Only what says that memory is out counts as such."""
    state = ax.init(ax.identity, Moody(), adam)
    x = torch.randn(4, 5, 3)
    before = everything(state)

    def broken(model, x):
        moody_loss(model, x)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fit_batch(ALONE, ax.identity, broken, x, state=state)
    assert changed(before, everything(state)) == set()


def test_memory_that_is_out_is_known_by_its_errors():
    """Those of torch's allocator and of Python's, as they come; no other."""
    for make in (lambda: torch.empty(2**46), lambda: bytearray(2**60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            make()
        assert is_full(caught.value)
    assert is_full(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_full(caught.value)
    assert not is_full(ValueError("out of memory"))


def test_what_an_optimizer_will_make_is_held():
    """Two tensors like each weight before the first update, none after it."""
    state = ax.init(ax.identity, nn.Linear(3, 2), adam)
    shapes = [p.shape for p in state.model.parameters() for _ in "ab"]
    assert [held.shape for held in unmade(state, 2)] == shapes
    state, _ = ax.step(ax.identity, wide_loss)(state, torch.ones(2, 3))
    made = [v.shape for one in state.optim.state.values() for v in one.values()]
    assert [shape for shape in made if shape] == shapes  # AdamW's own
    assert unmade(state, 2) == []


def test_what_cannot_be_tried_is_refused():
    """Each error says what came, and what to write."""
    x, state = torch.ones(4, 1), wide_state()
    with pytest.raises(ax.OrderError, match=r"the chain has accumulate\(2\)"):
        fit_batch(ALONE, accumulate(2), wide_loss, x, state=state)
    with pytest.raises(ax.DataError, match="got dict without a tensor"):
        fit_batch(ALONE, ax.identity, wide_loss, {"a": 1}, state=state)
    with pytest.raises(ax.PlacementError, match="on 1 ranks, got one of 2"):
        fit_batch(ax.Env(0, 2), ax.identity, wide_loss, x, state=state)
    with pytest.raises(TypeError, match="wants an Env first"):
        fit_batch(ax.identity, ALONE, wide_loss, x, state=state)
    state, _ = ax.grads(ax.identity, wide_loss)(state, x)
    with pytest.raises(
        ax.PlacementError, match=r"before ax\.grads, or after ax\.apply"
    ):
        fit_batch(ALONE, ax.identity, wide_loss, x, state=state)


def test_a_model_that_waits_for_other_ranks_is_known():
    """Statistics over ranks; weights in slices are tried on real ranks elsewhere."""
    alone, synced = nn.BatchNorm1d(2), nn.SyncBatchNorm(2)
    found = [_joined(ax.init(ax.identity, m, adam)) for m in (alone, synced)]
    assert found == [False, True]


@given(st.integers(1, 3000), st.booleans())
def test_counts_fall_to_the_whole_batch(rows, padded):
    """From a row each to all rows at once, growing; divisors if padded."""
    falling = counts(rows, padded)
    sizes = [-(-rows // n) for n in falling]
    assert (sizes[0], sizes[-1]) == (1, rows)
    assert sizes == sorted(set(sizes))
    if padded:
        assert falling == [n for n in range(rows, 0, -1) if rows % n == 0]
    else:
        assert {n for n in falling if n < rows} <= {2**k for k in range(13)}


@given(
    st.integers(0, 10**9), st.integers(0, 10**6), st.integers(2, 50), st.integers(1, 90)
)
def test_memory_that_grows_by_the_row_is_foreseen(fixed, each, second, more):
    """On a line exactly from two sizes, and never too little from one."""
    one, two = (_Tried(rows, grown=fixed + each * rows) for rows in (1, second))
    rows = second + more
    assert foreseen([one, two], rows) == fixed + each * rows
    assert foreseen([one], rows) >= fixed + each * rows


@linux
def test_the_meter_sees_what_was_in_use_for_a_moment():
    """64 MB that come and go are in the peak, and not in what comes after."""
    one = meter("cpu")
    peaks = []
    for megabytes in (64, 4):
        let_go("cpu")
        before = one.start()
        torch.ones(megabytes * MB // 4)
        peaks.append((one.peak() - before) / MB)
    assert 60 < peaks[0] < 80
    assert peaks[1] < 20
    assert 0 < one.room(True) <= one.room(False)
    assert meter("mps") is None


def padded_state(env):
    return ax.init(ax.identity, nn.Linear(1, 1), adam)


def test_a_padded_batch_is_cut_by_a_divisor_of_its_rows():
    """Of 6 rows that do not fit at once, 2 microbatches of 3."""
    x = stamp(torch.ones(6, 1), Rows(5, 5, padded=True))

    def loss(model, x):
        if len(x) > 3:
            torch.empty(2**46)
        w = torch.arange(len(x)).lt(rows_of(x).rows).float()
        return ax.Mean((model(x).squeeze(1) * w).sum(), w.sum())

    found = fit_batch(ALONE, ax.identity, loss, x, state=padded_state(ALONE))
    assert found == accumulate(2)
    whole = mark(torch.ones(5, 1), 5, 5)
    free = fit_batch(ALONE, ax.identity, loss, whole, state=padded_state(ALONE))
    assert free == accumulate(2)
