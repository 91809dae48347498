"""What DeepSpeed is told of a chain, and which settings of a user's it clashes with."""

import json
import sys

import pytest

import accelx as ax
from accelx.engines import deepspeed_config as configs, deepspeed_open
from accelx.engines.options import Options

ENV = ax.Env(world=2, axes=(ax.Axis("data", 2),))


def told(tx=ax.identity, **options):
    """The configuration of a chain."""
    spec = ax.shard_model(ENV, "deepspeed", **options).find("shard_model")
    return configs.config(spec.options, tx)


def test_what_would_change_numbers_is_always_said():
    """No clipping by default, no accumulation of its own, the user's own optimizer."""
    made = told()
    assert made["gradient_clipping"] == 0.0
    assert made["managed_gradient_accumulation"] is False
    assert made["gradient_accumulation_steps"] == 1
    assert made["zero_force_ds_cpu_optimizer"] is False
    assert made["zero_allow_untested_optimizer"] is True
    assert made["zero_optimization"]["stage"] == 2
    assert not {"bf16", "fp16", "optimizer", "scheduler"} & set(made)


@pytest.mark.parametrize("stage", range(4))
def test_a_stage_is_said_in_either_place(stage):
    """By the option, by the configuration, or by both alike."""
    zero = {"zero_optimization": {"stage": stage}}
    for options in (
        {"stage": stage},
        {"config": zero},
        {"stage": stage, "config": zero},
    ):
        assert told(**options)["zero_optimization"]["stage"] == stage


def test_settings_of_zero_are_handed_on_and_auto_is_left_to_accelx():
    """As Transformers writes its configurations; the user's dict stays as it is."""
    mine = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": False},
        "optimizer": "auto",
        "zero_optimization": {"reduce_bucket_size": 7, "sub_group_size": "auto"},
    }
    before = json.dumps(mine)
    made = told(config=mine)
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
    assert "sub_group_size" not in made["zero_optimization"]
    assert json.dumps(mine) == before


def test_a_file_is_read_and_prints_as_what_it_says(tmp_path):
    """A path is as good as a dict (L9)."""
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    one = ax.shard_model(ENV, "deepspeed", config=path)
    assert one == ax.shard_model(ENV, "deepspeed", config=json.loads(path.read_text()))
    assert "{'zero_optimization': {'stage': 3}}" in repr(one)


@pytest.mark.parametrize("text", [None, "{'stage': 2}", "[1]"])
def test_a_file_that_holds_no_settings_is_named(tmp_path, text):
    """A missing one, one that is no JSON, and one of something else."""
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ax.PlacementError, match=r"ds\.json.*write config="):
        ax.shard_model(ENV, "deepspeed", config=path)
    with pytest.raises(ax.PlacementError, match=r"got \[1\]; write config="):
        ax.shard_model(ENV, "deepspeed", config=[1])


def test_what_both_say_alike_is_no_clash():
    """The chain's clip and microbatches may stand in the configuration, too."""
    mine = {"gradient_clipping": 0.5, "gradient_accumulation_steps": 4}
    made = told(ax.chain(ax.accumulate(4), ax.clip(0.5)), config=mine)
    assert (made["gradient_clipping"], made["gradient_accumulation_steps"]) == (0.0, 1)


def test_offload_is_of_the_optimizer():
    """By the option or by the configuration."""
    asked = {
        "zero_optimization": {
            "offload_optimizer": {"device": "cpu", "pin_memory": True}
        }
    }
    assert told(offload=True)["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu"
    }
    for options in ({"config": asked}, {"config": asked, "offload": True}):
        assert told(**options)["zero_optimization"]["offload_optimizer"]["pin_memory"]


def test_the_wire_has_the_dtype_that_precision_asks_for():
    """And DeepSpeed's own where nothing is asked."""
    half = ax.with_precision(ax.Precision(param="fp32", compute="bf16", reduce="bf16"))
    assert told(half)["communication_data_type"] == "bf16"
    assert "communication_data_type" not in told()


def zero(**settings):
    """A configuration of ZeRO."""
    return {"config": {"zero_optimization": settings}}


