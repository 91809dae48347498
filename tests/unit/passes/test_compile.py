"""compile changes no number, leaves the model what it is, and counts."""

import copy
import shutil

import pytest
import torch
from torch import nn

import accelx as ax
from accelx.passes.compile import compile, recompiles
from accelx.passes.remat import remat

# torch says both of itself, where it traces a block, and imports its default backend
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
]
WIDTH = 8


class Block(nn.Module):
    """A block whose work lies in its forward."""

    def __init__(self, inner=WIDTH):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x, *, scale=1.0):
        return x + self.down(torch.tanh(self.up(x))) * scale


class Net(nn.Module):
    """Blocks in a row."""

    def __init__(self, inners=(WIDTH,) * 3):
        super().__init__()
        self.first = nn.Linear(
            WIDTH, WIDTH
        )  # so that each block's input has a gradient
        self.layers = nn.ModuleList([Block(n) for n in inners])

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return x


def made(inners=(WIDTH,) * 3):
    """The same model each time."""
    torch.manual_seed(0)
    return Net(inners)


def rows(n):
    """A batch of n rows."""
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n))


def loss(model, x):
    """A mean over rows."""
    return model(x).square().mean()


def sgd(model):
    """A plain optimizer."""
    return torch.optim.SGD(model.parameters(), 0.1)


@pytest.fixture(autouse=True)
def _forgotten():
    """torch remembers which sizes varied, by file and line: each test begins anew."""
    torch.compiler.reset()


class Backend:
    """The independent judge: a compiler that runs the graph as it is, and counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        self.calls += 1
        return graph.forward


def train(tx, sizes, make=made):
    """A run over batches of these sizes: the state, weights and recompiles by step."""
    state = ax.init(tx, make, sgd)
    step, counts = ax.step(tx, loss), []
    for n in sizes:
        state, _ = step(state, rows(n))
        counts.append(recompiles(state))
    return state, [p.detach().clone() for p in state.model.parameters()], counts


def same(one, other):
    """Whether lists of tensors are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


RAGGED = (5, 1, 7, 5, 3, 9, 1, 4)


def test_the_run_is_the_one_without_it_and_is_counted():
    """Blocks of one class are compiled once; ragged batches once more, not for ever."""
    judge = Backend()
    tx = compile("layers.*", backend=judge)
    state, weights, counts = train(tx, RAGGED)
    assert same(weights, train(ax.identity, RAGGED)[1])
    assert judge.calls == state.slots["compile"].compilations == 1 + counts[-1]
    assert counts[0] == 0
    assert counts[-1] <= 2  # one row is a case of its own, and then sizes may vary
    assert counts[3:] == [counts[-1]] * 5


def test_batches_of_one_size_compile_once():
    """Static shapes: nothing after the first step, and one graph for all blocks."""
    state, _, counts = train(compile("layers.*", backend="eager"), (4, 4, 4))
    assert (state.slots["compile"].compilations, counts) == (1, [0, 0, 0])


def test_evaluation_is_compiled_apart_and_counted():
    """Once, and training goes on with the code it had."""
    judge = Backend()
    tx = compile("layers.*", backend=judge)
    state, _, _ = train(tx, (4,))
    measured = ax.measure(tx, loss)
    before = [float(measured(state, rows(4)).value) for _ in range(2)]
    assert before[0] == before[1] == float(loss(state.model, rows(4)).detach())
    assert recompiles(state) == judge.calls - 1 == 1
    state, _ = ax.step(tx, loss)(state, rows(4))
    assert recompiles(state) == 1


def test_many_blocks_of_other_shapes_are_all_compiled():
    """Beyond the 8 after which torch gives up on code: each shape has its own."""
    judge = Backend()
    inners = tuple(range(3, 13))
    state, weights, _ = train(
        compile("layers.*", backend=judge), (4, 4), lambda: made(inners)
    )
    assert judge.calls == state.slots["compile"].compilations == len(inners)
    assert same(weights, train(ax.identity, (4, 4), lambda: made(inners))[1])


@pytest.mark.parametrize("hooked", [False, True])
def test_many_blocks_with_hooks_inside_are_all_compiled(hooked):
    """As shard_tensors puts them there: torch's code is of one module's hooks alone."""

    def make():
        model = made((WIDTH,) * 10)
        for layer in model.layers if hooked else ():
            layer.up.register_forward_hook(lambda module, args, out: out * 0.5)
        return model

    ran = []

    def judge(graph, inputs):
        return lambda *args: ran.append(1) or graph.forward(*args)

    state, weights, _ = train(compile("layers.*", backend=judge), (4, 4), make)
    assert len(ran) == 2 * 10
    assert state.slots["compile"].compilations == (10 if hooked else 1)
    assert same(weights, train(ax.identity, (4, 4), make)[1])


def test_a_graph_that_breaks_counts_once():
    """A block that prints is run in pieces, with the same numbers."""

    class Breaking(Block):
        def forward(self, x, *, scale=1.0):
            x = super().forward(x, scale=scale)
            print(end="")
            return torch.tanh(x)

    def make():
        model = made()
        model.layers[1] = Breaking()
        return model

    def seeded():
        torch.manual_seed(2)
        return make()

    tx = compile("layers.1", backend="eager")
    state, weights, counts = train(tx, (4, 4), seeded)
    assert same(weights, train(ax.identity, (4, 4), seeded)[1])
    assert (state.slots["compile"].compilations, counts) == (1, [0, 0])


