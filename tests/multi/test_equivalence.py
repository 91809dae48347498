"""A user's own training, compared with itself in many layouts of real ranks."""

import json
import subprocess
import sys
import time
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax
from accelx.equivalences import door
from accelx.equivalences.check import check_equivalence
from accelx.testing import RankError
from tests.door.spawning import environment
from tests.laws import training as t

pytestmark = pytest.mark.multi
BATCHES = t.batches()


def rank():
    """This rank as torch tells it; 0 in a process alone."""
    group = torch.distributed
    return group.get_rank() if group.is_initialized() else 0


def building(loss, model=None, data=None, optim=t.grouped):
    """A `build` over the laws' odd model and ragged masks."""
    make = t.made(torch.float32) if model is None else model
    given = (lambda step: BATCHES[step]) if data is None else data
    return lambda: (make, optim, loss, given)


def rows(report):
    """Layout as text -> its row."""
    return {str(row.layout): row for row in report.rows}


@cache
def wrong():
    """The report of the mean of means."""
    return check_equivalence(building(t.mean_of_means))


def test_a_right_loss_is_equal_in_every_layout():
    """Means over rows and over tokens pass: tied, frozen and ragged as they may be."""
    for loss in (t.bare, t.masked):
        report = check_equivalence(
            building(loss), ranks=(1, 3), micro=(1, 2), blocks="layers.*"
        )
        assert report.equal, report
        assert len(report.rows) == 6  # one rank has no kinds
        assert not report.causes
        gaps = [gap for row in report.rows for gap in row.gaps.values()]
        assert 0 < max(gaps) < 1e-12  # rounding is there, and no more


class Attends(nn.Module):
    """A token at a time, but for attention; counts the heads that are here."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, tokens):
        x = self.embed(tokens)
        parts = (
            f(x).view(*x.shape[:-1], -1, 2).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


def labelled(model, batch):
    """A mean over tokens that count."""
    tokens, weights = batch
    each = model(tokens).square().mean(-1)
    return ax.Mean((each * weights).sum(), weights.sum())


def own_rows(model, batch):
    """The control: each part by its own tokens."""
    mean = labelled(model, batch)
    return mean.total / mean.weight


def test_layers_tokens_and_copies_of_slices_are_layouts_too():
    """Over axes of their own, the judge being the same; a wrong loss parts in them."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (5, 8), generator=draw)
    data = (tokens, (torch.rand(5, 8, generator=draw) < 0.6).double() + 0.1)
    kinds = ("hsdp", "tensor", "sequence")
    named = {"ranks": (2,), "kinds": kinds, "steps": 2}
    named["plan"] = {"[qkv]": "column", "o": "row"}
    right = building(labelled, model=Attends, data=data)
    report = check_equivalence(right, **named)
    assert report.equal, report
    assert [row.layout.kind for row in report.rows] == [k for k in kinds for _ in "12"]
    wrong = building(own_rows, model=Attends, data=data)
    report = check_equivalence(wrong, **named | {"micro": (2,)})
    assert not any(row.equal for row in report.rows), report
    refused = {row.layout.kind for row in report.rows if row.error}
    assert refused == {"sequence"}, report  # of which it is seen in the loss itself


def test_data_may_be_a_loader_a_batch_or_a_function():
    """The same rows come to the same end, whichever way they are given."""
    whole = t.batches(rows=(12,))[0]
    loader = DataLoader(TensorDataset(*whole), batch_size=5, shuffle=True)
    for data in (loader, whole):
        report = check_equivalence(
            building(t.bare, data=data), kinds=("fsdp2",), micro=(2,)
        )
        assert report.equal, report


def test_a_model_may_be_a_module_and_keep_its_dtype():
    """In float32 rounding is larger, and within the tolerance of float32."""
    build = lambda: (t.made(torch.float32)(), t.grouped, t.bare, BATCHES[2])  # noqa: E731
    report = check_equivalence(build, kinds=("ddp",), dtype=None)
    assert report.equal, report
    assert report.tol == 1e-4
    assert max(gap for row in report.rows for gap in row.gaps.values()) > 1e-9


def test_the_mean_of_means_is_found_and_named():
    """What one process does is right by hand; layouts that cut masks part from it."""
    found, judge = (
        rows(wrong()),
        t.by_hand(
            t.made(torch.float32), t.mean_of_means, t.grouped, [doubled(BATCHES[0])]
        ),
    )
    assert not wrong().equal
    assert found["1 rank"].equal
    parted = found["2 ranks, ddp"].partings
    assert [p.what for p in parted] == ["loss", "gradient", "norm", "parameter"]
    assert {p.step for p in parted} == {0}
    assert parted[0].wanted == pytest.approx(judge[0].loss, rel=1e-6)
    assert parted[0].wanted != pytest.approx(parted[0].got, rel=1e-3)
    assert parted[2].wanted == pytest.approx(judge[0].norm, rel=1e-5)
    assert parted[1].name == "embed.weight"
    [cause] = wrong().causes
    assert "no mean over rows" in cause
    assert "ax.Mean(total, weight)" in cause


