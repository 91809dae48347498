"""Quantising: the numbers against torchao's, the training against a loop by hand."""

import copy

import pytest
import torch
from torch import nn

import accelx as ax
from accelx.engines.packed import Form, pack, unpack

KINDS = ("int8", "int4", "nf4")
each_kind = pytest.mark.parametrize("kind", KINDS)
ROWS = torch.randn(8, 70, generator=torch.Generator().manual_seed(3))


class Adapted(nn.Module):
    """A frozen Linear of 70 columns with low-rank adapters; its bias is trained."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(70, 32)
        self.down = nn.Linear(70, 4, bias=False)
        self.up = nn.Linear(4, 32, bias=False)
        self.base.weight.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def net(seed=1):
    """Adapters over a frozen layer, and a head that is trained."""
    torch.manual_seed(seed)
    return nn.Sequential(Adapted(), nn.ReLU(), nn.Linear(32, 1))


def rounded(kind, make=net):
    """The same in plain torch, with the floats that packed weights stand for."""
    model = make()
    weight = model[0].base.weight
    packed = pack(weight, kind)
    weight.data.copy_(unpack(packed, Form(kind, weight.shape[1], weight.dtype)))
    return model


def loss(model, x):
    return model(x).square().mean()


def optimizer(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)


def by_hand(model, half=False):
    """Three steps of a plain loop; the names and numbers of what was trained."""
    optim = optimizer(model)
    for _ in range(3):
        optim.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = loss(model, ROWS)
        value.backward()
        optim.step()
    return trained(model)


def trained(model):
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def steps(tx, make=net, count=3):
    state, step = ax.init(tx, make, optimizer), ax.step(tx, loss)
    for _ in range(count):
        state, _ = step(state, ROWS)
    return state


def gap(one, other):
    assert one.keys() == other.keys()
    return max((one[n] - other[n]).abs().max().item() for n in one)


def packed_as(weight, kind):
    return unpack(pack(weight, kind), Form(kind, weight.shape[1], weight.dtype))


def by_torchao(weight, kind):
    """What torchao makes of a weight, as floats."""
    ao = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(*weight.T.shape, bias=False)
    linear.weight.data.copy_(weight)
    rows = ao.PerGroup(64)
    config = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int4": lambda: ao.IntxWeightOnlyConfig(torch.int4, granularity=rows),
    }[kind]
    ao.quantize_(linear, config())
    return linear.weight.dequantize()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_equal_steps_are_those_of_torchao(kind):
    """Each weight is torchao's, but where it lies half-way between two steps."""
    weight = torch.randn(40, 128)
    found = packed_as(weight, kind)
    apart = (found - by_torchao(weight, kind)).abs() > 1e-5
    assert apart.float().mean() < 0.005
    coarse = (packed_as(weight, "int4") - by_torchao(weight, "int8")).abs() > 1e-5
    assert coarse.float().mean() > 0.9  # the control: other steps are told apart


def test_nf4_takes_the_codes_of_torchao():
    """The nearest of the sixteen values; torchao has them to four digits."""
    ao = pytest.importorskip("torchao.quantization")
    weight = torch.randn(40, 128)
    theirs = ao.NF4Tensor.from_tensor(weight, 64, 16).quantized_data.view(40, 64)
    ours = pack(weight, "nf4")[:, 8:72].contiguous().view(torch.uint8)
    swapped = (theirs >> 4) | ((theirs & 15) << 4)  # the first is in their high half
    assert (swapped != ours).float().mean() < 0.01
    assert (theirs != ours).float().mean() > 0.5  # the control


