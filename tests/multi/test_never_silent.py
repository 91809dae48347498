"""What would give a wrong number without a word is refused, or gives the right one."""

import copy
import warnings
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx import deferred
from accelx.rows import mark
from accelx.testing import run

pytestmark = pytest.mark.multi
X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()


class Two(nn.Module):
    """Two layers, of which forward may use either."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()

    def forward(self, x, use="ab"):
        return sum(getattr(self, name)(x) for name in use)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def part(env, x=X):
    size = len(x) // env.world
    return mark(x[env.rank * size :][:size].clone(), size, len(x))


def square(model, x):
    return model(x).square().mean()


def refused(env, kind, loss, *passes, error=ax.AccelxError, unused="error"):
    tx = ax.chain(ax.shard_model(env, kind, unused=unused), *passes)
    state = ax.init(tx, Two, sgd)
    with pytest.raises(error) as caught:
        ax.step(tx, loss)(state, part(env))
    return str(caught.value)


def bypassed(model, x):
    return (model.a(x) + model.b(x)).square().mean()


def read(model, x):
    """A penalty on a weight that is a slice, beside the model's own forward."""
    weight = model.a.weight
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole.square().sum() + square(model, x)


def mixed(model, x):
    """The same without joining the slices."""
    return model.a.weight.square().sum() + square(model, x)


def by_rank(env):
    return lambda model, x: model(x, "a" if env.main else "b").square().mean()


def raising(model, x):
    raise ZeroDivisionError("before the model was called")


class Turned(nn.Module):
    """A complex weight, one that lies by columns, and a mean that forward keeps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.turn = nn.Parameter(torch.randn(2, 4, dtype=torch.complex128))
        self.out = nn.Parameter(torch.randn(3, 4).double().t())
        self.register_buffer("mean", torch.zeros(4).double())

    def forward(self, x):
        wide = (x.to(self.turn.dtype) @ self.turn).abs()
        self.mean = 0.9 * self.mean + 0.1 * wide.detach().mean(0)
        return wide @ self.out


def reporting(model, x):
    """A loss with a number of its own beside it, and one that is everyone's."""
    loss = square(model, x)
    return loss, {"own": loss.sqrt(), "rows": ax.Mean(len(x), len(x))}


def turned(env, kind):
    """How far two steps are from plain torch, on all rows and on this rank's; said."""
    # fsdp2 reduces the weights of a block in one dtype
    tx = ax.shard_model(env, kind, **({"ignored": "turn"} if kind == "fsdp2" else {}))
    state, step = ax.init(tx, Turned, sgd), ax.step(tx, reporting)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            state, out = step(state, part(env))
    assert float(out.aux["rows"].value) == 1.0
    ours = {n: p.clone() for n, p in ax.stream_weights(env, state) if n != "mean"}
    far = []
    for rows in (X, part(env)):
        model = Turned()
        for _ in range(2):
            model.zero_grad()
            square(model, rows).backward()
            sgd(model).step()
        plain = dict(model.named_parameters())
        far.append(max((ours[n] - plain[n]).abs().max().item() for n in ours))
    return *far, [str(w.message) for w in found if w.category is ax.NeutralityWarning]


def halved(env):
    """What is said of complex weights that are to travel in fewer bits."""
    with pytest.raises(ax.PlacementError) as caught:
        ax.init(ax.shard_model(env, "ddp", hook="bf16"), Turned, sgd)
    return str(caught.value)


def stilled(env, kind):
    """What a step says of a weight that was frozen since."""
    tx = ax.shard_model(env, kind)
    state = ax.init(tx, Two, sgd)
    state.model.a.requires_grad_(False)
    with pytest.raises(ax.UnusedParameterError) as caught:
        ax.step(tx, square)(state, part(env))
    return str(caught.value)


def factored(env):
    """What is said of an optimizer that slices cannot have, after a step of one."""
    tx = ax.shard_model(env, "fsdp2")
    state = ax.init(tx, Two, lambda m: torch.optim.Adafactor(m.parameters()))
    with pytest.raises(ax.PlacementError) as caught:
        ax.step(tx, square)(state, part(env))
    return str(caught.value)


def held(env):
    """What is said of an optimizer that was there before the slices."""
    model = Two()
    optimizer = sgd(model)
    ax.shard_model(env, "ddp")(Two())
    with pytest.raises(ax.PlacementError) as caught:
        ax.shard_model(env, "fsdp2")(model)
    assert optimizer.param_groups[0]["params"][0] is model.a.weight
    return str(caught.value)


