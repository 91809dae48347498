"""DeepSpeed changes no number: training, saving and what else a state can do."""

import atexit
import gc
import sys
import tempfile
from argparse import Namespace
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec

import attrs
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import accelx as ax
from accelx import deferred, gradients, testing
from accelx.engines import deepspeed_cut, deepspeed_open
from accelx.engines.options import Options
from tests.laws import training as t

pytestmark = [
    pytest.mark.multi,
    t.quiet_views,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is missing"),
]
STAGES = (0, 1, 2, 3)
SLICED = {"zero_optimization": {"stage3_param_persistence_threshold": 20}}
# sub-groups, weights that are kept elsewhere, slices that are no row's end
AWKWARD = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "sub_group_size": 50,
        "offload_param": {"device": "cpu"},
    }
}
TURNED = {"zero_optimization": {"round_robin_gradients": True, "overlap_comm": True}}
PLACES = {
    "zero-0": {"stage": 0},
    "zero-1": {"stage": 1},
    "zero-2": {"stage": 2, "config": TURNED},
    "zero-2-offload": {"stage": 2, "offload": True},
    "zero-3": {"stage": 3, "config": SLICED},
    "zero-3-offload": {"stage": 3, "offload": True, "config": AWKWARD},
}
single = t.made(torch.float32)
DATA = t.batches(rows=(5, 1, 7, 4), dtype=torch.float32)


def placing(env, place):
    """The transform that places `Net` as one of PLACES, or as a kind of its own."""
    if place in PLACES:
        return ax.shard_model(env, "deepspeed", **PLACES[place])
    return ax.shard_model(env, place, blocks="layers.*")


def chain(env, place, *rest):
    """With clip and a schedule, as `by_hand` trains."""
    return ax.chain(
        placing(env, place), ax.clip(t.LIMIT), ax.with_schedule(t.curve), *rest
    )


def whole(env, state):
    """Every weight in full, by its first name."""
    own = {n for n, _ in state.model.named_parameters()}
    return {n: w.clone() for n, w in ax.stream_weights(env, state) if n in own}


def go_on(env, tx, state, loss, data, split=t.even):
    """A state after `data`, and what each step left."""
    step, trace = ax.step(tx, loss), []
    for batch in data:
        state, out = step(state, t.part(env, batch, split))
        assert out.stepped, out.skipped
        norm = float("nan") if out.norm is None else out.norm.item()
        trace.append(t.Step(float(out.loss), norm, whole(env, state)))
    return state, trace


def apart(judge, trace):
    """The largest difference from the judge, who knows tied weights by more names."""
    names = trace[0].weights
    assert names
    held = [attrs.evolve(s, weights={n: s.weights[n] for n in names}) for s in judge]
    return t.apart(held, trace)


@cache
def folder():
    """Where the ranks save what is looked at afterwards; gone with this process."""
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    return made.name


@cache
def launched(parts):
    """What each rank found in each part, in one launch: importing it takes longest."""
    kept = folder()  # one for all ranks
    return testing.run(2, timeout=270)(
        lambda env: [part(env, kept) for part in parts]
    )()


def told(part):
    """What each rank found in one part."""
    parts = next(parts for parts in LAUNCHES if part in parts)
    return [rank[parts.index(part)] for rank in launched(parts)]


def trained(env, folder):
    """How far each place ends from a loop by hand, and how far the control does."""
    found = {}
    for loss in (t.bare, t.masked):
        judge = t.by_hand(single, loss, t.grouped, DATA)
        for place in PLACES:
            n, split = (3, t.lopsided) if loss is t.masked else (1, t.even)
            tx = chain(env, place, ax.accumulate(n))
            state = ax.init(tx, single, t.grouped)
            _, trace = go_on(env, tx, state, loss, DATA, split)
            found[place, loss.__name__] = apart(judge, trace)
    tx = chain(env, "zero-2", ax.accumulate(3))
    state = ax.init(tx, single, t.grouped)
    _, trace = go_on(env, tx, state, t.mean_of_means, DATA)
    return found, apart(judge, trace)


