"""The module where numbers first stop to be finite is named, and no hook is left."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

import accelx as ax
from accelx.nonfinite import NonFiniteError, find_nonfinite
from accelx.testing import run


class Log(nn.Module):
    """Minus infinity at 0."""

    def forward(self, x):
        return x.log()


class Root(nn.Module):
    """Finite at 0, and its gradient is not."""

    def forward(self, x):
        return x.sqrt()


class Block(nn.Module):
    """A residual block around one module."""

    def __init__(self, inner):
        super().__init__()
        self.norm = nn.Hardtanh()  # 0 to 0
        self.inner = inner

    def forward(self, x):
        return x + self.inner(self.norm(x))


def net(*inner):
    """Blocks in a row, one for each module."""
    return nn.Sequential(nn.Linear(3, 3), *(Block(module) for module in inner))


def zeroed(model):
    """The model whose first layer gives zeros."""
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    return model


X = torch.ones(2, 3)


def looked(model, then=lambda out: None, x=X, **named):
    """Run the model, and what is done with its output, under the look."""
    with find_nonfinite(model, **named):
        then(model(x))


def test_the_first_module_in_forward_is_named():
    """The innermost one, with what was wrong and that its input was right."""
    model = zeroed(net(nn.Tanh(), Log(), nn.Tanh()))
    with pytest.raises(NonFiniteError) as failed, find_nonfinite(model):
        model(X)
    said = str(failed.value)
    assert "the output of 2.inner (Log)" in said
    assert "0 nan and 6 infinite of 6, torch.float32" in said
    assert "its input is finite, at most 0 in size" in said


def test_numbers_that_go_wrong_between_modules_are_told():
    """What a module is given already is not laid to its charge."""
    model = net(nn.Tanh())
    with pytest.raises(NonFiniteError, match=r"0 .Linear.*nor is its input"):
        looked(model, x=X / 0)


def test_a_finite_run_passes():
    """The control: forward and backward of what is finite raise nothing."""
    model = net(nn.Tanh(), Root())
    with find_nonfinite(model):
        model[:2](X).square().mean().backward()


def test_infinity_is_allowed_where_it_is_asked_for():
    """A model that masks by minus infinity is looked at for nan alone."""
    model = zeroed(net(Log()))
    with find_nonfinite(model, inf=False):
        model(X)
    model = zeroed(nn.Sequential(nn.Linear(3, 3), Log(), nn.LayerNorm(3)))
    with pytest.raises(NonFiniteError, match=r"2 .LayerNorm.*6 nan"):
        looked(model, inf=False)


def test_the_first_module_in_backward_is_named():
    """A gradient that a module makes infinite, though all outputs are finite."""
    model = zeroed(net(nn.Tanh(), Root(), nn.Tanh()))
    with pytest.raises(NonFiniteError) as failed, find_nonfinite(model):
        model(X).sum().backward()
    assert "2.inner (Root) gave back to the input" in str(failed.value)
    assert "0 nan and 6 infinite" in str(failed.value)


def test_a_gradient_that_the_loss_makes_is_not_laid_to_a_module():
    """It comes back to the output of the model, before any module's backward."""
    model = zeroed(net(nn.Tanh()))
    with pytest.raises(NonFiniteError, match=r"back to the output of 1 .Block.*loss"):
        looked(model, lambda out: out.sqrt().sum().backward())


class Scale(nn.Module):
    """Multiplies by a weight's root, whose gradient is infinite at 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x * self.weight.sqrt()


def test_a_weight_whose_gradient_is_not_finite_is_named_at_the_end():
    """Where what goes between modules is finite all the way."""
    model = nn.Sequential(Scale())
    with pytest.raises(NonFiniteError, match=r"the gradient of 0\.weight"):
        looked(model, lambda out: out.sum().backward())


def test_weights_and_buffers_are_looked_at_before():
    """What was broken by an earlier update is told as that."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].running_mean[1] = math.nan
    ran = []
    with pytest.raises(NonFiniteError, match=r"1\.running_mean.*earlier update"):
        looked(model, ran.append)
    assert not ran


def hooks(model):
    """How many hooks of any kind a model has."""
    kinds = [k for k in vars(nn.Module()) if k.endswith("_hooks")]
    return sum(len(vars(m)[k]) for m in model.modules() for k in kinds if vars(m)[k])


def test_nothing_is_left_behind():
    """Neither on modules nor on the caller's tensors, also after an error."""
    model = zeroed(net(Log()))
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(NonFiniteError):
        looked(model, x=x)
    with find_nonfinite(model):
        assert hooks(model) > 0
    assert hooks(model) == 0
    assert vars(x) == {}
    assert not x._backward_hooks
    late = zeroed(net(Root()))
    with find_nonfinite(late):
        kept = late(X)
    kept.sum().backward()  # after the look: nobody looks
    assert not late[0].weight.grad.isfinite().all()


def test_it_looks_into_a_step():
    """A step of accelx runs under it as it is, and is the same step."""
    seen = []
    for looking in (False, True):
        torch.manual_seed(0)
        tx = ax.identity
        state = ax.init(
            tx, net(nn.Tanh()), lambda m: torch.optim.SGD(m.parameters(), 1)
        )
        step = ax.step(tx, lambda model, batch: model(batch).square().mean())
        if looking:
            with find_nonfinite(state.model):
                state, _ = step(state, X)
        else:
            state, _ = step(state, X)
        seen.append(state.model[0].weight.detach().clone())
    assert torch.equal(*seen)