@each_kind
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (3, 64), (2, 65), (5, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_any_shape_comes_back_near(kind, shape, dtype):
    """No weight moves by more than half the widest step of its row; 0 stays 0."""
    weight = torch.randn(shape).to(dtype)
    weight[0, 0] = 0
    found = packed_as(weight, kind)
    most = weight.float().abs().amax(1, keepdim=True)
    widest = {"int8": 1 / 127.5, "int4": 1 / 7.5, "nf4": 0.304}[kind]
    room = most * (widest / 2 + 2 * torch.finfo(dtype).eps)
    assert (found.shape, found.dtype) == (weight.shape, dtype)
    assert found[0, 0] == 0
    assert ((found.float() - weight.float()).abs() <= room).all()


@each_kind
@pytest.mark.parametrize("half", [False, True])
def test_what_is_trained_is_as_by_hand_over_the_same_weights(kind, half):
    """Three steps, to the bit, also under autocast; over unrounded weights not."""
    more = (ax.with_precision("bf16"),) if half else ()
    state = steps(ax.chain(ax.quantize(kind), *more))
    assert gap(trained(state.model), by_hand(rounded(kind), half)) == 0
    assert gap(trained(state.model), by_hand(net(), half)) > 1e-6  # the control


# torch.compile itself makes one where it traces a function of autograd
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated")
def test_compiled_code_computes_the_same():
    """By a backend that traces forward and backward, and is quick."""
    tx = ax.chain(
        ax.quantize("nf4"), ax.compile("0", backend="aot_eager", fullgraph=True)
    )
    state = steps(tx)
    assert gap(trained(state.model), by_hand(rounded("nf4"))) < 1e-6
    assert state.slots["compile"].compilations > 0


def test_names_classes_and_forks_stay():
    """L8, and L7: a fork goes the same way, and apart from the original."""
    before = {n: type(m) for n, m in net().named_modules()}
    state = steps(ax.quantize("nf4"))
    assert {n: type(m) for n, m in state.model.named_modules()} == before
    assert list(state.model.state_dict()) == list(net().state_dict())
    other = ax.fork(state)
    step = ax.step(ax.quantize("nf4"), loss)
    ended, _ = step(other, ROWS)
    kept = trained(state.model)
    went, _ = step(ax.fork(state), ROWS)
    assert gap(trained(ended.model), trained(went.model)) == 0
    assert gap(trained(ended.model), kept) > 0


@each_kind
def test_fewer_bytes_are_kept_also_for_backward(kind):
    """What autograd keeps is the packed weight; plain torch keeps the floats."""

    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.nbytes) or t, lambda t: t
        ):
            model(torch.randn(2, 512, requires_grad=True))
        return sum(sizes)

    plain = nn.Sequential(nn.Linear(512, 512).requires_grad_(False))
    packed = ax.quantize(kind)(copy.deepcopy(plain))
    shares = {"int8": 0.27, "int4": 0.15, "nf4": 0.15}
    assert packed[0].weight.nbytes < shares[kind] * plain[0].weight.nbytes
    assert kept(packed) < shares[kind] * kept(plain)


def test_a_cast_of_the_model_leaves_packed_weights():
    """What casts floats does not touch the scales."""
    model = ax.quantize("nf4")(net())
    before = model[0].base.weight.clone()
    assert torch.equal(model.bfloat16()[0].base.weight, before)