def test_every_stage_trains_as_one_process_does():
    """Losses, norms and weights at each step (L4); the mean of means does not."""
    for found, control in told(trained):
        assert max(found.values()) < 1e-6, found
        assert control > 1e-3


def resharded(env, folder):
    """From each place to each other, half-way: the gaps from an unbroken loop by hand.

    And of a load that leaves the optimizer out, the control; and whether the same place
    goes on to the bit.
    """
    judge = t.by_hand(single, t.masked, t.grouped, DATA)
    zero = ("zero-1", "zero-2-offload", "zero-3-offload")
    found, exact = {}, True
    for place in (*zero, "ddp", "fsdp2"):
        tx, url = chain(env, place), f"{folder}/{place}"
        state, _ = go_on(env, tx, ax.init(tx, single, t.grouped), t.masked, DATA[:2])
        ax.save_state(env, url)(state)
        _, unbroken = go_on(env, tx, state, t.masked, DATA[2:])
        into = (place, "ddp", "fsdp2", "zero-1") if place in zero else zero
        for other in dict.fromkeys(into):
            tx = chain(env, other, ax.load_state(env, url))
            state = ax.init(tx, t.made(torch.float32, seed=3), t.grouped)
            _, trace = go_on(env, tx, state, t.masked, DATA[2:])
            found[place, other] = apart(judge[2:], trace)
            if place == other:
                exact &= t.same(trace[-1].weights, unbroken[-1].weights)
    only = ("model.**", "step", "skipped", "slots.**")
    tx = chain(env, "zero-3", ax.load_state(env, f"{folder}/zero-1", only=only))
    state = ax.init(tx, t.made(torch.float32, seed=3), t.grouped)
    control = apart(judge[2:], go_on(env, tx, state, t.masked, DATA[2:])[1])
    return found, control, exact


def test_a_checkpoint_goes_from_each_engine_to_each_other():
    """Weights, moments and counts (L5, L6); without moments it is another run."""
    for found, control, exact in told(resharded):
        assert max(found.values()) < 1e-6, found
        assert control > 1e-3
        assert exact
    judge = t.by_hand(single, t.masked, t.grouped, DATA)
    for place in ("zero-1", "zero-3-offload"):
        env = ax.Env()
        tx = chain(env, "ddp", ax.load_state(env, f"{folder()}/{place}"))
        state = ax.init(tx, t.made(torch.float32, seed=3), t.grouped)
        assert apart(judge[2:], go_on(env, tx, state, t.masked, DATA[2:])[1]) < 1e-6


def rows_of(env, batch):
    """This rank's rows and mask, for a program that knows nothing of accelx."""
    low, high = t.even(len(batch[0]), env.rank, env.world)
    if low < high:
        return [x[low:high] for x in batch]
    return [x[:1] * (i != 1) for i, x in enumerate(batch)]


def by_deepspeed(env, place, data, load=None, save=None):
    """A loop by hand over DeepSpeed's own engine, from one of its checkpoints."""
    zero = {"stage": PLACES[place]["stage"]}
    zero |= PLACES[place].get("config", {}).get("zero_optimization", {})
    told = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": t.LIMIT}
    model, trace = single(), []
    engine = deepspeed_open.initialize(
        env, model, t.grouped(model), {**told, "zero_optimization": zero}
    )
    gathered = sys.modules["deepspeed"].zero.GatheredParameters
    if load is not None:
        assert engine.load_checkpoint(load)[0]
    first = engine.global_steps
    for k, batch in enumerate(data, first):
        for group, rate in zip(engine.optimizer.param_groups, (1, 0.5), strict=True):
            group["lr"] = t.RATE * rate * t.curve(k)
        mean = t.masked(engine, rows_of(env, batch))
        sums = torch.stack([mean.total.detach(), mean.weight.float()])
        torch.distributed.all_reduce(sums)
        engine.backward(mean.total / sums[1] * env.world)
        engine.step()
        norm = float(engine.get_global_grad_norm())
        with gathered(list(model.parameters())):
            own = {n: p.detach().clone() for n, p in model.named_parameters()}
        trace.append(t.Step(float(sums[0] / sums[1]), norm, own))
    if save is not None:
        engine.save_checkpoint(save, tag="two")
        ax.barrier(env)
    return trace


