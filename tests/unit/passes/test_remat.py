"""remat keeps less, computes the same, and leaves the model what it is."""

import copy
import inspect
import pickle
from collections import Counter

import attrs
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import accelx as ax
from accelx.passes.remat import remat

WIDTH, ROWS, DEPTH = 32, 64, 4
ATEN = torch.ops.aten


class Block(nn.Module):
    """Two products with much cheap work between them, and noise."""

    def __init__(self, norm=False):
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH, momentum=None) if norm else nn.Identity()
        self.drop = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x, *, scale=1.0):
        self.calls += 1
        inside = torch.tanh(nn.functional.gelu(self.up(self.norm(x))) * scale)
        return x + self.down(self.drop(inside))


class Net(nn.Module):
    """Blocks in a row, given a keyword."""

    def __init__(self, norm=False):
        super().__init__()
        self.layers = nn.ModuleList([Block(norm) for _ in range(DEPTH)])

    def forward(self, x):
        scale = x.mean(0, keepdim=True)[:, :1] + 1  # a tensor that backward needs
        for layer in self.layers:
            x = layer(x, scale=scale)
        return x


def made(norm=False):
    """The same model each time."""
    torch.manual_seed(0)
    return Net(norm)


def rows():
    """A batch with a gradient of its own."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDTH, generator=draw, requires_grad=True)


def gradients(model, x, seed=3):
    """Of every weight and of the rows, after one noisy forward and backward pass."""
    torch.manual_seed(seed)
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def same(one, other):
    """Whether lists of tensors are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def few(op):
    """Keep one kind of result."""
    return op is ATEN.tanh.default


POLICIES = ["full", "selective", few]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_those_of_keeping_everything(policy, offload):
    """To the bit, dropout included, and every block ran twice in between."""
    wanted = gradients(made(), rows())
    model = remat("layers.*", policy, offload)(made())
    assert same(gradients(model, rows()), wanted)
    assert [m.calls for m in model.layers] == [2] * DEPTH
    assert torch.equal(torch.get_rng_state(), _state_after(made()))


def _state_after(model):
    """torch's generator after the pass of a model as it is."""
    gradients(model, rows())
    return torch.get_rng_state()


def test_control_other_noise_makes_other_gradients():
    """The comparison sees a mask that is drawn anew, as without its random state."""
    wanted = gradients(made(), rows())
    assert not same(gradients(made(), rows(), seed=4), wanted)
    model = made()
    for layer in model.layers:
        run = lambda x, layer=layer, **k: checkpoint(  # noqa: E731
            type(layer).forward,
            layer,
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            **k,
        )
        layer.forward = run
    assert not same(gradients(model, rows()), wanted)


def saved(model):
    """Bytes that backward has to hold of a pass, weights left out, as torch tells."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        at = tensor.untyped_storage().data_ptr()
        if at not in weights:
            held[at] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(rows())
    assert out.requires_grad
    return sum(held.values())


class Living(TorchDispatchMode):
    """Every storage that an operation makes, to ask later which are still there."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            self.made[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def total(self):
        """Bytes that are still held."""
        alive = [(r.cdata, n) for r, n in self.made.items() if not r.expired()]
        return sum(dict(alive).values())


def living(model):
    """Bytes that are alive between forward and backward, weights left out."""
    x = rows()
    with Living() as mode:
        out = model(x)
        total = mode.total()
    assert out.requires_grad
    return total


def test_less_is_kept():
    """By torch's hooks, and by what is alive: full < selective < all."""
    full, some, whole = (made(), made(), made())
    remat("layers.*")(full)
    remat("layers.*", "selective")(some)
    block = ROWS * WIDTH * 4  # the input of a block
    assert saved(full) <= (DEPTH + 1) * block
    assert saved(whole) > 4 * saved(full)
    assert living(whole) > 1.5 * living(some)
    assert living(some) > 1.5 * living(full)


def test_control_a_policy_that_keeps_all_keeps_more():
    """The measure sees what is kept."""
    every, none = made(), made()
    remat("layers.*", lambda op: True)(every)
    remat("layers.*", lambda op: False)(none)
    assert living(every) > 2 * living(none)


