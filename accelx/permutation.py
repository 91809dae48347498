"""Which item stands at which position of a shuffled epoch, for any position at once.

A keyed bijection on [0, n): a Feistel network over just enough bits, walked along its
cycles until it falls below n. Nothing is stored, so position 10**9 costs as much as 0.
Up to 4096 items are sorted by a keyed hash instead: a network over a few bits does not
reach all n! orders equally often (at n = 5 not even with 12 rounds), sorting does.

Order version 1, fixed for good by golden values in the tests; all modulo 2**64:

    mix(x)      x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27;
                x *= 0x94D049BB133111EB; x ^= x >> 31                  (splitmix64)
    key(p...)   k = 0; for each p: k = mix((k ^ p) + 0x9E3779B97F4A7C15)
    base        key(1, n, seed, epoch)
    n <= 4096   indices i by mix(i + base), as signed numbers, ascending
    n > 4096    2**bits >= n, the least such; the high half has bits // 2, low the rest
                round r = 0 .. 7: a, b = mix(base + 2 r + 1) | 1, mix(base + 2 r + 2)
                f(x, w) = top w bits of a * x + b
                even r: high ^= f(low, its bits); odd r: low ^= f(high, its bits)

Black, Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5;
f is Dietzfelbinger's multiply-shift hash (1996), pairwise independent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelx.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

ORDER_VERSION = 1  # another order for the same (n, seed, epoch) needs another number

ROUNDS = 8
SORTED = 4096  # items up to which an order is sorted: at most 32 KiB, about 0.2 ms
FEW = 16  # values that are walked one by one, 3 us a pass; as a tensor 60 us
MAX = 2**62  # both halves then have 31 bits, and nothing leaves int64
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB


def permute(n: int, seed: int, epoch: int, positions: Tensor) -> Tensor:
    """The indices that stand at `positions` of the shuffled order of `epoch`.

    `positions` and the result are int64 of any one shape, on the CPU, with values in
    [0, n); n is at most 2**62. Law: over all positions each index comes exactly once.
    Memory is that of `positions`. Raises DataError if n, seed or epoch is out of range.
    """
    check_seed(seed)
    if not 1 <= n <= MAX:
        raise DataError(
            f"a shuffled order needs 1 to 2**62 items, got {n}; split the dataset"
        )
    if epoch < 0:
        raise DataError(f"epoch must be at least 0, got {epoch}; count epochs from 0")
    base = key(ORDER_VERSION, n, seed, epoch)
    flat = positions.reshape(-1)
    out = _sorted(n, base)[flat] if n <= SORTED else _network(n, base, flat)
    return out.view(positions.shape)


def key(*parts: int) -> int:
    """A number in [0, 2**64) that depends on every part and on their order."""
    state = 0
    for part in parts:
        state = _mix((state ^ (part & MASK)) + GOLDEN)
    return state


def check_seed(seed: int) -> None:
    """Refuse what is no integer of 64 bits: two such seeds would give one order."""
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(
            f"seed must be an integer in [-2**63, 2**63), got {seed!r}; write seed=0"
        )


def _mix(x: int) -> int:
    x &= MASK
    x = ((x ^ (x >> 30)) * MIX1) & MASK
    x = ((x ^ (x >> 27)) * MIX2) & MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    x &= MASK
    return x - 2**64 if x >= 2**63 else x


def _sorted(n: int, base: int) -> Tensor:
    import torch  # not loaded by a bare `import accelx`

    return hashed(base, torch.arange(n)).argsort(stable=True)


def hashed(base: int, positions: Tensor) -> Tensor:
    """mix(position + base) as int64: 64 bits that look random, of the same shape."""
    x = positions + _signed(base)  # int64 wraps, as modulo 2**64 does
    x = (x ^ _shift(x, 30)).mul_(_signed(MIX1))
    x = (x ^ _shift(x, 27)).mul_(_signed(MIX2))
    return x ^ _shift(x, 31)


def uniform(base: int, positions: Tensor) -> Tensor:
    """A number of (0, 1) for each position, float64, of the same shape.

    The top 52 bits of the hash and a half, so that neither end is reached.
    """
    return _shift(hashed(base, positions), 12).double().add_(0.5).mul_(2.0**-52)


def _shift(x: Tensor, by: int) -> Tensor:
    """x >> by without the sign: the top 64 - by bits as a number of at least 0."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _network(n: int, base: int, positions: Tensor) -> Tensor:
    import torch

    bits = (n - 1).bit_length()
    words = [
        (_signed(_mix(base + 2 * r + 1) | 1), _signed(_mix(base + 2 * r + 2)))
        for r in range(ROUNDS)
    ]
    added = torch.tensor([b for _, b in words], device=positions.device).unbind()
    keys = [(a, b) for (a, _), b in zip(words, added, strict=True)]
    out = _feistel(positions, bits, keys)
    if n == 1 << bits:
        return out
    over = (out >= n).nonzero().view(-1)
    if over.numel() > FEW and (1 << bits) - n <= out.numel():
        return out.index_copy_(0, over, _leapt(out[over], n, bits, keys))
    where, values = _walk(out, over, n, bits, keys)
    ended = [_ended(value, n, bits, words) for value in values.tolist()]
    return out.index_copy_(0, where, values.new_tensor(ended))