def universal(folder, out):
    """Have DeepSpeed make a checkpoint of its own a universal one."""
    from deepspeed.checkpoint import ds_to_universal

    how = Namespace(
        input_folder=folder,
        output_folder=out,
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    ds_to_universal.main(how)


def theirs(env, folder):
    """Runs that change hands after two steps, at two stages: the gaps from the judge.

    Ours is gone on with by DeepSpeed's own loop; its own is made universal.
    """
    judge, found = t.by_hand(single, t.masked, t.grouped, DATA), {}
    for place in ("zero-1", "zero-3"):
        tx, ours = chain(env, place), f"{folder}/ours-{place}"
        state, _ = go_on(env, tx, ax.init(tx, single, t.grouped), t.masked, DATA[:2])
        made = ax.export_state(env, state, ours)
        with pytest.raises(ax.CheckpointError, match="is there already"):
            ax.export_state(env, state, ours)
        found[place, "on"] = apart(judge[2:], by_deepspeed(env, place, DATA[2:], ours))
        own = f"{folder}/theirs-{place}"
        found[place, "own"] = apart(
            judge[:2], by_deepspeed(env, place, DATA[:2], save=own)
        )
        assert made == f"{ours}/global_step2"
        if env.main:
            from deepspeed.utils import zero_to_fp32

            universal(f"{own}/two", f"{own}-universal")
            full = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(ours)
            save_file({n: w.clone() for n, w in full.items()}, f"{ours}.safetensors")
    return found, apart(judge[2:], by_deepspeed(env, "zero-1", DATA[2:]))


def test_a_run_of_deepspeed_changes_hands_both_ways(tmp_path):
    """Its checkpoints are gone on with here, and ours by its own loop, all the same.

    Weights, moments, groups and counts; what it puts together in fp32 is loaded.
    """
    for found, control in told(theirs):
        assert max(found.values()) < 1e-6, found
        assert control > 1e-3
    judge = t.by_hand(single, t.masked, t.grouped, DATA)
    only = ("model.**", "optim.**", "step", "skipped")
    for place in ("zero-1", "zero-3"):
        out = str(tmp_path / f"{place}-ours")
        source = f"{folder()}/theirs-{place}-universal"
        report = ax.import_state(source, out, single, t.grouped)
        assert (report.step, report.left_out) == (2, ())
        env = ax.Env()
        tx = chain(env, "ddp", ax.load_state(env, out, only=only))
        state = ax.init(tx, t.made(torch.float32, seed=3), t.grouped)
        trace = go_on(env, tx, state, t.masked, DATA[2:])[1]
        assert apart(judge[2:], trace) < 1e-6
        with pytest.raises(ax.CheckpointError, match="ds_to_universal --input_folder"):
            ax.import_state(f"{folder()}/theirs-{place}/two", out)
        again = t.made(torch.float32, seed=3)()
        url = f"{folder()}/ours-{place}.safetensors"
        ax.load_weights(url, strict=False)(again)  # of stage 1 frozen ones are missing
        trained = {n for n, p in again.named_parameters() if p.requires_grad}
        loaded = {n: w for n, w in t.weights(again).items() if n in trained}
        assert furthest(loaded, judge[1].weights) < 1e-6


SIZE, DEEP, BUDGET = 256, 12, 4096  # bytes to hold while a model is made


def wide():
    """A model of many weights of one size."""
    torch.manual_seed(5)
    return nn.Sequential(*[nn.Linear(SIZE, SIZE) for _ in range(DEEP)])


def resident():
    """Bytes of all tensors of this process."""
    gc.collect()
    some = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
    dense = [x for x in some if x.layout is torch.strided]  # sparse ones: other tests'
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in dense}
    return sum(kept.values())


