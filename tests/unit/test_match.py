"""blocks is a glob over names, a class, a predicate, or several of them."""

import pytest
from torch import nn

from accelx.match import globs, select


def net():
    """Layers in layers."""
    inner = lambda: nn.Sequential(nn.Linear(1, 1), nn.ReLU())  # noqa: E731
    return nn.ModuleDict(
        {"layers": nn.ModuleList([inner(), inner()]), "head": nn.Linear(1, 1)}
    )


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("layers.*", "layers.0", True),
        ("layers.*", "layers.0.0", False),  # one part
        ("layers.*", "layers", False),
        ("layers.**", "layers.0.0", True),
        ("layers.**", "layers", True),  # no part is a number of parts
        ("**.0", "layers.1.0", True),
        ("**.0", "0", True),
        ("**", "a.b.c", True),
        ("*.attn", "h.attn", True),
        ("*.attn", "h.attn_norm", False),
        ("h?.x", "h1.x", True),
        ("h[01].x", "h2.x", False),
        ("**.mlp.**.w", "a.mlp.b.c.w", True),
        ("**.mlp.**.w", "a.b.c.w", False),
        ("Head", "head", False),
    ],
)
def test_globs_are_over_parts(pattern, name, fits):
    """A star stays within one part of the name, two are any number of parts."""
    assert globs(pattern, name) is fits


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        (None, []),
        ("layers.*", ["layers.0", "layers.1"]),
        (nn.Sequential, ["layers.0", "layers.1"]),
        (nn.Linear, ["layers.0.0", "layers.1.0", "head"]),
        (
            lambda name, module: name.endswith("1"),
            ["layers.0.1", "layers.1", "layers.1.1"],
        ),
        (["head", nn.ReLU], ["layers.0.1", "layers.1.1", "head"]),
        (("layers.0", "layers.*"), ["layers.0", "layers.1"]),
    ],
)
def test_selection_is_in_the_models_order_and_once(blocks, names):
    """Outermost first, whatever the order of the selectors; never the root."""
    model = net()
    found = select(model, blocks)
    assert [name for name, _ in found] == names
    assert all(model.get_submodule(name) is module for name, module in found)


@pytest.mark.parametrize(
    "blocks", ["layer.*", nn.Conv2d, ["head", "layer.*"], lambda n, m: 0]
)
def test_a_selector_that_takes_nothing_is_an_error(blocks):
    """Each one of several, with names that there are."""
    with pytest.raises(ValueError, match=r"matches no module of ModuleDict.*'layers"):
        select(net(), blocks)
