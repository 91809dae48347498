"""Reinforcement learning: PPO balances a pole, with simulations divided over ranks.

    python -m accelx.spawn -n 2 examples/ppo.py    any number of ranks
    python examples/ppo.py                         one process, the same numbers
    python examples/ppo.py 10                      fewer rounds than 25

Two losses: two calls of `grads`, one of `apply`.
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam

import accelx as ax

POLES, STEPS, PASSES, DISCOUNT, TRACE, RANGE = 48, 64, 4, 0.99, 0.95, 0.2

rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 25
env = ax.connect()
ax.seed(env, 0)
# An action is a choice: rounding may not turn it, so the numbers are doubles.
torch.set_default_dtype(torch.float64)

dice = torch.Generator().manual_seed(0)  # the same on all ranks: each takes its poles


def draw(*shape):
    """Uniform in 0 to 1, for this rank's poles."""
    return ax.split(env, torch.rand(POLES, *shape, generator=dice))


def fresh():
    """Carts at rest, nearly: (poles, 4) position, speed, angle, turning."""
    return 0.1 * draw(4) - 0.05


def push(cart, right):
    """0.02 s later: Barto, Sutton, Anderson 1983, in the form that Gymnasium uses."""
    _, v, angle, turn = cart.unbind(-1)
    sin, cos = angle.sin(), angle.cos()
    force = (20.0 * right - 10.0 + 0.05 * turn**2 * sin) / 1.1
    spin = (9.8 * sin - cos * force) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    speed = force - 0.05 * spin * cos / 1.1
    rates = torch.stack([v, speed, turn, spin], dim=-1)
    cart = cart + 0.02 * rates
    return cart, (cart[:, 0].abs() > 2.4) | (cart[:, 2].abs() > 12 / 180 * math.pi)


class Player(nn.Module):
    """A policy, (..., 4) -> (..., 2) logits, and a value, (..., 4) -> (..., 1)."""

    def __init__(self):
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        self.value = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, part, cart):
        return getattr(self, part)(cart)


def play(model, cart):
    """STEPS steps of this rank's poles: what was seen, done and gained."""
    seen, done, logs, worth, fell = [], [], [], [], []
    for _ in range(STEPS):
        log, value = model("policy", cart).log_softmax(-1), model("value", cart)[:, 0]
        right = (draw() < log[:, 1].exp()).long()
        after, down = push(cart, right)
        seen.append(cart), done.append(right), logs.append(log)
        worth.append(value), fell.append(down)
        cart = torch.where(down[:, None], fresh(), after)
    worth.append(model("value", cart)[:, 0])
    gain, gains = torch.zeros(len(cart)), []
    for t in reversed(range(STEPS)):  # Schulman et al. 2016, equation 16
        goes_on = DISCOUNT * ~fell[t]
        gain = 1.0 + goes_on * worth[t + 1] - worth[t] + goes_on * TRACE * gain
        gains.append(gain)
    gains = torch.stack(gains[::-1], dim=1)
    seen, done, logs, worth = (
        torch.stack(kept, dim=1) for kept in (seen, done, logs, worth[:-1])
    )
    return cart, (seen, done, logs, gains, gains + worth), torch.stack(fell).sum()


def normal(gains):
    """Mean 0 and deviation 1 over the poles of all ranks."""
    count = gains.numel()
    first, second = ax.reduce(
        env, (ax.Mean(gains.sum(), count), ax.Mean(gains.square().sum(), count))
    )
    return (gains - first.value) / (second.value - first.value**2).sqrt()


def policy_loss(model, seen, done, logs, gains, _):
    """Schulman et al. 2017, equation 7."""
    at = done[..., None]
    new = model("policy", seen).log_softmax(-1)
    ratio = (new.gather(-1, at) - logs.gather(-1, at))[..., 0].exp()
    cut = ratio.clamp(1 - RANGE, 1 + RANGE)
    return -torch.minimum(ratio * gains, cut * gains).mean()


def value_loss(model, seen, done, logs, gains, returns):
    return 0.5 * F.mse_loss(model("value", seen)[..., 0], returns)


tx = ax.chain(ax.shard_model(env, unused="allow"), ax.clip(0.5))
state = ax.init(tx, Player, lambda m: Adam(m.parameters(), 3e-3))
policy, value = ax.grads(tx, policy_loss), ax.grads(tx, value_loss)
update = ax.apply(tx)

cart = fresh()
for turn in range(rounds):
    with ax.evaluating(state) as model:
        cart, (seen, done, logs, gains, returns), falls = play(model, cart)
    batch = seen, done, logs, normal(gains), returns
    for _ in range(PASSES):
        state, _ = policy(state, *batch)
        state, out = value(state, *batch)
        state, out = update(state, out)
    length = POLES * STEPS / max(1, int(ax.reduce(env, falls, "sum")))
    if env.main and (turn + 1) % 5 == 0:
        print(f"round {turn + 1}: a fall every {length:.2f} steps")
if env.main:
    print(f"value loss {out.loss:.5f}, a fall every {length:.2f} steps")