def doubled(batch):
    """The mask as the model's dtype has it."""
    return batch[0], batch[1].float()


def test_the_report_prints_where_runs_part():
    """The table has a line for each layout, and the first difference of each."""
    text = repr(wrong())
    assert text.splitlines()[0].split()[0] == "layout"
    assert "NOT equal: 5 of 6 layouts" in text
    assert "step 0: gradient of embed.weight is" in text
    data = json.loads(json.dumps(wrong().data))
    assert data["equal"] is False
    assert data["rows"][0]["layout"] == {"ranks": 1, "kind": "plain", "micro": 1}


def test_noise_that_depends_on_the_rank_is_named():
    """Equal seeds and batches, and still another loss on rank 1: it is the rank."""

    def noisy(model, batch):
        draw = torch.Generator().manual_seed(rank())
        return t.bare(model, batch) * (1 + torch.rand((), generator=draw) / 100)

    report = check_equivalence(building(noisy), kinds=("ddp",), steps=1)
    assert rows(report)["1 rank, 2 microbatches"].equal
    assert not rows(report)["2 ranks, ddp"].equal
    assert any("depends on the rank" in c and "rank 1" in c for c in report.causes)


def test_the_first_parameter_step_and_layout_are_named():
    """One gradient that is wrong on one rank at one step is told from all others."""
    calls = []

    def sly(model, batch):
        calls.append(0)  # one a step, in the process of the rank
        p = model.layers[2].inner.bias
        more = (p - p.detach()).sum() * (rank() == 1 and len(calls) == 2)
        return t.bare(model, batch) + 0.1 * more

    sgd = lambda model: torch.optim.SGD(model.parameters(), 0.1)  # noqa: E731
    build = building(sly, optim=sgd)
    report = check_equivalence(build, ranks=(2,), kinds=("ddp",), micro=(1,))
    [row] = report.rows
    first, *rest = row.partings
    assert (first.what, first.step) == ("gradient", 1)
    assert first.name == "layers.2.inner.bias"
    assert [p.name for p in rest if p.what == "parameter"] == ["layers.2.inner.bias"]
    assert {p.what: p.step for p in rest} == {"norm": 1, "parameter": 1, "loss": 2}


class Odd(nn.Sequential):
    """A model with what depends on the cut of rows in it."""

    def __init__(self, module):
        super().__init__(nn.Linear(4, 4), module, nn.Linear(4, 1))


def squares(model, batch):
    """A mean over rows."""
    return model(batch).square().mean()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.BatchNorm1d(4), "batch norm: 1 (BatchNorm1d)"),
        (nn.Dropout(0.5), "dropout: 1 (Dropout)"),
    ],
)
def test_modules_that_look_at_the_cut_are_named(module, words):
    """Batch norm and dropout part, and are told as the cause by their names."""
    build = building(
        squares,
        model=lambda: Odd(module),
        data=torch.arange(24.0).reshape(6, 4).sin(),
        optim=lambda m: torch.optim.SGD(m.parameters(), 0.1),
    )
    report = check_equivalence(build, kinds=("ddp",), micro=(1,), steps=1)
    assert rows(report)["1 rank"].equal  # the same numbers are drawn there
    assert not report.equal
    [cause] = report.causes
    assert words in cause


def test_a_loss_that_draws_and_a_mean_that_does_not_add_up():
    """The cause tells one from the other."""

    def drawn(model, batch):
        return t.bare(model, batch) * torch.rand(())

    def means(model, batch):
        per_token = t.each(model, batch[0]) * batch[1]
        return ax.Mean(per_token.mean(), batch[1].mean())

    data = t.batches(rows=(7,))[0]
    for loss, words in ((drawn, "draws random numbers"), (means, "do not add up")):
        report = check_equivalence(
            building(loss, data=data), ranks=(1,), micro=(3,), steps=1
        )
        assert not report.equal
        assert any(words in cause for cause in report.causes), report


def test_a_layout_that_fails_is_a_row_and_the_others_run():
    """What one rank raises is told in its row, by the root cause."""

    def failing(model, batch):
        if rank() == 1:
            raise KeyError("no such column")
        return t.bare(model, batch)

    report = check_equivalence(building(failing), kinds=("ddp",), micro=(1,))
    assert rows(report)["1 rank"].equal
    row = rows(report)["2 ranks, ddp"]
    assert row.error.splitlines() == [
        "rank 1 of 2 failed:",
        "KeyError: 'no such column'",
    ]
    assert not report.equal
    assert "failed" in repr(report)