def began(env, kind, change, *steps):
    """What is said of a model that is changed after these steps."""
    tx = ax.shard_model(env, kind)
    state, run = ax.init(tx, Two, sgd), None
    for _ in steps:
        state, _ = ax.step(tx, square)(state, part(env))
    change(state.model)
    with pytest.raises(ax.AccelxError) as caught:
        run = ax.step(tx, square)(state, part(env))
    assert run is None
    return str(caught.value)


def grown(model):
    model.c = nn.Linear(1, 1).double()


def loaded(model):
    """Other weights in place of those that the optimizer has."""
    model.load_state_dict(Two().state_dict(), assign=True)


def hooked_late(model):
    model.a.weight.register_hook(lambda grad: 2 * grad)


def changed(env):
    """What is said of weights and hooks that came since, and of a save of them."""
    found = {
        ("grown", kind, n): began(env, kind, grown, *range(n))
        for kind in ("ddp", "fsdp2")
        for n in (0, 1)
    }
    found["loaded"] = began(env, "ddp", loaded)
    found["hooked"] = began(env, "fsdp2", hooked_late)
    state = ax.init(ax.shard_model(env), Two, sgd)
    grown(state.model)
    with pytest.raises(ax.PlacementError) as caught:
        ax.save_state(env, "memory://grown")(state)
    return {**found, "saved": str(caught.value)}


def read_later(env):
    """What is said of a loss that reads a slice in its second step."""
    turns = iter([square, read])
    tx = ax.shard_model(env, "fsdp2")
    step = ax.step(tx, lambda model, x: next(turns)(model, x))
    state, _ = step(ax.init(tx, Two, sgd), part(env))
    with pytest.raises(ax.LossError) as caught:
        step(state, part(env))
    return str(caught.value)


def blocks_first(env):
    """What is said of a loss that calls a block before the model."""
    loss = lambda m, x: m.a(x).mean() + square(m, x)  # noqa: E731
    tx = ax.shard_model(env, "fsdp2", "a")
    state = ax.init(tx, Two, sgd)
    with pytest.raises(RuntimeError) as caught:
        ax.step(tx, loss)(state, part(env))
    return " ".join(caught.value.__notes__)


def shared(env):
    """What is said of a module that two models have, where either is in slices."""
    said = []
    for first, second in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
        body = Two()
        ax.init(ax.shard_model(env, first), nn.Sequential(body), sgd)
        with pytest.raises(ax.PlacementError) as caught:
            ax.init(ax.shard_model(env, second), nn.Sequential(body), sgd)
        said.append(str(caught.value))
    return said


def penalised(model, x):
    """A loss with a gradient of gradients in it."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
    return slope.square().sum(1).mean()


class Deep(Two):
    """With a product after a product, so that backward wants weights again."""

    def __init__(self):
        super().__init__()
        self.c = nn.Linear(1, 1).double()

    def forward(self, x):
        return self.c(super().forward(x).tanh())


def twice_back(env):
    """What is said of gradients of gradients in blocks; other losses, and torch's."""
    said, losses = "", []
    for kind, blocks in (("fsdp2", "c"), ("fsdp2", None), ("ddp", None)):
        tx = ax.shard_model(env, kind, blocks)
        state, step = ax.init(tx, Deep, sgd), ax.step(tx, penalised)
        with warnings.catch_warnings():  # of strides that ddp does not like
            warnings.simplefilter("ignore")
            try:
                for _ in range(2):
                    state, out = step(state, part(env))
                    losses.append(float(out.loss))
            except RuntimeError as error:
                said = " ".join(error.__notes__)
    model = Deep()
    penalised(model, X).backward()
    sgd(model).step()
    wanted = penalised(model, X).item()
    return said, max(abs(loss - wanted) for loss in losses[1::2]), len(losses)


def staged(env):
    """What is said of a weight's hook where stages are made of a function."""
    env = ax.connect(env, axes="stage=2")

    def hooked():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        model[0].weight.register_hook(lambda grad: 2 * grad)
        return model

    with pytest.raises(ax.PlacementError) as caught:
        ax.init(ax.chain(ax.shard_stages(env, "1", 2), ax.shard_model(env)), hooked)
    return str(caught.value)


def kept(model, x):
    """A loss that computes the whole model again in its backward pass."""
    return checkpoint(model, x, use_reentrant=False).square().mean()


def kept_first(model, x):
    """The same, by a forward pass without gradients."""
    x = x.clone().requires_grad_()
    return checkpoint(model, x, use_reentrant=True).square().mean()


