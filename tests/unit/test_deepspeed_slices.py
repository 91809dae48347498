"""Where ZeRO's flat slices have each weight, on data alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import accelx as ax
from accelx.engines import deepspeed_slices as cuts

SHAPES = ((2, 3), (4,), (), (1, 5))


def weights():
    """Weights that count their elements."""
    return [
        nn.Parameter(torch.arange(1.0, 1 + torch.Size(s).numel()).view(s))
        for s in SHAPES
    ]


def grouped(world):
    """Weights end to end, padded and cut between ranks, as stages 1 and 2 do."""
    own = weights()
    flat = torch.cat([w.detach().reshape(-1) for w in own])
    size = -(-flat.numel() // world)
    flat = torch.cat([flat, torch.zeros(size * world - flat.numel())])
    starts = [sum(w.numel() for w in own[:i]) for i in range(len(own))]
    return own, [
        SimpleNamespace(
            single_partition_of_fp32_groups=[part],
            round_robin_bit16_groups=[own],
            round_robin_bit16_offsets=[starts],
            partition_size=[size],
        )
        for part in flat.split(size)
    ]


def sliced(world):
    """Each weight padded and cut between ranks, as stage 3 does."""
    own = weights()
    parts = [[] for _ in range(world)]
    for w in own:
        size = -(-w.numel() // world)
        flat = torch.cat(
            [w.detach().reshape(-1), torch.zeros(size * world - w.numel())]
        )
        for rank, part in enumerate(flat.split(size)):
            parts[rank].append(part)
        w.ds_shape, w.ds_numel = w.shape, w.numel()
        w.partition_numel = lambda size=size: size
    return own, [
        SimpleNamespace(fp32_partitioned_groups_flat=[torch.cat(p)], fp16_groups=[own])
        for p in parts
    ]


def cut_of(layout, stage, world):
    """The weights, and what each rank says of its slices."""
    own, zeros = layout(world)
    envs = [ax.Env(rank=r, world=world) for r in range(world)]
    each = zip(zeros, envs, strict=True)
    return own, [cuts.slices(zero, stage, env) for zero, env in each]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(("layout", "stage"), [(grouped, 2), (sliced, 3)])
def test_the_runs_of_all_ranks_are_the_weight(layout, stage, world):
    """Side by side, in the order of ranks; padding is nobody's."""
    own, ranks = cut_of(layout, stage, world)
    for i, weight in enumerate(own):
        parts = [cut[0].parts[i].of(cut[0].master) for cut in ranks]
        joined = torch.cat([part.local for part in parts])
        assert torch.equal(joined, weight.detach().reshape(-1))
        assert {part.shape for part in parts} == {tuple(weight.shape)}


def stepped(own, cut):
    """An optimizer over the slice that has made a step, as names see it."""
    optimizer = torch.optim.AdamW([cut[0].master])
    cut[0].master.grad = torch.ones_like(cut[0].master)
    optimizer.step()
    return optimizer, cuts.seen(optimizer, [own], cut)


def test_state_goes_out_by_weight_and_in_again():
    """Moments in runs, the count of updates as it is."""
    own, ranks = cut_of(grouped, 2, 2)
    for cut in ranks:
        cut[0].master.requires_grad_()
        optimizer, seen = stepped(own, cut)
        assert seen.kind == "AdamW"
        assert [id(p) for p in seen.param_groups[0]["params"]] == [id(p) for p in own]
        held = optimizer.state[cut[0].master]
        wanted = {k: v.clone() for k, v in held.items()}
        fresh = torch.optim.AdamW([cut[0].master])
        cuts.seen(fresh, [own], cut).put(seen.state)
        made = fresh.state[cut[0].master]
        parts = cut[0].parts
        for key, value in wanted.items():
            for part in parts if value.dim() else ():
                assert torch.equal(part.of(made[key]).local, part.of(value).local)
        assert made["step"] == wanted["step"] == 1


def test_counts_that_differ_within_a_slice_are_refused():
    """And state that only some weights have: the slice is updated as one."""
    own, (cut,) = cut_of(grouped, 2, 1)
    cut[0].master.requires_grad_()
    _, seen = stepped(own, cut)
    other = {w: dict(state) for w, state in seen.state.items()}
    other[own[1]]["step"] = torch.tensor(7.0)
    with pytest.raises(ax.CheckpointError, match=r"one 'step' for all.*only="):
        seen.put(other)
    del other[own[1]]
    with pytest.raises(ax.CheckpointError, match=r"same kinds.*only="):
        seen.put(other)
