"""Strategies: any pass, any chain, legal or not."""

from __future__ import annotations

from hypothesis import strategies as st

import accelx as ax

ENV = ax.Env(rank=1, world=4, axes=(ax.Axis("replicate", 2), ax.Axis("shard", 2)))
NAMES = ("one", "two", "three", "clip", "shard_model")
FACTORIES = ("accumulate", "clip", "shard_model", "with_precision")


def factor(step):
    """A schedule with a name to print."""
    return 1.0


def keep(state, out):
    """An arrow that does nothing."""
    return state, out


def wrap(loss):
    """An arrow around a loss that does nothing."""
    return loss


NAMESPACE = {name: getattr(ax, name) for name in ax.__all__} | {
    "factor": factor,
    "keep": keep,
    "wrap": wrap,
}


def evaluated(code):
    """What printed code makes, in the names of accelx and of this file."""
    return eval(code, {"env": ENV, **NAMESPACE})


real = st.one_of(
    st.builds(ax.accumulate, st.integers(1, 9)),
    st.builds(ax.clip, st.floats(0.1, 9)),
    st.just(ax.clip(float("inf"))),
    st.builds(ax.clip_value, st.floats(0.1, 9)),
    st.builds(
        ax.shard_model,
        st.sampled_from([ax.Env(), ENV]),
        st.sampled_from(["ddp", "fsdp2"]),
        st.sampled_from([None, "layers.*", ["a.*", "b.*"], ax.Mean]),
        unused=st.sampled_from(["error", "allow"]),
    ),
    st.builds(
        ax.shard_loader,
        st.sampled_from([ax.Env(), ENV]),
        st.integers(0, 3),
        ragged=st.booleans(),
    ),
    st.builds(
        ax.save_state,
        st.sampled_from([ax.Env(), ENV]),
        st.sampled_from(["runs/a", "s3://bucket/run"]),
        st.integers(1, 9),
        st.sampled_from([None, 3, ax.retain(2, 100, ("loss", "min"))]),
        wait=st.booleans(),
        select=st.sampled_from([None, "trainable"]),
    ),
    st.builds(
        ax.load_state,
        st.just(ENV),
        st.just("s3://bucket/run"),
        st.sampled_from(["error", "fresh"]),
        only=st.sampled_from([None, "model.**", ("model.**", "step")]),
        verify=st.sampled_from(["touched", "full", "off"]),
        fallback=st.booleans(),
    ),
    st.builds(ax.with_ema, st.floats(0.1, 0.99), every=st.integers(1, 3)),
    st.builds(
        ax.remat,
        st.sampled_from(["layers.*", ["a.*", "b.*"], ax.Mean]),
        st.sampled_from(["full", "selective"]),
    ),
    st.builds(ax.compile, st.sampled_from([None, "layers.*"])),
    st.builds(ax.with_lockstep, st.sampled_from([None, 60.0])),
    st.builds(
        ax.shard_stages,
        st.sampled_from([ax.Env(), ENV]),
        st.sampled_from(["balanced", "layers.2", ["a", "b.*"]]),
        st.integers(1, 9),
        st.sampled_from(["gpipe", "1f1b", "zbv"]),
    ),
    st.builds(ax.with_local_sgd, st.just(ENV), st.integers(1, 9)),
    st.builds(ax.with_diloco, st.just(ENV), st.integers(1, 9), st.just(factor)),
    st.builds(
        ax.on_preempt,
        st.just(ENV),
        st.just("runs/a"),
        st.sampled_from([("SIGTERM",), ("SIGTERM", "SIGUSR1")]),
        st.sampled_from([None, 30.0]),
    ),
    st.builds(
        ax.with_precision,
        st.sampled_from(
            ["fp32", "bf16", "fp16", ax.Precision("fp32", "bf16", output="fp32")]
        ),
    ),
    st.builds(
        ax.with_schedule,
        st.sampled_from([factor, ax.warmup_cosine(2, 9), ax.warmup_linear(0, 5, 0.1)]),
    ),
)
rules = st.builds(
    ax.Rules,
    after=st.lists(st.sampled_from(NAMES + FACTORIES), max_size=2).map(tuple),
    excludes=st.lists(st.sampled_from(NAMES + FACTORIES), max_size=1).map(tuple),
    once=st.booleans(),
    why=st.just("of the test"),
)
custom = st.builds(
    lambda name, rules, neutral, arrows: ax.transform(
        name, rules=rules, neutral=neutral, **arrows
    ),
    st.sampled_from(NAMES),
    st.lists(rules, max_size=2).map(tuple),
    st.booleans(),
    st.sampled_from([{"before": keep}, {"forward": wrap, "after": keep}]),
)
free = st.builds(  # a pass that fits everywhere
    lambda name, arrows: ax.transform(name, **arrows),
    st.sampled_from(["left", "right", "other"]),
    st.sampled_from([{"before": keep}, {"forward": wrap, "after": keep}]),
)
single = st.one_of(real, custom, free)


def legal(transforms):
    """The chain of these, leaving out what may not stand there."""
    whole = ax.identity
    for one in transforms:
        try:
            whole = ax.chain(whole, one)
        except ax.OrderError:
            continue
    return whole


chains = st.lists(single, max_size=6).map(legal)