def gone_on(env, loss, *passes):
    """Weights after two steps under ddp."""
    tx = ax.chain(ax.shard_model(env, "ddp"), *passes)
    state, step = ax.init(tx, Two, sgd), ax.step(tx, loss)
    for _ in range(2):
        state, _ = step(state, part(env))
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def again(env):
    """Gaps of a model that is computed again; a control; what the other way is told."""
    model = Two()
    for _ in range(2):
        model.zero_grad()
        square(model, X).backward()
        sgd(model).step()
    wanted = torch.cat([p.detach().flatten() for p in model.parameters()])
    cases = ((kept,), (kept, ax.accumulate(3)), (lambda m, x: 2 * kept(m, x),))
    gaps = [(gone_on(env, *case) - wanted).abs().max().item() for case in cases]
    return gaps, refused(env, "ddp", kept_first)


def on_two_ranks(env):
    texts = {"bypass": refused(env, "ddp", bypassed)}
    turns = iter(["ab", "a"])

    def late(model, x):
        return model(x, next(turns)).square().mean()

    texts["late"] = refused(env, "ddp", late, ax.accumulate(2))
    texts["mixed"] = refused(env, "fsdp2", by_rank(env), unused="allow")
    texts["early"] = refused(env, "fsdp2", raising, error=ZeroDivisionError)
    texts["read"] = refused(env, "fsdp2", read, error=ax.LossError)
    with pytest.raises(RuntimeError) as caught:
        refused(env, "fsdp2", mixed, error=ax.LossError)
    texts["joined"] = " ".join(caught.value.__notes__)
    texts["halved"] = halved(env)
    texts["changed"] = changed(env)
    texts["later"] = read_later(env)
    texts["shared"] = shared(env)
    texts["blocks"] = blocks_first(env)
    texts["factored"] = factored(env)
    texts["held"] = held(env)
    texts["staged"] = staged(env)
    texts["twice"] = twice_back(env)
    texts["stilled"] = [stilled(env, kind) for kind in ("ddp", "fsdp2")]
    texts["turned"] = {kind: turned(env, kind) for kind in ("ddp", "fsdp2")}
    texts["again"] = again(env)
    return texts


@cache
def told():
    return run(2, timeout=150)(on_two_ranks)()


def test_ranks_that_would_train_apart_are_refused():
    """A loss beside the model's call, a weight left out at the end, one a rank."""
    for texts in told():
        assert "write model(...) in the loss" in texts["bypass"]
        assert "b.weight" in texts["late"]
        assert "only some ranks used a.weight" in texts["mixed"]


def test_a_loss_that_raises_before_it_calls_the_model_is_heard():
    """Its own error comes out, also where no slice has been gathered yet."""
    for texts in told():
        assert texts["early"] == "before the model was called"


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_weights_that_are_complex_or_lie_by_columns_train_as_in_one_process(kind):
    """To rounding; the control is what a rank makes of its own rows alone."""
    for texts in told():
        far, control, _ = texts["turned"][kind]
        assert far < 1e-12
        assert control > 1e-3


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_what_each_rank_has_of_its_own_rows_is_pointed_out_once(kind):
    """Buffers that forward changes and numbers in aux, by name, at the first step."""
    for texts in told():
        aux, buffers = texts["turned"][kind][2]
        assert "changes mean by the rows" in buffers
        assert "ax.reduce(env, x" in buffers
        assert "aux['own'] of the loss is a number of this rank's rows" in aux
        assert "ax.Mean(total, weight)" in aux


def test_a_gradient_of_gradients_is_exact_or_explained_in_blocks():
    """Those are gone by the second backward pass, of which torch says a storage."""
    for texts in told():
        said, far, losses = texts["twice"]
        assert 'shard_model(env, "ddp")' in said
        assert losses == 4
        assert far < 1e-12


def test_what_would_be_lost_on_the_way_is_refused():
    """An imaginary part, a weight frozen since, optimizers that slices do not suit."""
    for texts in told():
        assert "Adafactor wants whole weights" in texts["factored"]
        assert 'shard_model(env, "ddp")' in texts["factored"]
        assert "hooks of 0.weight would never be called" in texts["staged"]
        assert "this Two has a SGD already" in texts["held"]
        assert "first, then SGD(model.parameters(), ...)" in texts["held"]
        assert "turn is complex and would lose its imaginary part" in texts["halved"]
        for said in texts["stilled"]:
            assert "a.weight, a.bias were trainable at ax.init" in said
            assert "freeze before ax.init" in said