CLASHES = [  # chain, options, what the error says: both sources
    (ax.clip(0.5), {"config": {"gradient_clipping": 1.0}}, r"=1.0, but.*clip\(0.5\)"),
    (ax.identity, {"config": {"gradient_clipping": 1.0}}, "no clip in the chain"),
    (
        ax.accumulate(2),
        {"config": {"gradient_accumulation_steps": 4}},
        r"steps=4, but.*accumulate\(2\)",
    ),
    (ax.identity, {"stage": 1, **zero(stage=2)}, r"stage=2, but.*stage=1\)"),
    (ax.identity, {"config": {"optimizer": {"type": "Adam"}}}, "ax.init is given"),
    (ax.identity, {"config": {"scheduler": {"type": "X"}}}, "with_schedule"),
    (ax.identity, {"config": {"train_batch_size": 8}}, "batch_size"),
    (ax.identity, {"config": {"bf16": {"enabled": True}}}, r'with_precision\("bf16"\)'),
    (ax.identity, {"config": {"fp16": {"enabled": "auto"}}}, r"with_precision"),
    (ax.identity, {"config": {"wandb": {"enabled": True}}}, "no effect.*leave it out"),
    (ax.identity, {"config": {"managed_gradient_accumulation": True}}, "accelx needs"),
    (ax.identity, zero(zenflow={"topk": 1}), "zenflow.*not taken"),
    (ax.identity, zero(offload_optimizer={"device": "nvme"}), "device cpu.*nvme"),
    (ax.identity, zero(offload_optimizer="cpu"), "to be a dict, got 'cpu'"),
    (ax.identity, {"stage": 0, "offload": True}, "slices to offload.*stage=2"),
    (ax.identity, zero(offload_param={"device": "cpu"}), "got stage=2.*write stage=3"),
    (ax.identity, zero(cpu_offload=True), r"cpu_offload=True.*shard_model\(offload"),
    (ax.identity, zero(zenflow={}), "zenflow.*not taken"),
    (ax.identity, {"config": {"zero_optimization": 3}}, "to be a dict, got 3"),
    (ax.identity, {"stage": 4}, "0, 1, 2 or 3, got 4; write"),
]


@pytest.mark.parametrize(("tx", "options", "words"), CLASHES)
def test_a_clash_names_both_sources(tx, options, words):
    """Before a model is made."""
    with pytest.raises(ax.PlacementError, match=words):
        told(tx, **options)


def test_a_whole_file_hears_all_that_is_wrong_at_once():
    """What is switched off is none of it."""
    off = {"wall_clock_breakdown": False, "fp16": {"enabled": False}}
    wrong = {"train_batch_size": 8, "scheduler": {"type": "X"}, "steps_per_print": 9}
    with pytest.raises(ax.PlacementError) as caught:
        told(config={**off, **wrong, "gradient_clipping": 1.0})
    said = str(caught.value).splitlines()
    assert said[0].startswith("4 settings")
    assert all(f"{key}=" in text for key, text in zip(wrong, said[1:-1], strict=True))
    assert "gradient_clipping=1.0" in said[-1]
    told(config=off)


REFUSED = [
    (ax.clip_value(1.0), {"stage": 1}, r"clip_value.*stage 1.*stage=0"),
    (ax.with_ema(0.9), {"stage": 3}, r"with_ema.*stage 3.*stage=2"),
    (ax.compile(), {"stage": 3}, r"compile.*stage 3.*stage=2"),
    (ax.identity, {"stage": 3, "methods": "encode"}, r"methods.*stage=2"),
    (ax.identity, {"unused": "allow"}, r"zeros.*\"ddp\", unused"),
    (ax.with_precision(ax.Precision(param="bf16")), {}, r"param='bf16'.*stage=0"),
]


@pytest.mark.parametrize(("tx", "options", "words"), REFUSED)
def test_a_chain_that_zero_cannot_have_is_refused(tx, options, words):
    """With what to write; a stage that can have it is not."""
    spec = ax.shard_model(ENV, "deepspeed", **options).find("shard_model")
    with pytest.raises(ax.PlacementError, match=words):
        configs.check(spec.options, spec.unused, tx)


def test_control_stage_zero_takes_them():
    """All but weights without a gradient."""
    tx = ax.chain(ax.clip_value(1.0), ax.with_ema(0.9), ax.compile())
    configs.check(Options(stage=0, methods=("encode",)), "error", tx)


def test_a_missing_package_names_the_extra(monkeypatch):
    """And leaves the environment alone."""
    import os

    before = dict(os.environ)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        ax.MissingExtraError, match=r"pip install 'accelx\[deepspeed\]'"
    ):
        deepspeed_open.initialize(ENV, None, None, {})
    assert dict(os.environ) == before


def test_explain_says_that_it_acts_twice():
    """When the model is placed, and when there are optimizers."""
    shown = repr(ax.explain(ax.shard_model(ENV, "deepspeed", stage=1)))
    assert "place, start" in shown
    assert "stage=1" in shown