def test_inputs_are_offloaded():
    """They go to the host, past the hooks that else hold them; results stay equal."""
    model, other = made(), made()
    remat("layers.*")(model)
    remat("layers.*", offload=True)(other)
    assert saved(model) >= DEPTH * ROWS * WIDTH * 4
    assert saved(other) < ROWS * WIDTH * 4 + 1000


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_a_device_holds_less_with_offload():
    """What is allocated between forward and backward."""
    held = []
    for offload in (False, True):
        model = remat("layers.*", offload=offload)(made().cuda())
        out = model(rows().detach().cuda().requires_grad_())
        held.append(torch.cuda.memory_allocated())
        out.sum().backward()
    assert held[1] < held[0]


def flops(model):
    """Of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        model(rows()).sum().backward()
    return counter.get_total_flops()


def products(op):
    """Keep what a Linear computes."""
    return op in (ATEN.addmm.default, ATEN.mm.default)


@pytest.mark.parametrize(
    ("policy", "again"),
    [("full", 1), ("selective", 0), (products, 0), (few, 1), (lambda op: False, 1)],
)
def test_products_are_computed_again_or_kept(policy, again):
    """Full recomputing adds the forward pass of the blocks, but for the last product.

    Nothing needs the result of that one, so torch stops before it.
    """
    model = made()
    plain = flops(model)
    once = 2 * ROWS * WIDTH * 4 * WIDTH
    assert plain == DEPTH * 2 * once * 3
    assert flops(remat("layers.*", policy)(model)) - plain == again * DEPTH * once


class Written(nn.Linear):
    """Adds to its product in place, as nn.LSTM does in float64; uses what comes."""

    def forward(self, x):
        return super().forward(x).add_(1).square()


def test_a_kept_result_that_is_written_to_says_so():
    """It is lost to the second pass; "full" is right there."""
    some, all_of = (nn.Sequential(Written(WIDTH, WIDTH)) for _ in range(2))
    x = torch.randn(3, WIDTH)
    with pytest.raises(RuntimeError, match="has been mutated") as caught:
        remat("0", "selective")(some)(x).square().sum().backward()
    assert 'write remat(blocks, "full")' in caught.value.__notes__[0]
    remat("0")(all_of)(x).square().sum().backward()


def known(model):
    """All that a user may know a model by."""
    return {
        "class": [type(m) for m in model.modules()],
        "objects": [id(m) for m in model.modules()],
        "modules": [n for n, _ in model.named_modules()],
        "saved": list(model.state_dict()),
        "weights": [(n, id(p)) for n, p in model.named_parameters()],
        "signature": [str(inspect.signature(m.forward)) for m in model.modules()],
    }


def test_the_model_stays_what_it_is():
    """Object, classes, names and signatures (L8)."""
    model = made()
    before = known(model)
    assert remat("layers.*")(model) is model
    assert known(model) == before


@pytest.mark.parametrize("copied", ["deepcopy", "fork", "pickle"])
def test_a_copy_calls_itself(copied):
    """Its own weights, not those of the model that it is a copy of."""
    state = ax.init(
        remat("layers.*"), made(), lambda m: torch.optim.SGD(m.parameters())
    )
    model = state.model
    if copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = copy.deepcopy(model) if copied == "deepcopy" else ax.fork(state).model
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert same(gradients(other, rows()), gradients(made(), rows()))
    assert [m.calls for m in model.layers] == [0] * DEPTH
    assert {m.calls for m in other.layers} == {1 if copied == "pickle" else 2}


def test_running_statistics_move_once():
    """As without remat; torch's checkpoint by itself counts each row twice."""
    plain, model, theirs = made(norm=True), made(norm=True), made(norm=True)
    for layer in theirs.layers:
        forward = layer.forward
        layer.forward = lambda x, forward=forward, **k: checkpoint(
            forward, x, use_reentrant=False, **k
        )
    remat("layers.*")(model)
    for one in (plain, model, theirs):
        for seed in (3, 4):
            one.zero_grad()
            grads = gradients(one, rows(), seed)
        if one is plain:
            wanted = grads
        elif one is model:
            assert same(grads, wanted)
    assert same(model.buffers(), plain.buffers())
    assert not same(theirs.buffers(), plain.buffers())
    assert {m.norm.momentum for m in model.layers} == {None}