def test_a_module_that_reads_weights_itself_fails_aloud():
    """What casts to their dtype; the encoder layer's fast path, which takes floats."""
    model = ax.quantize("nf4")(net())
    with pytest.raises(ax.PlacementError, match=r"got torch.int8: .*by blocks"):
        model[0].base(ROWS.to(model[0].base.weight.dtype))
    layer = nn.TransformerEncoderLayer(64, 4, 64, 0.0, batch_first=True)
    layer.requires_grad_(False).eval()
    want, x = copy.deepcopy(layer), torch.randn(2, 3, 64)
    for linear in (want.linear1, want.linear2):
        linear.weight.data.copy_(packed_as(linear.weight, "int8"))
    ax.quantize("int8")(layer)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert torch.equal(layer(x), want(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def frozen():
    return net().requires_grad_(False)


def tied():
    model = nn.Sequential(nn.Embedding(7, 64), nn.Linear(64, 7)).requires_grad_(False)
    model[1].weight = model[0].weight
    return model


def spoilt():
    model = frozen()
    model[2].weight.data[0, 0] = float("inf")
    return model


@pytest.mark.parametrize(
    ("make", "blocks", "words"),
    [
        (net, "0.down", "0.down.weight is trained; freeze"),
        (net, "2", "2.weight is trained"),
        (net, "1", "is no Linear that blocks takes"),
        (tied, None, "1.weight is shared with another module"),
        (spoilt, None, "2.weight has"),
        (lambda: ax.quantize("int8")(frozen()), None, "torch.int8 already"),
        (lambda: frozen().to("meta"), None, "on the meta device"),
    ],
)
def test_what_cannot_be_packed_is_refused(make, blocks, words):
    """With the weight's name, why, and what to write."""
    with pytest.raises(ax.PlacementError, match=words):
        ax.init(ax.quantize("nf4", blocks), make)


def test_wrong_settings_and_chains_are_refused():
    """Before a model is made."""
    with pytest.raises(ValueError, match="'nf4', got 'nf8'"):
        ax.quantize("nf8")
    with pytest.raises(TypeError, match=r"wants a torch\.nn\.Module, got int"):
        ax.quantize("nf4")(3)
    env = ax.Env()
    with pytest.raises(ax.OrderError, match="packed before they are sent"):
        ax.chain(ax.shard_model(env), ax.quantize("nf4"))
    with pytest.raises(ax.OrderError, match="read before they are packed"):
        ax.chain(ax.quantize("nf4"), ax.load_weights("url"))
    made = []
    tx = ax.chain(ax.quantize("nf4"), ax.shard_model(env, "deepspeed"))
    with pytest.raises(ax.PlacementError, match='got "deepspeed"'):
        ax.init(tx, lambda: made.append(1) or net())
    assert not made


def test_blocks_take_what_is_inside_them():
    """A glob, a class: the frozen Linears in what they take, and no other."""

    def names(blocks):
        state = ax.init(ax.quantize("int8", blocks), frozen)
        return list(state.slots["quantize"].weights)

    taken = {blocks: names(blocks) for blocks in ("0.*", "0", Adapted, None)}
    inside = ["0.base.weight", "0.down.weight", "0.up.weight"]
    assert taken["0.*"] == taken["0"] == taken[Adapted] == inside
    assert taken[None] == [*inside, "2.weight"]


def saving(env, url, kind, select, save=True):
    shard, load = ax.shard_model(env), ax.load_state(env, url, missing="fresh")
    tx = ax.chain(ax.quantize(kind), shard, load)
    return ax.chain(tx, ax.save_state(env, url, every=2, select=select)) if save else tx


@pytest.mark.parametrize("select", [None, "trainable"])
def test_a_run_goes_on_over_the_same_packed_weights_only(tmp_path, select):
    """Saved whole or by fingerprint; packed otherwise, or floats, they are refused."""
    env, url = ax.Env(), str(tmp_path)
    steps(saving(env, url, "nf4", select), count=2)
    state = steps(saving(env, url, "nf4", select, save=False), count=1)
    assert state.step == 3
    assert gap(trained(state.model), by_hand(rounded("nf4"))) == 0
    for kind in ("int4", "int8"):
        with pytest.raises(ax.CheckpointError, match=r"base.weight"):
            steps(saving(env, url, kind, select, save=False))
    with pytest.raises(ax.CheckpointError, match=r"base.weight"):
        ax.init(ax.load_state(env, url), net, optimizer)


def test_other_blocks_than_those_saved_are_refused(tmp_path):
    """Also where no weight is read, and shapes could not tell."""
    env, url = ax.Env(), str(tmp_path)
    steps(saving(env, url, "nf4", None), count=2)
    only = ("step", "slots.*")
    make = lambda: nn.Sequential(net(), nn.Linear(64, 1).requires_grad_(False))  # noqa: E731
    tx = ax.chain(ax.quantize("int4"), ax.load_state(env, url, only=only))
    with pytest.raises(ax.CheckpointError, match=r"quantize\('nf4'\), here .*int4"):
        ax.init(tx, make, optimizer)


def test_packed_weights_do_not_leave_as_if_they_were_floats(tmp_path):
    """`export` wants them left out; then it writes the rest."""
    env, url = ax.Env(), str(tmp_path / "run")
    state = steps(saving(env, url, "int8", None), count=2)
    for source in ((env, state), url):
        with pytest.raises(ax.CheckpointError, match=r"0\.base\.weight; leave them"):
            ax.export(source, tmp_path / "out")
    ax.export(url, tmp_path / "out", only=("0.down.*", "0.up.*"))
    with pytest.raises(ax.CheckpointError, match="packed by quantize"):
        next(ax.stream_weights(env, state))
