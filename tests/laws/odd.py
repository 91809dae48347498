"""A model of odd sizes and every dtype, and all that a state of it holds, in full."""

from collections import Counter
from collections.abc import Mapping

import attrs
import torch
from torch import nn
from torch.nn import functional as F

from accelx.optimizers import param_groups
from accelx.state import is_saved
from tests.laws.training import local as local, whole

WIDTH = 6  # rows on 4 ranks: 2, 2, 2, 0
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
INTEGERS = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)
COMPLEX = (torch.complex64, torch.complex128)


class Odd(nn.Module):
    """Weights of 6, 5, 1 and 0 rows, tied and frozen ones, and a buffer of each dtype.

    `copied` adds weights that fsdp2 cannot train: without dims, without rows, or not
    contiguous.
    """

    def __init__(self, copied):
        super().__init__()
        self.up = nn.Linear(WIDTH, 5)
        self.down = nn.Linear(5, WIDTH)
        self.again = nn.Linear(WIDTH, 5)
        self.again.weight = self.up.weight
        self.one = nn.Parameter(torch.randn(1))
        self.column = nn.Parameter(torch.randn(7, 1))
        self.cube = nn.Parameter(torch.randn(3, 2, 2))
        self.void = nn.Parameter(torch.randn(0, 3), requires_grad=False)
        self.fixed = nn.Parameter(torch.randn(3, 2), requires_grad=False)
        self.kept = nn.Linear(3, 2).requires_grad_(False)
        if copied:
            self.scale = nn.Parameter(torch.randn(()))
            self.none = nn.Parameter(torch.randn(0, 3))
            self.oblique = nn.Parameter(torch.randn(2, 3, 4).transpose(0, 2))
        for dtype in (*REAL, *EIGHT, *INTEGERS, *COMPLEX):
            name = str(dtype).replace("torch.", "of_")
            self.register_buffer(name, drawn(dtype, (2, 3)))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("nothing", torch.empty(2, 0))
        self.register_buffer("turned", torch.randn(4, 3).T)
        self.register_buffer("passing", torch.randn(3), persistent=False)

    def forward(self, x):
        y = self.down(torch.tanh(self.up(x))) + self.down(self.again(x))
        rest = [self.one, self.column, self.cube]
        if hasattr(self, "scale"):
            rest += [self.scale, self.none, self.oblique]
        return y + sum(F.softplus(p).sum() for p in rest)


def drawn(dtype, shape):
    """Bytes of any pattern, as `dtype`; bools are 0 or 1."""
    width = torch.empty(0, dtype=dtype).element_size()
    shape = (*shape[:-1], shape[-1] * width)
    high = 2 if dtype is torch.bool else 256
    return torch.randint(high, shape, dtype=torch.uint8).view(dtype)


def loss(model, x):
    """A mean over rows."""
    return model(x).square().mean()


def batch(k):
    """Twelve rows, the same for everyone."""
    draw = torch.Generator().manual_seed(k)
    return torch.randn(12, WIDTH, generator=draw, dtype=torch.float64)


@attrs.frozen
class Settings:
    """A record as a pass keeps it in its slot."""

    rate: float
    _names: tuple = ()


def adamw(model):
    """Two groups, of which one has options of its own."""
    groups = {"**.bias": {"weight_decay": 0.0, "betas": (0.8, 0.9)}, "**": {}}
    return torch.optim.AdamW(param_groups(model, groups), lr=1e-2, amsgrad=True)


def sgd(model):
    """Momentum, and a learning rate that is a tensor."""
    rate = torch.tensor(1e-2)
    return torch.optim.SGD(trained(model), rate, momentum=0.9, nesterov=True)


def several(model):
    """Two optimizers whose state has scalars beside tensors."""
    first, *rest = trained(model)
    return [torch.optim.NAdam(rest, 1e-3), torch.optim.ASGD([first], 1e-3)]


def adafactor(model):
    """State of other shapes than the weights'; FSDP2 cannot run it."""
    some = [p for p in trained(model) if p.numel()]  # it divides by their number
    empty = [p for p in trained(model) if not p.numel()]
    return [torch.optim.Adafactor(some, 1e-2), torch.optim.SGD(empty, 1e-2)]


def trained(model):
    """The weights that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def described(state, view=whole):
    """All that a checkpoint must keep of a state, tensors as `view` gives them."""
    names = {id(p): n for n, p in state.model.named_parameters()}
    found = {"step": state.step, "skipped": state.skipped}
    for name, tensor in state.model.state_dict().items():
        found[f"model.{name}"] = view(tensor).clone()
    for i, optimizer in enumerate(state.optimizers):
        for p, held in optimizer.state.items():
            found[f"optim.{i}.{names[id(p)]}"] = viewed(held, view)
        for k, group in enumerate(optimizer.param_groups):
            params = [names[id(p)] for p in group["params"]]
            found[f"optim.{i}.group.{k}"] = viewed({**group, "params": params}, view)
    for name, slot in state.slots.items():
        if is_saved(slot):
            found[f"slots.{name}"] = viewed(slot, view)
    return found


def viewed(value, view):
    """A copy of `value` with each tensor in it as `view` gives it."""
    if isinstance(value, torch.Tensor):
        return view(value).clone()
    if isinstance(value, Mapping):
        each = {k: viewed(v, view) for k, v in value.items()}
        return each if type(value) is dict else [type(value).__name__, each]
    if isinstance(value, list | tuple):
        return type(value)(viewed(v, view) for v in value)
    if attrs.has(type(value)):
        return [type(value).__name__, viewed(attrs.asdict(value, recurse=False), view)]
    if hasattr(value, "state_dict"):
        return [type(value).__name__, viewed(value.state_dict(), view)]
    return value


def differing(wanted, got):
    """Names under which two descriptions are not the same to the bit."""
    return sorted(
        name
        for name in {*wanted, *got}
        if name not in wanted or name not in got or not same(wanted[name], got[name])
    )


def same(a, b):
    """Whether two values are equal in type, order and every bit; nan is itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        alike = (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        return alike and torch.equal(bits(a), bits(b))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def bits(tensor):
    """The bytes of a tensor."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Tally:
    """An object of a user's, with a state of tensors and counts."""

    def __init__(self, count=0):
        self.count, self.sums = count, torch.full((2,), float(count))

    def state_dict(self):
        """What must be kept."""
        return {"count": self.count, "sums": self.sums}

    def load_state_dict(self, kept):
        """Take what was kept."""
        self.count, self.sums = kept["count"], kept["sums"]


def slot(count):
    """What a slot may hold: a kind of everything, with other numbers for each count."""
    number = float(count)
    return {
        "record": Settings(number / 3, (count,)),
        "object": Tally(count),
        "tensors": [torch.arange(count), torch.tensor(number), drawn(EIGHT[0], (3,))],
        "plain": (None, True, count, number, -0.0, "text", b"\x00\xff", torch.bfloat16),
        "odd numbers": [float("nan"), float("inf"), -float("inf"), 2**80 + count],
        "keys": {3: "three", "3": 3, None: (), True: [], 0.5: {"$": count, ".": {}}},
        "order": {"z": 1, "a": {"y": 2, "b": 3}},
        "counter": Counter({"b": count, "a": 1}),
    }


class Own(torch.Tensor):
    """A tensor of a class of its own."""