def test_hooks_of_a_block_are_called_once():
    """They stay outside: a counter counts passes, not recomputing."""
    model, seen = remat("layers.*")(made()), Counter()
    for layer in model.layers:
        layer.register_forward_hook(lambda m, a, out: seen.update([m]))
    gradients(model, rows())
    assert set(seen.values()) == {1}


def test_nothing_is_recomputed_without_gradients():
    """In evaluation a block runs once, and torch keeps nothing."""
    model = remat("layers.*")(made())
    with torch.no_grad():
        out = model(rows())
    assert not out.requires_grad
    assert [m.calls for m in model.layers] == [1] * DEPTH


def test_autocast_is_as_it_was():
    """Backward recomputes in the dtype of the forward pass."""
    wanted, model = made(), remat("layers.*")(made())
    found = []
    for one in (wanted, model):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = one(rows()).square().sum()
        loss.backward()
        found.append([p.grad for p in one.parameters()])
    assert same(*found)
    assert not same(found[0], gradients(made(), rows())[1:])  # the control


def test_a_forward_of_the_object_itself_is_kept():
    """A function that a user set on one module is what is recomputed."""
    model = made()
    model.layers[0].forward = lambda x, *, scale: torch.tanh(x) * scale
    other = copy.deepcopy(model)
    assert same(
        gradients(remat("layers.*")(model), rows())[:1], gradients(other, rows())[:1]
    )


def test_a_block_that_is_used_twice_is_recomputed_twice():
    """One object in two places."""
    model, other = made(), made()
    for one in (model, other):
        one.layers[2] = one.layers[0]
    remat("layers.*")(model)
    assert same(gradients(model, rows()), gradients(other, rows()))
    assert model.layers[0].calls == 4


def test_the_run_of_a_chain_is_the_one_without_it():
    """Wherever it stands; a module that a function makes, too."""
    loss = lambda m, x: m(x).square().mean()  # noqa: E731
    runs = []
    for tx in (
        ax.accumulate(2),
        ax.chain(ax.accumulate(2), remat("layers.*")),
        ax.chain(remat(Block), ax.accumulate(2)),
        ax.chain(remat(["layers.0", "layers.3"]), ax.accumulate(2)),
    ):
        state = ax.init(tx, made, lambda m: torch.optim.SGD(m.parameters(), 0.1))
        step = ax.step(tx, loss)
        torch.manual_seed(5)
        for _ in range(3):
            state, _ = step(state, rows().detach())
        runs.append([p.detach() for p in state.model.parameters()])
    assert all(same(run, runs[0]) for run in runs)


@pytest.mark.parametrize("policy", ["some", None, 1, ("mm",)])
def test_another_policy_is_refused(policy):
    """With what there is."""
    with pytest.raises(ValueError, match=r'"selective" or a function') as error:
        remat("layers.*", policy)
    assert repr(policy) in str(error.value)


def test_other_wrong_uses_are_refused():
    """No blocks, blocks that match nothing, no module, a block that has it already."""
    with pytest.raises(ValueError, match="wants the blocks"):
        remat([])
    with pytest.raises(ValueError, match="offload=True"):
        remat("layers.*", offload="cpu")
    with pytest.raises(ValueError, match=r"blocks='layer.\*' matches no module"):
        remat("layer.*")(made())
    with pytest.raises(TypeError, match=r"wants a torch\.nn\.Module, got int"):
        remat("layers.*")(3)
    with pytest.raises(ax.PlacementError, match=r"layers.0 once"):
        remat("layers.*")(remat("layers.0")(made()))
    with pytest.raises(ax.OrderError, match="in one remat"):
        ax.chain(remat("a.*"), remat("b.*"))


def test_it_prints_as_its_code():
    """Defaults are left out."""
    assert repr(remat("layers.*")) == "remat('layers.*')"
    assert repr(remat(Block, few, True)) == "remat(Block, policy=few, offload=True)"
    spec = remat(["a", "b"]).find("remat")
    assert attrs.asdict(spec) == {"blocks": ("a", "b"), "policy": "full", "offload": 0}