def _feistel(x: Tensor, bits: int, keys: list[tuple[int, Tensor]]) -> Tensor:
    """One pass over [0, 2**bits); `x` is left as it is."""
    import torch

    low_bits, high_bits = bits - bits // 2, bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << high_bits) - 1
    low, high = x & low_mask, x >> low_bits
    for r, (a, b) in enumerate(keys):  # in few operations, each of which takes 1 us
        if r % 2 == 0:
            drawn = torch.add(b, low, alpha=a).bitwise_right_shift_(64 - high_bits)
            high ^= drawn.bitwise_and_(high_mask)
        else:
            drawn = torch.add(b, high, alpha=a).bitwise_right_shift_(64 - low_bits)
            low ^= drawn.bitwise_and_(low_mask)
    return high.bitwise_left_shift_(low_bits).bitwise_or_(low)


def _ended(x: int, n: int, bits: int, words: list[tuple[int, int]]) -> int:
    """The next number below n on the cycle of a single one, by the same passes."""
    low_bits, high_bits = bits - bits // 2, bits // 2
    while x >= n:
        low, high = x & ((1 << low_bits) - 1), x >> low_bits
        for r, (a, b) in enumerate(words):
            if r % 2 == 0:
                high ^= ((low * a + b) & MASK) >> (64 - high_bits)
            else:
                low ^= ((high * a + b) & MASK) >> (64 - low_bits)
        x = high << low_bits | low
    return x


def _leapt(values: Tensor, n: int, bits: int, keys: list[tuple[int, Tensor]]) -> Tensor:
    """The next below n on the cycle of each of `values`, which are at least n.

    One pass says where each number from n on goes; each turn then doubles how far.
    """
    import torch

    beyond = torch.arange(n, 1 << bits, device=values.device)
    leaps, at = _feistel(beyond, bits, keys), values - n
    while bool((leaps[at] >= n).any()):
        over = (leaps >= n).nonzero().view(-1)
        leaps.index_copy_(0, over, leaps[leaps[over] - n])
    return leaps[at]


def _walk(
    out: Tensor, where: Tensor, n: int, bits: int, keys: list[tuple[int, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Replace values of at least n, at `where`, by the next below n on their cycle.

    In place. The last few are left: where they stand, and how far they have come.
    """
    values = out[where]
    while where.numel() > FEW:
        values = _feistel(values, bits, keys)
        out.index_copy_(0, where, values)
        left = (values >= n).nonzero().view(-1)
        where, values = where[left], values[left]
    return where, values
