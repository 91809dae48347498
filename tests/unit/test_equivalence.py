"""What a comparison is asked for, which rows a rank gets, and how a report reads."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelx.equivalences import causes, door, trace
from accelx.equivalences.case import batches, built, cast, share, whole
from accelx.equivalences.check import check_equivalence
from accelx.equivalences.compare import _short, layouts
from accelx.equivalences.narrow import narrowed
from accelx.equivalences.report import Layout, Parting, Report, Row
from accelx.equivalences.settings import dtype_of
from accelx.errors import DataError
from accelx.records import Env, Mean
from accelx.rows import Rows, mark, rows_of

never = lambda: pytest.fail("build was called")  # noqa: E731


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"ranks": (0,)}, "for ranks"),
        ({"ranks": ()}, "for ranks"),
        ({"micro": (1.5,)}, "for micro"),
        ({"steps": 0}, "for steps, got 0"),
        ({"kinds": ("dpp",)}, "kinds out of 'ddp', 'fsdp2'"),
        ({"kinds": ("hsdp",), "ranks": (1, 3)}, "even number of ranks for hsdp"),
        ({"kinds": ("deepspeed",)}, "'sequence', got .'deepspeed',"),
        ({"dtype": "int64"}, "floating-point dtype"),
        ({"dtype": "nonsense"}, "got 'nonsense'"),
    ],
)
def test_what_is_no_layout_is_refused_before_a_process_starts(named, words):
    """The text says what was wanted and what came; nothing was built."""
    with pytest.raises(ValueError, match=words) as failed:
        check_equivalence(never, **named)
    assert "write " in str(failed.value)


def test_one_rank_has_no_kind():
    """On one rank all kinds are one and the same model: it is run once."""
    made = layouts((1, 2), ("ddp", "fsdp2"), (1, 4))
    assert list(map(str, made)) == [
        "1 rank",
        "1 rank, 4 microbatches",
        "2 ranks, ddp",
        "2 ranks, ddp, 4 microbatches",
        "2 ranks, fsdp2",
        "2 ranks, fsdp2, 4 microbatches",
    ]


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 5))
def test_ranks_together_hold_the_batch_in_order(total, world):
    """Every row once; a rank without rows has one that counts for nothing."""
    batch = {"x": torch.arange(total), "name": "same", "scalar": torch.tensor(3.0)}
    each = [share(Env(rank, world), batch) for rank in range(world)]
    real = [part["x"][: rows_of(part).rows] for part in each]
    assert torch.cat(real).tolist() == list(range(total))
    assert {rows_of(part).total for part in each} == {total}
    assert all(len(part["x"]) >= 1 and part["name"] == "same" for part in each)


def test_a_cast_keeps_marks_and_whole_numbers():
    """Floating-point tensors take the dtype, others and the mark stay."""
    batch = mark([torch.ones(2), torch.ones(2, dtype=torch.int32), "text"], 1, 5)
    new = cast(batch, torch.float64)
    assert [new[0].dtype, new[1].dtype, new[2]] == [torch.float64, torch.int32, "text"]
    assert rows_of(new) == Rows(1, 5)
    assert cast(batch, None) is batch


def parting(what, step, rank, gap, name=""):
    """A difference of that size."""
    return Parting(what, step, rank, name, 1.0, 1.0 + gap, gap)


def test_the_first_of_each_kind_is_the_earliest_on_the_lowest_rank():
    """By step, then in the order in which a step makes its numbers; small ones no."""
    found = [
        parting("loss", 2, 0, 0.5),
        parting("gradient", 1, 1, 0.2, "late"),
        parting("gradient", 1, 0, 0.1, "early"),
        parting("parameter", 0, 0, 1e-12, "rounding"),
    ]
    made = trace.firsts(found, 1e-9)
    assert [(p.what, p.step, p.name) for p in made] == [
        ("gradient", 1, "early"),
        ("loss", 2, ""),
    ]
    assert trace.largest(found) == {
        "loss": 0.5,
        "gradient": 0.2,
        "norm": 0.0,
        "parameter": 1e-12,
    }


def report(*rows, why=()):
    """A report of such rows."""
    return Report(rows, why, 3, 1e-9)


def test_a_report_reads_as_a_table_with_its_answer():
    """Equal in one line; else each layout that parts, and the cause."""
    fine = Row(Layout(1, "plain", 1), {"loss": 0.0, "gradient": 1e-16})
    assert report(fine).equal
    assert repr(report(fine)).splitlines()[-1].startswith("equal: 1 layouts make")
    far = Row(Layout(2, "ddp", 2), {"loss": math.inf}, (parting("loss", 0, 1, 0.5),))
    text = repr(report(fine, far, why=("the loss depends",)))
    assert "2 ranks, ddp, 2 microbatches  inf" in text
    assert "  step 0: loss is 1.5 on rank 1, wanted 1" in text
    assert text.endswith("cause: the loss depends")
    assert report(far).data["rows"][0]["gaps"] == {"loss": "inf"}
    assert report(fine, far) != report(fine)


def test_a_run_that_is_no_number_lies_as_far_as_can_be():
    """nan in a judge or in a layout is no equality."""
    near = trace._Near(0, 0, 1e-9)
    nan = {"w": torch.tensor([1.0, math.nan])}
    whole = {"w": torch.ones(2)}
    assert near.number("loss", math.nan, 1.0, 1e-3).gap == math.inf
    assert near.tensors("gradient", nan, whole).gap == math.inf
    assert near.tensors("gradient", whole, nan).gap == math.inf
    assert near.tensors("gradient", whole, whole).gap == 0.0


def test_a_tensor_that_one_side_lacks_counts_as_zeros():
    """A parameter without a gradient is as one whose gradient is 0."""
    near = trace._Near(0, 0, 1e-9)
    some = {"a": torch.zeros(2), "b": torch.tensor([0.0, 4.0])}
    made = near.tensors("gradient", some, {"a": torch.zeros(2)})
    assert (made.name, made.wanted, made.got, made.gap) == ("b", 4.0, 0.0, 1.0)
    assert near.tensors("gradient", some, {"b": some["b"]}).gap == 0.0


def probe(**named):
    """What a process found of a loss that is as it should be, but for `named`."""
    fine = {
        "loss": 1.0,
        "finite": True,
        "draws": None,
        "draws_training": None,
        "parts": None,
        "evaluated": 1.0,
        "bare": True,
        "couples": (),
        "drops": (),
    }
    return causes.Probe(**{**fine, **named})


@pytest.mark.parametrize(
    ("named", "ranks", "words"),
    [
        ({}, [1.0, 1.0], None),
        ({}, [1.0, 1.1], "depends on the rank"),
        ({"draws": (1.0, 2.0)}, [1.0], "in evaluation mode too"),
        ({"draws_training": (1.0, 2.0), "drops": ("d",)}, [1.0], "dropout: d draws"),
        ({"couples": ("a", "b")}, [1.0], "batch norm: a, b takes"),
        ({"parts": (2, 3.0)}, [1.0], "no mean over rows"),
        ({"parts": (2, 3.0), "bare": False}, [1.0], "do not add up over rows"),
        ({"loss": math.nan, "finite": False}, [math.nan], "nan in one process"),
    ],
)
def test_each_cause_has_its_sentence(named, ranks, words):
    """What was found is told once, and nothing where nothing was."""
    told = causes.sentences(probe(**named), ranks, 1e-9)
    assert (len(told) == 1 and words in told[0]) if words else not told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.py"], "wants a Python file, but none.py is none"),
        ([], "file"),
        (["x.py", "--ranks", "1,0"], "wants whole numbers of at least 1"),
        (["x.py", "--rank", "1"], "all options"),
    ],
)
def test_words_that_mean_nothing_end_in_code_2(words, said, capsys):
    """Wrong use is told, with what to write, and nothing runs."""
    assert door.main(words) == 2
    assert said in capsys.readouterr().err


def test_a_file_without_build_is_told(tmp_path, capsys):
    """The door says which function it looked for."""
    (tmp_path / "train.py").write_text("x = 1\n")
    assert door.main([str(tmp_path / "train.py")]) == 2
    assert "wants a function build" in capsys.readouterr().err


def made(loss, data, model=None, dtype=torch.float64):
    """A case of a small net, as a process has it."""
    model = model or (lambda: nn.Linear(3, 2))
    optim = lambda m: torch.optim.SGD(m.parameters(), 0.5)  # noqa: E731
    return built(Env(), lambda: (model, optim, loss, data), dtype)


def squares(model, x):
    """A mean over rows."""
    return model(x).square().mean()


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "got NoneType"),
        ((1, 2, 3), "got tuple"),
        ((nn.Linear(1, 1), None, squares, 1), "function for optim, got NoneType"),
        ((3, squares, squares, 1), "function for model, got int"),
        ((squares, squares, "loss", 1), "function for loss, got str"),
    ],
)
def test_what_build_must_return_is_told(result, words):
    """Each of the four has its own words."""
    with pytest.raises(TypeError, match=words) as failed:
        built(Env(), lambda: result, None)
    assert "build wants to return (model, optim, loss, data)" in str(failed.value)


def test_build_draws_the_same_numbers_each_time():
    """Weights and data are those of seed 0 in each process, whatever was before."""
    torch.manual_seed(7)
    one = made(squares, torch.randn(2, 3))
    first = one.made().weight
    torch.manual_seed(8)
    again = built(
        Env(), lambda: (one.model, one.optim, squares, torch.randn(2, 3)), None
    )
    other = built(
        Env(), lambda: (one.model, one.optim, squares, torch.randn(2, 3)), None
    )
    assert torch.equal(again.data, other.data)
    assert first.dtype == torch.float64
    weights = []
    for case in (again, other):  # made after build, as ranks make them
        built(Env(), lambda case=case: (case.model, case.optim, squares, X), None)
        weights.append(case.made().weight)
    assert torch.equal(*weights)


def test_a_module_is_taken_as_it_is_and_a_function_stays_one():
    """What init is given is of the user's own kind, in the dtype of the comparison."""
    module = nn.Linear(3, 2)
    assert made(squares, X, lambda: module).source is not module
    one = built(Env(), lambda: (module, squares, squares, X), torch.float64)
    assert one.source is module
    assert module.weight.dtype == torch.float64