def placed_of(env, model, optim=None, *rest):
    """A state of stage 3, none of whose weights is kept whole."""
    zero = AWKWARD["zero_optimization"] | {"reduce_bucket_size": 1000}
    config = {"zero_optimization": zero}
    tx = ax.chain(ax.shard_model(env, "deepspeed", stage=3, config=config), *rest)
    return ax.init(tx, model, optim)


def highest(env, make):
    """The most bytes at a time while a model is placed; what stays; its weights."""
    before, high, calls, cast = resident(), [], [], deepspeed_cut.dtypes.cast
    forms = []

    def looking(*args):
        calls.append(args)
        if len(calls) in (3, DEEP, 2 * DEEP):  # looking takes a while
            high.append(resident() - before)
        return cast(*args)

    def optim(model):
        forms.extend((p.shape, p.dtype) for p in model.parameters())
        assert all(p.isnan().all() for p in model.parameters())
        return torch.optim.SGD(model.parameters(), 0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferred.build, "__defaults__", (BUDGET,))
        patch.setattr(deepspeed_cut.dtypes, "cast", looking)
        state = placed_of(env, make(), optim)
    kept = resident() - before
    assert forms == [(p.shape, p.dtype) for p in wide().parameters()]
    return max(high), kept, whole(env, state)


def made_in_slices(env, folder):
    """Peaks of a function, and of the control, a module; and if numbers are its."""
    judge = {n: w.detach() for n, w in wide().named_parameters()}
    found, same = [], []
    for make in (lambda: wide, wide):
        high, kept, weights = highest(env, make)
        found.append((high, kept))
        same.append(t.same(weights, judge))
    url, sgd = f"{folder}/wide", lambda m: torch.optim.SGD(m.parameters(), 0.1)
    ax.export((env, placed_of(env, wide)), url)  # not trained: it is whole
    with torch.device("meta"):
        hollow = wide()
    other = lambda: nn.Sequential(*[nn.Linear(SIZE, SIZE) for _ in range(DEEP)])  # noqa: E731
    for model, optim in ((hollow, sgd), (other, sgd), (other(), sgd), (other, None)):
        state = placed_of(env, model, optim, ax.load_weights(url))
        same.append(t.same(whole(env, state), judge))
        if optim is None:
            same.append(t.same(dict(state.model.named_parameters()), judge))
    return found, same


def test_the_third_stage_never_holds_a_model_whole():
    """Nor while it is made, with the numbers of making it (L4), or of a file."""
    weight = SIZE * SIZE * 4
    total = DEEP * (weight + SIZE * 4)
    for (made, given), same in told(made_in_slices):
        assert all(same)
        (high, kept), (control, _) = made, given
        states = 2 * DEEP * 5056  # of the generator, before each weight
        assert high <= total / 2 + 3 * weight + BUDGET + states
        assert control >= 0.9 * total  # two are cut already when it is looked first
        assert kept <= 1.51 * total  # of weights, masters and gradients a half each


def raising(env, place):
    """A loss, and a backward, that raise leave nothing; a skipped step neither."""
    calls = []

    def breaks(model, batch):
        calls.append(1)
        loss = t.masked(model, batch)
        if len(calls) % 2 == 0:
            raise KeyError("no such column")
        return loss

    def overflows(model, batch):
        return t.masked(model, batch).total * float("inf")

    tx = chain(env, place, ax.accumulate(2))
    judge = t.by_hand(single, t.masked, t.grouped, DATA[:2])
    state = ax.init(tx, single, t.grouped)
    with pytest.raises(KeyError, match="no such column"):
        ax.step(tx, breaks)(state, t.part(env, DATA[0]))
    state, one = go_on(env, tx, state, t.masked, DATA[:1])
    state, out = ax.step(tx, overflows)(state, t.part(env, DATA[0]))
    assert not out.stepped
    assert "norm" in out.skipped
    assert apart(judge, [*one, *go_on(env, tx, state, t.masked, DATA[1:2])[1]]) < 1e-6