def test_a_judge_that_fails_raises_and_says_what_to_write():
    """Without the run of one process there is nothing to compare with."""
    with pytest.raises(RankError, match="wants to return \\(model, optim, loss, data"):
        check_equivalence(lambda: 3)

    def halves(model, batch):
        return (t.bare(model, batch).float().view(1) @ torch.ones(1).double()).mean()

    with pytest.raises(RankError, match="dtype=None"):
        check_equivalence(building(halves))
    with pytest.raises(RankError, match="without a tensor"):
        check_equivalence(building(t.bare, data=3))


PROGRAM = """\
import torch
from torch import nn

def build():
    loss = lambda model, x: (model(x) ** 2){end}
    optim = lambda model: torch.optim.AdamW(model.parameters(), 1e-3)
    return lambda: nn.Linear(3, 2), optim, loss, torch.randn(5, 3)

if __name__ == "__main__":
    raise SystemExit("this trains")
"""


def door_of(folder, monkeypatch, capsys, *words):
    """The door in this process, on `train.py`: its code, and what it printed."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # it adds the file's folder
    code = door.main([str(folder / "train.py"), *words])
    return code, capsys.readouterr()


def test_the_door_runs_a_file(tmp_path):
    """The exit code is the answer; the part of the file that trains is not run."""
    (tmp_path / "train.py").write_text(PROGRAM.format(end=".sum()"))
    words = ["train.py", "--kinds", "ddp", "--steps", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "accelx.equivalence", *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    data = json.loads(done.stdout)
    assert data["equal"] is False
    assert data["steps"] == 2
    assert len(data["rows"]) == 4


def test_the_door_says_that_all_is_equal(tmp_path, monkeypatch, capsys):
    """The control of the one before: with the mean the code is 0."""
    (tmp_path / "train.py").write_text(PROGRAM.format(end=".mean()"))
    words = ("--kinds", "ddp", "--micro", "1")
    code, said = door_of(tmp_path, monkeypatch, capsys, *words)
    assert code == 0
    assert "equal: 2 layouts make the run" in said.out


def named(model, batch):
    """A mean over rows of a batch that is a mapping with more than tensors in it."""
    assert batch["name"] == "words"
    return t.bare(model, (batch["tokens"],)) * batch["scale"]


def test_batches_may_be_trees_with_fewer_rows_than_ranks():
    """Texts and single numbers go to each rank, rows to one; two optimizers step."""
    batch = {"tokens": BATCHES[0][0][:2], "name": "words", "scale": torch.tensor(2.0)}
    build = building(named, data=batch, optim=t.pair)
    report = check_equivalence(build, ranks=(3,), micro=(1, 2), steps=2)
    assert report.equal, report
    assert len(report.rows) == 4


def test_an_optimizer_that_depends_on_the_rank_parts_in_parameters_alone():
    """Losses and gradients of the first step are right; the update is not."""

    def uneven(model):
        return torch.optim.SGD(model.parameters(), 0.1 * (1 + rank()))

    build = building(t.bare, optim=uneven)
    report = check_equivalence(build, ranks=(2,), kinds=("ddp",), micro=(1,), steps=1)
    [row] = report.rows
    [parting] = row.partings
    assert (parting.what, parting.step, parting.rank) == ("parameter", 0, 1)
    assert parting.name == "embed.weight"
    assert {what: gap > 1e-9 for what, gap in row.gaps.items()} == {
        "loss": False,
        "gradient": False,
        "norm": False,
        "parameter": True,
    }


def test_ranks_that_do_not_meet_are_a_row_in_time():
    """A layout that hangs is told as that, and the others are there."""

    def lost(model, batch):
        if rank() == 1:
            time.sleep(60)
        return t.bare(model, batch)

    for limit in (4, 16, 64):  # the first is too short for one rank on a busy machine
        report = check_equivalence(
            building(lost), kinds=("ddp",), micro=(1,), steps=1, timeout=limit
        )
        if rows(report)["1 rank"].equal:
            break
    assert rows(report)["1 rank"].equal
    assert f"had not finished after {limit} s" in rows(report)["2 ranks, ddp"].error


def test_differences_stand_where_no_cause_can_be_looked_for():
    """A loss that fails when it is tried again is told beside them."""

    def training(model, batch):
        assert model.training, "only in training"
        return t.mean_of_means(model, batch)

    report = check_equivalence(
        building(training), ranks=(2,), kinds=("ddp",), micro=(1,), steps=1
    )
    assert report.rows[0].partings
    [cause] = report.causes
    assert "fails when tried again" in cause
    assert "only in training" in cause


def test_parameters_without_gradients_are_told_by_the_layout_that_refuses_them():
    """As a step of accelx refuses them, with their names."""

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x):
            return self.used(x)

    build = building(
        squares,
        model=Idle,
        data=torch.ones(4, 4),
        optim=lambda m: torch.optim.SGD(m.parameters(), 0.1),
    )
    report = check_equivalence(build, ranks=(2,), kinds=("ddp",), micro=(1,), steps=1)
    assert "UnusedParameterError" in report.rows[0].error
    assert "idle.weight" in report.rows[0].error


def test_a_loss_that_is_no_number_is_equal_to_nothing():
    """nan in one process is told, and nan elsewhere is no equality with it."""
    build = building(lambda model, batch: t.bare(model, batch) * float("nan"))
    report = check_equivalence(build, ranks=(1,), micro=(1,), steps=1)
    assert not report.equal
    assert report.rows[0].gaps["loss"] == float("inf")
    assert any("nan in one process already" in cause for cause in report.causes)
    assert json.loads(json.dumps(report.data))["rows"][0]["gaps"]["loss"] == "inf"


def test_nothing_is_changed_in_the_callers_process():
    """Random numbers, threads and modules of the caller are what they were."""
    called = []
    model = t.made(torch.float32)()
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    weight = model.embed.weight.detach().clone()

    def build():
        called.append(0)
        return model, t.grouped, t.bare, BATCHES[0]

    report = check_equivalence(build, ranks=(2,), kinds=("ddp",), micro=(1,), steps=1)
    assert report.equal, report
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert called == []
    assert torch.equal(model.embed.weight, weight)
    assert model.embed.weight.dtype == torch.float32


class Halfway(nn.Module):
    """Takes a norm in float32, whatever it is given, as many models do."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x):
        x = self.inner(x)
        inside = x.float()
        inside = inside * torch.rsqrt(inside.square().mean(-1, keepdim=True) + 1e-6)
        return self.outer(inside.to(x.dtype))