X = torch.linspace(-1, 1, 15).reshape(5, 3)


def test_the_judge_is_the_loop_that_one_writes_by_hand():
    """Losses, gradients, norms and parameters of torch alone, step by step."""
    model = nn.Linear(3, 2).double()
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optim = torch.optim.SGD(model.parameters(), 0.5)
    judged = trace.judge(
        Env(),
        lambda: (
            lambda: nn.Linear(3, 2),
            lambda m: torch.optim.SGD(m.parameters(), 0.5),
            squares,
            X,
        ),
        3,
        torch.float64,
    )
    for step in judged:
        optim.zero_grad()
        loss = squares(model, X.double())
        loss.backward()
        assert step.loss == loss.item()
        for name, p in model.named_parameters():
            assert torch.equal(step.gradients[name], p.grad)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert step.norm == pytest.approx(norm.item(), rel=1e-12)
        optim.step()
        for name, p in model.named_parameters():
            assert torch.equal(step.parameters[name], p)


def test_batches_come_from_a_loader_a_function_or_are_one():
    """A loader's are its own in order; a function's are asked for by step."""
    loader = DataLoader(TensorDataset(X), batch_size=2)
    seen = [b[0].tolist() for b in batches(Env(), made(squares, loader), 3)]
    assert seen == [X[:2].double().tolist(), X[2:4].double().tolist(), X[4:].tolist()]
    by_step = made(squares, lambda step: X + step)
    assert [b[0, 0].item() for b in batches(Env(), by_step, 3)] == [-1.0, 0.0, 1.0]
    assert len(list(batches(Env(), made(squares, X), 2))) == 2
    assert torch.equal(whole(made(squares, loader), 1)[0], X[2:4])
    assert whole(by_step, 4)[0, 0] == 3