def furthest(one, other):
    """The largest difference of two sets of weights."""
    return max((one[n] - other[n]).abs().max().item() for n in one)


@cache  # of ddp each place is told apart from the same run
def averages(env, kind):
    """The average of weights over three steps, after weights were set by hand."""
    tx = chain(env, kind, ax.with_ema(0.5))
    state = ax.init(tx, single, t.grouped)
    with torch.no_grad():
        for _, p in state.trained:
            p.mul_(0.5)
    state, _ = go_on(env, tx, state, t.masked, DATA[:3])
    with ax.averaged(state):
        return whole(env, state)


def average(env, place):
    """The gap of averages of weights from those of ddp; stage 3 has none."""
    if PLACES[place]["stage"] == 3:
        return None
    return furthest(averages(env, "ddp"), averages(env, place))


class Small(nn.Sequential):
    """A network that is half of a pair."""

    def __init__(self):
        super().__init__(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))


@cache
def rewritten(env, kind):
    """The trace of two steps, before each of which weights are halved by hand.

    Others take the place of their data; under stage 3 DeepSpeed lends them in full.
    """
    tx = chain(env, kind)
    state, trace = ax.init(tx, single, t.grouped), []
    weights, lent = list(state.model.parameters()), nullcontext()
    for batch in DATA[:2]:
        if PLACES.get(kind, {}).get("stage") == 3:
            gathered = sys.modules["deepspeed"].zero.GatheredParameters
            lent = gathered(weights, modifier_rank=0)
        with lent, torch.no_grad():
            for p in weights:
                if isinstance(lent, nullcontext):
                    p.data = p.data * 0.5
                elif env.main:
                    p.mul_(0.5)
        state, one = go_on(env, tx, state, t.masked, [batch])
        trace += one
    return trace


@cache
def both(env, kind):
    """A generator and a critic, each the other's argument: their weights."""
    tx = ax.chain(placing_small(env, kind), ax.clip(t.LIMIT))
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(ax.init(tx, Small(), lambda m: torch.optim.AdamW(m.parameters())))
    gen, critic = states
    judge = ax.step(
        tx, lambda d, x, z: (d(x) - 1).square().mean() + d(z).square().mean()
    )
    fool = ax.step(tx, lambda g, z, d: (d(g(z)) - 1).square().mean())
    torch.manual_seed(env.rank)
    for _ in range(2):
        x, z = torch.randn(2, 4, 4)
        with ax.evaluating(gen) as model:
            made = model(z)
        critic, _ = judge(critic, x, made)
        with ax.frozen(critic) as model:
            gen, _ = fool(gen, z, model)
    other = {f"d.{n}": w for n, w in whole(env, critic).items()}
    return {**whole(env, gen), **other}


def pair(env, place):
    """The gap of a pair from that of ddp."""
    return furthest(both(env, "ddp"), both(env, place))


def placing_small(env, place):
    """`placing` without blocks."""
    return placing(env, place) if place in PLACES else ax.shard_model(env)


def halves(env, place):
    """grads and apply, with a look at other rows between them; both by torch."""
    tx = ax.chain(ax.with_precision("fp32"), placing(env, place), ax.clip(t.LIMIT))
    judge = t.by_hand(single, t.masked, t.grouped, DATA[:1], factor=lambda k: 1.0)
    state = ax.init(tx, single, t.grouped)
    state, out = ax.grads(tx, t.masked)(state, t.part(env, DATA[0]))
    look = ax.measure(tx, lambda m, b: {"loss": t.masked(m, b)})
    with torch.no_grad():
        wanted = t.masked(single(), DATA[2])
    seen = ax.reduce(env, look(state, t.part(env, DATA[2])))["loss"]
    assert abs(float(seen.value) - float(wanted.value)) < 1e-6
    state, out = ax.apply(tx)(state, out)
    step = t.Step(float(out.loss), out.norm.item(), whole(env, state))
    assert apart(judge, [step]) < 1e-6