def known(model):
    """All that a user may know a model by."""
    return {
        "class": [type(m) for m in model.modules()],
        "objects": [id(m) for m in model.modules()],
        "modules": [n for n, _ in model.named_modules()],
        "saved": list(model.state_dict()),
        "weights": [(n, id(p)) for n, p in model.named_parameters()],
    }


@pytest.mark.parametrize("blocks", ["layers.*", None])
def test_the_model_stays_what_it_is(blocks):
    """Object, classes and names, before and after it is called (L8)."""
    model = made()
    before = known(model)
    assert compile(blocks, backend="eager")(model) is model
    assert known(model) == before
    assert torch.equal(model(rows(4)), made()(rows(4)))
    assert known(model) == before


def test_control_torch_s_own_wrapper_has_another_name():
    """The comparison sees it."""
    model = made()
    before = known(model)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert known(model) != before


@pytest.mark.parametrize("copied", ["deepcopy", "fork"])
def test_a_copy_computes_with_its_own_weights(copied):
    """By the code that is there: a copy compiles nothing anew."""
    tx = compile("layers.*", backend="eager")
    state, _, _ = train(tx, (4,))
    other = ax.fork(state).model if copied == "fork" else copy.deepcopy(state.model)
    wanted = other(rows(4)).detach()
    with torch.no_grad():
        for p in state.model.parameters():
            p.zero_()
    assert torch.equal(other(rows(4)), wanted)
    assert recompiles(state) == 0
    assert not state.model(rows(4)).any()


def held(model, x):
    """Bytes that backward has to hold, as torch's hooks tell; weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        at = tensor.untyped_storage().data_ptr()
        if at not in weights:
            found[at] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    out.square().mean().backward()
    return sum(found.values()), [p.grad for p in model.parameters()]


def test_remat_is_compiled_along():
    """Under both a block keeps its input alone, with the same gradients."""
    blocks = compile("layers.*", backend="aot_eager", fullgraph=True)
    both, alone, plain = made((64,) * 3), made((64,) * 3), made((64,) * 3)
    state = ax.init(ax.chain(remat("layers.*"), blocks), both, sgd)
    assert state.model is both
    blocks(alone)
    x = rows(16)
    (less, grads), (more, others) = held(both, x), held(alone, x)
    wanted = held(plain, x)[1]
    assert less <= 5 * x.numel() * 4
    assert more > 2 * less
    for found in (grads, others):
        gaps = [(a - b).abs().max() for a, b in zip(found, wanted, strict=True)]
        assert max(gaps) < 1e-7


@pytest.mark.skipif(shutil.which("g++") is None, reason="the backend wants g++")
def test_the_default_backend_makes_the_same_run():
    """Real compiled code, up to the rounding of float32."""
    tx = compile("layers.*", options={"compile_threads": 1})
    _, weights, counts = train(tx, (4, 4))
    wanted = train(ax.identity, (4, 4))[1]
    gaps = [float((a - b).abs().max()) for a, b in zip(weights, wanted, strict=True)]
    assert max(gaps) < 1e-6
    assert counts == [0, 0]


def test_wrong_uses_are_refused():
    """Unknown options, no module, nothing matched, twice, and remat behind it."""
    with pytest.raises(TypeError, match=r"got backends, blok; write"):
        compile("layers.*", backends="eager", blok=1)
    with pytest.raises(TypeError, match=r"wants a torch\.nn\.Module, got int"):
        compile("layers.*")(3)
    with pytest.raises(ValueError, match=r"blocks='layer\.\*' matches no module"):
        compile("layer.*")(made())
    with pytest.raises(ax.PlacementError, match=r"layers\.0 once"):
        compile("layers.*")(compile("layers.0")(made()))
    with pytest.raises(ax.OrderError, match="in one compile"):
        ax.chain(compile("a.*"), compile("b.*"))
    with pytest.raises(ax.OrderError, match=r"compile must come after remat"):
        ax.chain(compile("layers.*"), remat("layers.*"))


def test_recompiles_of_a_state_without_it_are_none():
    """Also before the first step."""
    state = ax.init(ax.identity, made, sgd)
    assert recompiles(state) == 0
    state = ax.init(compile("layers.*", backend="eager"), made, sgd)
    assert recompiles(state) == 0


def test_it_prints_as_its_code_and_equals_its_equal():
    """Options in any order, a selector of any kind."""
    assert repr(compile()) == "compile()"
    assert repr(compile("layers.*")) == "compile('layers.*')"
    assert repr(compile(Block)) == "compile(Block)"
    made = compile("layers.*", fullgraph=True, backend="eager")
    assert repr(made) == "compile('layers.*', backend='eager', fullgraph=True)"
    assert made == compile("layers.*", backend="eager", fullgraph=True)
    assert made != compile("layers.*", backend="eager")
    assert repr(compile(dynamic=True)) == "compile(dynamic=True)"