def test_data_without_rows_is_refused():
    """There is nothing to cut over ranks."""
    with pytest.raises(DataError, match="data has rows, got int"):
        share(Env(), 3)
    with pytest.raises(DataError, match="got dict"):
        share(Env(), {"x": torch.tensor(1.0)})


def tried(loss, data=X, model=None, tol=1e-9):
    """What one process finds of a loss."""
    model = model or (lambda: nn.Linear(3, 2))
    build = lambda: (model, lambda m: None, loss, data)  # noqa: E731
    return causes.probe(Env(), build, torch.float64, tol)


def test_a_loss_that_is_well_shows_nothing():
    """The control of what follows."""
    found = tried(squares)
    assert (found.draws, found.draws_training, found.parts) == (None, None, None)
    assert (found.couples, found.drops, found.finite, found.bare) == (
        (),
        (),
        True,
        True,
    )
    assert found.loss == found.evaluated


def test_random_numbers_are_found_in_the_mode_in_which_they_are_drawn():
    """Of the loss in both modes, of dropout in training alone; parts are not tried."""
    noisy = tried(lambda model, x: squares(model, x) + torch.rand(()))
    assert noisy.draws is not None
    assert noisy.draws_training is not None
    assert noisy.parts is None
    dropping = tried(
        squares, model=lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    )
    assert dropping.draws is None
    assert dropping.draws_training is not None
    assert dropping.drops == ("0 (Dropout)",)
    assert dropping.parts is None


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (nn.Dropout(0.0), False),
        (nn.AlphaDropout(0.1), True),
        (nn.RReLU(), True),
        (nn.GRU(3, 3, 2, dropout=0.3), True),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.MultiheadAttention(4, 2), False),
        (nn.Dropout(0.5).eval(), False),
    ],
)
def test_modules_that_draw_are_known(module, named):
    """By what they would do in training, so not in evaluation mode or at 0."""
    assert bool(causes._named(nn.Sequential(module), causes._drops)) is named