def few_bits(env, kind, wanted):
    """The trace of two steps in a precision.

    Not kept as the others: stage 3 has torch round otherwise from its first start on.
    """
    tx = chain(env, kind, ax.with_precision(wanted))
    return go_on(env, tx, ax.init(tx, single, t.grouped), t.masked, DATA[:2])[1]


def halved(env, place):
    """bf16 is what ddp makes of it, and another run than float32."""
    judge = few_bits(env, "ddp", "bf16")
    assert apart(judge, few_bits(env, place, "fp32")) > 1e-4
    return apart(judge, few_bits(env, place, "bf16"))


def behaves(env, folder):
    """All of the above for each place: the gaps, by what they are of.

    And of ddp before and after: DeepSpeed leaves other engines' numbers alone.
    """
    found, before = {}, few_bits(env, "ddp", "bf16")
    written = rewritten(env, "ddp")
    for place in PLACES:
        raising(env, place)
        halves(env, place)
        found[place, "average"] = average(env, place)
        found[place, "pair"] = pair(env, place)
        found[place, "bf16"] = halved(env, place)
        found[place, "written"] = apart(written, rewritten(env, place))
    found["ddp", "bf16"] = apart(before, few_bits(env, "ddp", "bf16"))
    plain, alone = carrying(env, {}), carrying(env, {"contiguous_gradients": False})
    assert (plain[1], alone[1]) == (0, 2)
    found["carried"] = apart(plain[0], alone[0])
    return found


def carrying(env, zero):
    """The trace of two steps with a plain mean, and how many sums took a collective."""
    calls, send = [], gradients.comm.sum_scalars

    def counted(*args, **kwargs):
        calls.append(args)
        return send(*args, **kwargs)

    tx = ax.chain(ax.shard_model(env, "deepspeed", config={"zero_optimization": zero}))
    state = ax.init(ax.chain(tx, ax.accumulate(2)), single, t.grouped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients.comm, "sum_scalars", counted)
        step, trace = ax.step(ax.chain(tx, ax.accumulate(2)), t.bare), []
        for batch in DATA[2:]:
            state, out = step(state, t.part(env, batch))
            trace.append(t.Step(float(out.loss), 0.0, whole(env, state)))
    return trace, len(calls)


def test_a_state_does_what_it_does_on_every_engine():
    """Errors, skips, averages, critics, halves of a step, evaluation, precision.

    Weights that others write; a loss that travels with gradients, or does not.
    """
    for found in told(behaves):
        assert max(gap for gap in found.values() if gap is not None) < 1e-6, found


def kept(env, place):
    """That model, optimizer, names and the environment are as they were."""
    import os

    model, before = single(), dict(os.environ)
    names = list(model.state_dict())
    tx = chain(env, place)
    state = ax.init(tx, model, t.grouped)
    state, _ = go_on(env, tx, state, t.masked, DATA[:1])
    assert state.model is model
    assert (type(model), type(state.optim)) == (t.Net, torch.optim.AdamW)
    assert list(model.state_dict()) == names
    assert dict(os.environ) == before
    first = state.optim.param_groups[0]["lr"]
    assert first == t.RATE * t.curve(0)


def used(env, tx, optim, loss, twice):
    """A state that is trained, twice, and copied."""
    state = ax.init(tx, single, optim)
    step = ax.grads if twice else ax.step
    for _ in range(2):
        state, _ = step(tx, loss)(state, t.part(env, DATA[0]))
    ax.fork(state)


def refused(env, tx, optim, words, loss=t.bare, twice=False):
    """That a chain, an optimizer or a second call is refused, with what to write."""
    with pytest.raises(ax.AccelxError, match=words):
        used(env, tx, optim, loss, twice)


def lion(model):
    """An optimizer of matrices."""
    named = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adafactor(named)


def unused(model, batch):
    """A loss that leaves the blocks out."""
    return model.head(model.embed(batch[0])).mean()