def test_a_state_is_no_module():
    """What was given is told, and what to write."""
    with pytest.raises(TypeError, match=r"write find_nonfinite\(state.model\)"):
        looked(3)


class Fork(nn.Module):
    """One tensor goes into three modules, one of which has a wild backward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        nn.init.zeros_(self.first.weight)
        nn.init.zeros_(self.first.bias)
        self.q, self.k, self.v = nn.Tanh(), Root(), nn.Tanh()

    def forward(self, x):
        x = self.first(x)
        return self.q(x) + self.k(x) + self.v(x)


def test_all_who_took_a_tensor_are_named_where_their_gradients_are_one():
    """The sum of three gradients is bad: it is one of those three, and no other."""
    with pytest.raises(NonFiniteError) as failed:
        looked(Fork(), lambda out: out.sum().backward())
    said = str(failed.value)
    assert "q (Tanh) and k (Root) and v (Tanh) gave back to the input" in said
    assert "Fork" not in said
    assert "Linear" not in said


class Words(nn.Module):
    """Takes and gives trees, by keyword too."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *, batch):
        made = self.inner(batch["x"])
        return {"logits": made, "ids": torch.arange(3), "more": (None, [made * 2])}


@pytest.mark.parametrize("good", [True, False])
def test_trees_and_keywords_are_looked_into(good):
    """Tensors are found in mappings and lists; whole numbers are left alone."""
    model = Words(nn.Tanh() if good else Log())
    batch = {"x": torch.zeros(2, 3), "ids": torch.tensor([1])}
    if good:
        with find_nonfinite(model):
            model(batch=batch)
        return
    with (
        pytest.raises(NonFiniteError, match=r"inner .Log"),
        find_nonfinite(model),
    ):
        model(batch=batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_every_kind_of_number_is_looked_at(dtype):
    """Half precision and complex numbers too, named with their dtype."""

    class Over(nn.Module):
        def forward(self, x):
            return x / 0

    name = str(dtype).replace(".", r"\.")
    with pytest.raises(NonFiniteError, match=f"of 6, {name}"):
        looked(nn.Sequential(Over()), x=torch.ones(2, 3, dtype=dtype))


def test_the_count_tells_nan_from_infinite():
    """Each kind by its number."""

    class Mixed(nn.Module):
        def forward(self, x):
            return x + torch.tensor([math.nan, math.inf, 0.0])

    with pytest.raises(NonFiniteError, match="got 2 nan and 2 infinite of 6"):
        looked(nn.Sequential(Mixed()))


def test_many_runs_under_one_look_leave_no_more_than_one():
    """Activations of earlier runs are let go, as without the look."""
    model = net(nn.Tanh())
    gone = []

    def ran(number):
        out = model(X)
        weakref.finalize(out, gone.append, number)
        out.sum().backward()

    with find_nonfinite(model):
        for number in range(3):
            ran(number)
        gc.collect()
        assert gone == [0, 1, 2]


def test_a_module_that_runs_twice_is_looked_at_twice():
    """The second time counts like the first."""

    class Fade(nn.Module):
        def forward(self, x):
            return (x - 1).sqrt()  # 2, 1, 0, then nan

    fade = Fade()
    model = nn.Sequential(fade, fade, fade)
    looked(model[:2], x=torch.full((2,), 5.0))
    with pytest.raises(NonFiniteError, match=r"0 .Fade.*2 nan"):
        looked(model, x=torch.full((2,), 2.0))


def test_without_gradients_forward_is_looked_at():
    """In evaluation nothing comes back, and outputs are seen as ever."""
    model = zeroed(net(Log()))
    with pytest.raises(NonFiniteError, match=r"1\.inner .Log"), torch.no_grad():
        looked(model)
    with torch.no_grad():
        looked(net(nn.Tanh()))


def test_looks_may_be_nested():
    """The inner one leaves the outer one's hooks where they are."""
    model = zeroed(net(Log()))
    with find_nonfinite(net(nn.Tanh())), pytest.raises(NonFiniteError):
        looked(model)
    with find_nonfinite(model):
        mine = hooks(model)
        with find_nonfinite(model, inf=False):
            assert hooks(model) == 2 * mine
        assert hooks(model) == mine
    assert hooks(model) == 0


@pytest.mark.multi
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_placed_models_are_looked_into():
    """Under ddp and fsdp2 a step passes, and a wild module is named on each rank."""

    def rank(env):
        told = {}
        for kind in ("ddp", "fsdp2"):
            for name, inner in (("fine", nn.Tanh()), ("wild", Log())):
                tx = ax.shard_model(env, kind)
                model = zeroed(net(inner))
                sgd = lambda m: torch.optim.SGD(m.parameters(), 0.1)  # noqa: E731
                state = ax.init(tx, model, sgd)
                step = ax.step(tx, lambda m, x: m(x).square().mean())
                try:
                    with find_nonfinite(state.model):
                        step(state, X)
                    told[kind, name] = "passed"
                except NonFiniteError as error:
                    told[kind, name] = str(error)
        return told

    for told in run(2)(rank)():
        assert told["ddp", "fine"] == told["fsdp2", "fine"] == "passed"
        assert "the output of 1.inner (Log)" in told["ddp", "wild"]
        assert "the output of 1.inner (Log)" in told["fsdp2", "wild"]