def test_parts_that_do_not_add_up_are_found():
    """A sum in place of a mean, a mean of means, rows that look at each other."""
    summed = tried(lambda model, x: model(x).square().sum())
    assert summed.parts is not None
    assert summed.bare
    coupled = tried(lambda model, x: (model(x) - model(x).mean(0)).square().mean())
    assert coupled.parts is not None
    means = tried(lambda m, x: Mean(squares(m, x), torch.tensor(1.0)))
    assert means.parts is not None  # the mean of means, of parts of 3 and 2 rows
    uneven = tried(lambda m, x: Mean(m(x).square().sum(), x.clamp(min=0).mean()))
    assert uneven.parts is not None
    assert not uneven.bare


def test_rows_that_only_pad_and_a_single_row_are_not_cut():
    """Nothing is said where nothing can be tried."""
    assert tried(lambda m, x: m(x).sum(), data=X[:1]).parts is None
    padded = mark(X.clone(), 4, 4)
    assert tried(lambda m, x: m(x).sum(), data=padded).parts is None


def test_a_loss_that_is_no_number_is_told_before_all_else():
    """No cause is looked for in nan, and the module is a question for another tool."""
    found = tried(lambda model, x: squares(model, x) * math.nan)
    assert not found.finite
    [told] = causes.sentences(found, [math.nan], 1e-9)
    assert "find_nonfinite" in told


def test_many_names_are_cut_short():
    """Five are named and the others counted."""
    assert causes._list(tuple("abcdefg")) == "a, b, c, d, e and 2 more"
    assert causes._list(("a", "b")) == "a, b"


def test_a_traceback_is_told_by_its_errors():
    """Who failed, and each error on the way, the root cause first."""
    text = (
        "rank 1 of 2 failed:\nTraceback (most recent call last):\n  File x\n"
        "KeyError: 'a'\n\nDuring handling of the above exception, another exception "
        "occurred:\n\nTraceback (most recent call last):\n  File y\nValueError: b\n"
    )
    assert _short(text).splitlines() == [
        "rank 1 of 2 failed:",
        "KeyError: 'a'",
        "ValueError: b",
    ]


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (None, None),
        ("float32", torch.float32),
        (torch.bfloat16, torch.bfloat16),
        ("double", torch.float64),
    ],
)
def test_a_dtype_is_known_by_its_name(given, dtype):
    """As torch names them; None leaves the model's own."""
    assert dtype_of(given) is dtype


def test_the_door_takes_the_functions_words():
    """Each argument of the function is a word of the door, in its own form."""
    words = "train.py --ranks 1,4 --micro 2 --kinds ddp --steps 5 --tol 1e-6"
    given = vars(door._parser().parse_args([*words.split(), "--dtype", "own"]))
    assert given == {
        "file": "train.py",
        "ranks": (1, 4),
        "micro": (2,),
        "kinds": ("ddp",),
        "steps": 5,
        "tol": 1e-6,
        "dtype": None,
        "blocks": None,
        "timeout": 120.0,
        "json": False,
    }


def test_wrong_words_for_the_function_are_wrong_use(tmp_path, capsys):
    """What check_equivalence refuses ends in code 2 as well."""
    (tmp_path / "train.py").write_text("def build():\n    raise SystemExit\n")
    assert door.main([str(tmp_path / "train.py"), "--kinds", "dpp"]) == 2
    assert "wants kinds out of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loss", "inside"),
    [
        (squares, ""),
        (lambda m, x: (m(x).square().mean(-1) * (x[:, 0] > 0).float()).mean(), ""),
        (lambda m, x: m(x).float().square().mean(), "float32"),
        (lambda m, x: m(x).to(torch.bfloat16).float().square().mean(), "bfloat16"),
    ],
)
def test_a_cast_down_is_seen_and_a_mask_is_none(loss, inside):
    """The narrowest dtype that numbers pass through; what is exact does not count."""
    build = lambda: (lambda: nn.Linear(3, 2), lambda m: None, loss, X)  # noqa: E731
    assert narrowed(Env(), build, torch.float64) == inside


def test_parameters_may_lie_further_apart():
    """Ten times the tolerance, where all else may lie once."""
    found = [parting(what, 0, 0, 5e-9) for what in ("loss", "gradient", "parameter")]
    assert [p.what for p in trace.firsts(found, 1e-9)] == ["loss", "gradient"]
    near = trace._Near(0, 0, 1e-9)
    wanted, got = {"w": torch.ones(1).double()}, {"w": torch.ones(1).double() + 5e-9}
    assert near.tensors("parameter", wanted, got).gap == pytest.approx(5e-9, rel=1e-3)