def test_weights_and_hooks_that_came_after_init_are_refused():
    """No optimizer would move these, and nobody call those; a save says so, too."""
    for texts in told():
        said = texts["changed"]
        assert "the hooks of a.weight would never be called" in said.pop("hooked")
        assert "a.weight, a.bias, b.weight, b.bias went out of it" in said["loaded"]
        assert "load_state_dict without assign=True" in said.pop("loaded")
        for text in said.values():
            assert "c.weight, c.bias came into the model since ax.init" in text
            assert "in the function that makes the model" in text


def test_a_module_of_two_models_is_refused_where_one_is_in_slices():
    """By the name that it has in the second; ddp has it in both."""
    for texts in told():
        would, have = texts["shared"]
        assert "0 of this Sequential is of another model that was placed" in would
        assert "0.a.weight, 0.a.bias" in have
        assert "are in slices already" in have
        assert all('by "ddp"' in said for said in texts["shared"])


def test_a_loss_that_reads_slices_is_told_what_to_write():
    """Their gradient would be of one rank's rows, and in no sum over ranks."""
    for texts in told():
        assert 'methods="encode"' in texts["blocks"]
        for when in ("read", "later"):
            assert "the loss reads a.weight past the model's forward" in texts[when]
        assert "the optimizer's weight_decay" in texts["read"]
        assert "the optimizer's weight_decay" in texts["joined"]


def test_a_model_in_a_checkpoint_of_torchs_own_trains_under_ddp():
    """DDP counts what backward computes again once; another form is refused by name."""
    for texts in told():
        (one, cut, control), said = texts["again"]
        assert max(one, cut) < 1e-12
        assert control > 1e-3
        assert "write use_reentrant=False" in said
        assert "remat(" in said


NORMS = {  # what is around a weight: whether microbatches change its numbers
    nn.utils.parametrizations.spectral_norm: True,
    nn.utils.parametrizations.weight_norm: False,
}


@pytest.mark.parametrize("norm", NORMS)
def test_buffers_that_each_microbatch_moves_are_pointed_out(norm):
    """Once, by name; the control is a norm that keeps none, and is exact."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(norm(nn.Linear(2, 4)), nn.Linear(4, 1)).double()

    ends = []
    for n in (1, 3):
        tx = ax.accumulate(n)
        state, step = ax.init(tx, make, sgd), ax.step(tx, square)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(2):
                state, _ = step(state, X)
        ends.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))
    texts = [str(w.message) for w in found if w.category is ax.NeutralityWarning]
    assert ((ends[0] - ends[1]).abs().max() > 1e-12) == NORMS[norm]
    assert len(texts) == NORMS[norm]
    if texts:
        assert "0.parametrizations.weight.0._u" in texts[0]
        assert "accumulate(3) runs it 3 times a step" in texts[0]


def test_batch_normalisation_over_microbatches_is_pointed_out():
    """accumulate changes its numbers in one process, too; whole batches do not."""
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    with pytest.warns(ax.NeutralityWarning, match=r"1 normalise.*accumulate\(2\)"):
        ax.init(ax.accumulate(2), net, sgd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.init(ax.accumulate(1), copy.deepcopy(net), sgd)


def whole_batches(env):
    tx = ax.chain(ax.shard_loader(env), ax.shard_model(env))
    state = ax.init(tx, Two, sgd)
    step, loader = ax.step(tx, square), DataLoader(X, 3)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for batch in ax.feed(tx, loader):
            state, _ = step(state, batch)
        fed = len(found)
        for batch in loader:
            state, _ = step(state, batch)
    return fed, [str(w.message) for w in found]


def test_whole_batches_on_each_rank_are_pointed_out():
    """Iterating the loader in place of ax.feed doubles every sample; feed is silent."""
    for fed, messages in run(2)(whole_batches)():
        assert fed == 0
        assert len(messages) == 1
        assert "ax.feed(tx, loader)" in messages[0]


def forked(env):
    out = {}
    for kind in ("ddp", "fsdp2"):
        tx = ax.shard_model(env, kind)
        state = ax.init(tx, Two, sgd)
        state.model.a.eval()
        state.model.a.note = 3
        twin = ax.fork(state)
        out[kind] = (twin.model.a.training, twin.model.b.training, twin.model.a.note)
    return out


def test_a_fork_has_the_modes_and_attributes_of_now():
    """Not those of when the model was placed."""
    for out in run(2)(forked)():
        assert out == {"ddp": (False, True, 3), "fsdp2": (False, True, 3)}


def test_a_fork_keeps_optimizer_hooks():
    """Also those that torch's own copy leaves out."""
    tx = ax.shard_model(ax.Env())
    state = ax.init(tx, Two, sgd)
    calls = []
    state.optim.register_step_post_hook(lambda *a: calls.append(1))
    ax.step(tx, square)(copy.deepcopy(state), X)
    ax.step(tx, square)(state, X)
    assert calls == [1, 1]