def penalised(model, batch):
    """A loss that reads weights itself."""
    return t.bare(model, batch) + sum(p.square().sum() for p in model.parameters())


class Again(nn.Module):
    """One weight in two blocks that torch computes again, each with a backward pass."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(t.TOKENS, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(2):
            x = checkpoint(self.inner, x, use_reentrant=True)
        return x


def odd(env, folder):
    """What DeepSpeed would do wrong, or refuse in words that name nothing of ours."""
    two, three = placing(env, "zero-2"), placing(env, "zero-3")
    few = {"reduce_bucket_size": 1, "stage3_param_persistence_threshold": 0}
    small = {"zero_optimization": few}
    adam = lambda m: torch.optim.AdamW(m.parameters())  # noqa: E731
    square = lambda m, b: m(b[0]).square().mean()  # noqa: E731
    for stage in (2, 3):
        tx = ax.shard_model(env, "deepspeed", stage=stage, config=small)
        with pytest.raises(ax.PlacementError, match=r"inner\.\w+ came in two"):
            ax.step(tx, square)(ax.init(tx, Again, adam), t.part(env, DATA[0]))
    state = ax.init(three, single, t.grouped)
    with torch.no_grad():
        state.model.head.bias.zero_()
    with pytest.raises(ax.PlacementError, match=r"^head.bias was written from outside"):
        ax.step(three, t.bare)(state, t.part(env, DATA[0]))
    assert ax.step(three, t.bare)(state, t.part(env, DATA[0]))[1].stepped
    state = ax.init(three, single, t.grouped)
    with pytest.raises(RuntimeError) as caught:
        ax.step(three, penalised)(state, t.part(env, DATA[0]))
    assert "weight_decay" in caught.value.__notes__[0]
    sparse = nn.Embedding(3, 4, sparse=True)
    with pytest.raises(ax.PlacementError, match="sparse=True; write sparse=False"):
        ax.init(two, sparse, adam)
    waves = nn.ParameterList([torch.ones(2, dtype=torch.complex64)])
    with pytest.raises(ax.PlacementError, match=r'complex64, but 0 would.*"ddp"'):
        ax.init(placing(env, "zero-0"), waves, adam)
    for zero, words in (
        ({"stge": 2}, "stge: Extra inputs"),
        ({"stage": 1, "overlap_comm": True}, "overlap_comm only with ZeRO stage 2"),
    ):
        tx = ax.shard_model(env, "deepspeed", config={"zero_optimization": zero})
        with pytest.raises(ax.PlacementError, match=words):
            ax.init(tx, single, t.grouped)
    with pytest.warns(ax.NeutralityWarning, match="known of Mine.*norm or shape"):
        ax.init(two, nn.Linear(2, 2), lambda m: Mine(m.parameters(), {"lr": 0.1}))
    half = ax.with_precision(ax.Precision(param="fp32", buffer="bf16"))
    buffers = ax.init(ax.chain(three, half), single, t.grouped).model.buffers()
    return {b.dtype for b in buffers} == {torch.bfloat16}


class Mine(torch.optim.Optimizer):
    """One of which nobody knows what it looks at."""


def test_what_deepspeed_would_do_wrong_is_refused():
    """Gradients in two parts, lost writes, and settings: by names of the user's own."""
    assert told(odd) == [True, True]


def infinite(model, batch):
    """A loss whose gradients are no numbers."""
    return t.bare(model, batch) * float("nan")