def test_a_model_that_casts_down_inside_is_held_to_its_own_rounding():
    """It is equal, with a note; held to float64's rounding it is not."""

    def weighed(model, batch):
        each = model(batch).square().mean(-1) * batch[:, 0].abs()
        return ax.Mean(each.sum(), batch[:, 0].abs().sum())

    data = torch.arange(28.0).reshape(7, 4).sin()
    build = building(weighed, model=Halfway, data=data)
    named = {"ranks": (2,), "kinds": ("fsdp2",), "micro": (1,)}
    report = check_equivalence(build, **named)
    assert report.equal, report
    assert report.tol == 1e-4
    [note] = report.notes
    assert "computes in float32 inside" in note
    assert f"note: {note}" in repr(report)
    strict = check_equivalence(build, **named, tol=1e-12)
    assert not strict.equal
    assert strict.notes == ()


def test_control_a_wrong_loss_is_found_under_that_rounding_too():
    """The tolerance of float32 does not hide the mean of means, nor its cause."""

    def means(model, batch):
        x, mask = batch
        each = model(x).square().mean(-1) * mask
        return each.sum() / mask.sum()

    mask = torch.tensor([1, 1, 1, 0, 0, 1, 0])
    data = (torch.arange(28.0).reshape(7, 4).sin(), mask)
    build = building(means, model=Halfway, data=data)
    report = check_equivalence(build, ranks=(2,), kinds=("ddp",), micro=(1,))
    assert not report.equal
    assert any("no mean over rows" in cause for cause in report.causes)


def test_the_door_finds_modules_beside_the_file(tmp_path, monkeypatch, capsys):
    """As `python train.py` would import them; blocks are those of shard_model."""
    (tmp_path / "own_width.py").write_text("WIDTH = 3\n")
    text = PROGRAM.format(end=".mean()").replace("nn.Linear(3", "nn.Linear(WIDTH")
    (tmp_path / "train.py").write_text(f"from own_width import WIDTH\n{text}")
    words = ["--kinds", "fsdp2", "--ranks", "2", "--micro", "1", "--steps", "1"]
    words += ["--blocks", "nothing.*"]
    code, said = door_of(tmp_path, monkeypatch, capsys, *words)
    assert code == 1  # such blocks are in no model
    assert said.out.startswith("layout")
    assert "nothing.*" in said.out
    assert "NOT equal: 1 of 1 layouts" in said.out


def test_a_build_that_fails_shows_its_own_error(tmp_path, monkeypatch, capsys):
    """What it raises is told on the standard error, and no table is printed."""
    (tmp_path / "train.py").write_text("def build():\n    return 3\n")
    code, said = door_of(tmp_path, monkeypatch, capsys)
    assert (code, said.out) == (1, "")
    assert "build wants to return (model, optim, loss, data), got int" in said.err