def test_a_number_beside_the_batch_takes_no_mark():
    """A 0-dim tensor ahead of the data leaves the microbatches' weights alone."""
    heat = torch.tensor(2.0).double()
    outs = []
    for n in (1, 3):
        tx = ax.chain(ax.shard_model(ax.Env()), ax.accumulate(n))
        state = ax.init(tx, Two, sgd)
        step = ax.step(tx, lambda m, h, x: (m(x) / h).square().mean())
        for _ in range(2):
            state, out = step(state, heat, X[:5])
        outs.append((float(out.loss), state.model.a.weight.detach()))
    assert outs[0][0] == pytest.approx(outs[1][0], abs=1e-12)
    torch.testing.assert_close(outs[0][1], outs[1][1], atol=1e-12, rtol=0)


def test_batches_of_two_sizes_in_one_step_are_refused():
    """One weight cannot be both's."""
    state = ax.init(ax.identity, Two, sgd)
    step = ax.step(ax.identity, lambda m, x, y: m(x).mean() + m(y).mean())
    with pytest.raises(ax.DataError, match=r"batches of .* rows"):
        step(state, mark(X[:2].clone(), 2, 2), mark(X.clone(), 6, 6))


def test_gradients_and_weights_from_elsewhere_are_refused():
    """Another loss's gradients, and weights unfrozen after init."""
    state = ax.init(ax.identity, Two, sgd)
    state.model(X).mean().backward()
    with pytest.raises(ax.PlacementError, match="frozen"):
        ax.step(ax.identity, square)(state, X)
    model = Two()
    model.b.requires_grad_(False)
    state = ax.init(ax.identity, model, sgd)
    model.b.requires_grad_(True)
    with pytest.raises(ax.PlacementError, match=r"frozen at ax\.init"):
        ax.step(ax.identity, square)(state, X)


def test_a_half_precision_loss_does_not_overflow_by_its_rows():
    """100 over 1000 rows is 100, in any number of microbatches."""
    tx = ax.chain(ax.shard_model(ax.Env()), ax.accumulate(2))
    state = ax.init(tx, lambda: nn.Linear(1, 1), sgd)
    step = ax.step(tx, lambda m, x: (m(x) * 0 + 100).half().mean())
    _, out = step(state, torch.ones(1000, 1))
    assert float(out.loss) == 100.0


def spread(model, batch):
    """nan where there is one row."""
    (x,) = batch
    return ax.Mean((x - x.mean(0)).sum() / torch.tensor(len(x) - 1.0), 1.0)


def evaluated(env):
    tx = ax.chain(ax.shard_loader(env), ax.shard_model(env))
    state = ax.init(tx, Two)
    judge = ax.measure(tx, spread)
    number = ax.measure(tx, lambda m, b: {"acc": float(len(b[0]))})
    five, one = (DataLoader(TensorDataset(X[:n]), 4) for n in (5, 1))
    total = sum((judge(state, b) for b in ax.feed(tx, five)), start=ax.Mean(0.0, 0))
    (tail,) = (number(state, b) for b in ax.feed(tx, one))
    return float(ax.reduce(env, total).weight), float(ax.reduce(env, tail["acc"]).value)


def test_a_placeholder_counts_for_nothing_even_where_it_is_nan():
    """Its spread is nan, and a number of its own is none of the batch's."""
    for weight, acc in run(2)(evaluated)():
        assert weight == 3.0  # two ranks of the first batch, one of the second
        assert acc == 1.0


def inputs(env):
    class Time(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(1, 1)

        def forward(self, t):
            self.seen = t.dtype
            return self.l(torch.sin(t))

    tx = ax.chain(ax.with_precision("bf16"), ax.shard_model(env, "fsdp2"))
    state = ax.init(tx, Time(), sgd)
    state, _ = ax.step(tx, square)(state, part(env, torch.full((4, 1), 999.0)))
    return state.model.seen


def test_inputs_keep_their_digits_under_bf16():
    """Autocast casts at each product; a timestep of 999 must not become 1000 before."""
    assert run(2)(inputs)() == [torch.float32] * 2


def test_a_model_built_in_slices_keeps_its_other_tensors():
    """Plain attributes have their data, and list operations are done again right."""

    def factory():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
        model.freqs = torch.arange(900.0) / 10
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 0.1)
        return model

    model, recorder = deferred.build(factory, budget=2000)
    whole = factory()
    assert torch.equal(model.freqs, whole.freqs)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(recorder.full(ours), theirs)