def refusals(env, folder):
    """What is refused when there are ranks."""
    one, two, three = (placing(env, f"zero-{n}") for n in (1, 2, 3))
    for place in PLACES:
        kept(env, place)
    refused(env, two, t.grouped, r"cannot be copied.*save and load.*fsdp2")
    refused(env, two, t.grouped, "holds the gradients of one ax.grads", twice=True)
    refused(env, two, t.pair, "one optimizer a model, got AdamW, SGD.*param_groups")
    refused(env, two, lion, "flat slices.*Adafactor.*stage=0")
    refused(env, two, None, "an optimizer.*ax.init")
    refused(env, two, t.grouped, r"got no gradient on.*layers\.0", loss=unused)
    refused(env, three, t.grouped, "not finite; add clip", loss=infinite)
    refused(env, ax.chain(three, ax.with_ema(0.9)), t.grouped, "with_ema.*stage=2")
    refused(env, ax.chain(one, ax.clip_value(1.0)), t.grouped, "clip_value.*stage=0")
    with pytest.raises(ax.PlacementError, match=r"wants the optimizer.*ax.init"):
        two(single())
    exports = (
        (ax.shard_model(env), t.grouped, folder, r"got one of ddp.*save_state"),
        (two, t.grouped, "s3://bucket/run", "writes to a folder"),
        (two, None, f"{folder}/none", r"given none; write export\("),
    )
    for tx, optim, out, words in exports:
        with pytest.raises(ax.AccelxError, match=words):
            ax.export_state(env, ax.init(tx, single, optim), out)
    for weight in (torch.ones(()), torch.empty(0, 3)):
        few = nn.ParameterDict({"odd": weight})
        with pytest.raises(ax.PlacementError, match=r"odd has none.*torch.zeros"):
            ax.init(three, few, t.grouped)
    with pytest.raises(ax.PlacementError, match=r"float64, but embed.weight.*fp32"):
        ax.init(one, t.made(), t.grouped)
    with pytest.raises(ax.PlacementError, match=r"float32, but embed.weight is .*fp32"):
        ax.init(two, t.made(torch.bfloat16), t.grouped)
    return True


def test_what_is_kept_and_what_is_refused():
    """Object, class, names, environment (L8); else an error that says what to write."""
    assert told(refusals) == [True, True]


def language(env, folder):
    """A tiny model of transformers over stage 3: its losses, its export read again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )

    def make():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)

    def loss(model, ids):
        return model(input_ids=ids, labels=ids).loss

    ids = torch.arange(4 * 5).view(4, 5) % 17
    optim = lambda m: torch.optim.AdamW(m.parameters(), 1e-2)  # noqa: E731
    judge, hand = make(), []
    by = optim(judge)
    for _ in range(3):
        value = loss(judge, ids)
        value.backward()
        by.step()
        by.zero_grad()
        hand.append(value.item())
    tx = ax.chain(placing(env, "zero-3"), ax.accumulate(2))
    state = ax.init(tx, make, optim)
    step, ours = ax.step(tx, loss), []
    for _ in range(3):
        state, out = step(state, ax.split(env, ids))
        ours.append(float(out.loss))
    ax.export((env, state), f"{folder}/exported")
    again = make()
    ax.load_weights(f"{folder}/exported")(again)
    pairs = zip(again.parameters(), judge.parameters(), strict=True)
    gap = max((a - b).abs().max().item() for a, b in pairs)
    ask = ids[:1, : 2 + env.rank]  # ranks with texts of their own length
    how = {"max_new_tokens": 3 + 2 * env.rank, "do_sample": False}
    with ax.evaluating(state) as model:
        text = model.generate(ask, synced_gpus=True, **how)
    assert torch.equal(text, again.eval().generate(ask, **how))
    return max(abs(a - b) for a, b in zip(hand, ours, strict=True)), gap


def test_a_model_of_transformers_is_sliced_and_exported():
    """It trains as by hand, exports what was trained, and writes what that writes."""
    for losses, weights in told(language):
        assert losses < 1e-5
        assert weights < 1e-5


def test_one_rank_is_the_plain_model():
    """DeepSpeed is not imported for it, and settings are checked all the same."""
    env = ax.Env()
    tx = ax.shard_model(env, "deepspeed", stage=3)
    assert tx.find("shard_model").engine.name == "plain"
    state = ax.init(tx, t.made(), t.grouped)
    assert ax.step(tx, t.bare)(state, DATA[0])[1].stepped
    assert Options().stage is None


LAUNCHES = (
    (trained, resharded, theirs, made_in_slices),
    (behaves, refusals, odd, language),
)
