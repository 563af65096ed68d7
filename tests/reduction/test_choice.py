"""Which structures go, given scores: floors, and structures inside others."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_bmrs.reduction.choice import Candidates, removals, with_floor

quick = settings(max_examples=200, deadline=None)


@st.composite
def layers(draw, size):
    """Scores with ties, some of it to go, some of it gone before."""
    score = draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
    kept = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    bar = draw(st.integers(-4, 4))
    scores = torch.tensor(score, dtype=torch.float64)
    kept = torch.tensor(kept)
    return Candidates(
        (scores >= bar) | ~kept, scores, kept, draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    )


@quick
@given(layers(5), layers(7))
def test_layers_that_hold_nothing_are_decided_alone(one, other):
    found = removals({"one": one, "other": other}, {})
    for name, layer in (("one", one), ("other", other)):
        alone = with_floor(layer.removed, layer.score, layer.kept, layer.least, layer.multiple)
        assert torch.equal(found[name], alone)


@quick
@given(st.data(), layers(4), layers(9), st.booleans())
def test_what_lies_inside_goes_along_and_something_stays(data, outer, inner, inner_first):
    owner = torch.tensor(data.draw(st.lists(st.integers(-1, 3), min_size=9, max_size=9)))
    given_layers = {"inner": inner, "outer": outer} if inner_first else {"outer": outer, "inner": inner}
    found = removals(given_layers, {"inner": {"outer": owner}})
    assert list(found) == list(given_layers)
    inside_of_gone = found["outer"][owner.clamp(min=0)] & (owner >= 0)
    assert not (inside_of_gone & ~found["inner"]).any()
    assert not (~inner.kept & ~found["inner"]).any()
    assert all((~removed).any() for removed in found.values())
    alone = removals({"outer": outer}, {})["outer"]
    saved = torch.nonzero(alone & ~found["outer"]).flatten()
    assert len(saved) <= 1  # by the best of what would all have gone with it
    if len(saved):
        assert inner.score[inner.kept].min() == inner.score[inner.kept & (owner == saved)].min()
    free = inner.kept & ~inside_of_gone
    asked = with_floor(inner.removed | ~free, inner.score, free, inner.least, inner.multiple)
    if free.any():
        assert torch.equal(found["inner"], asked)


@quick
@given(layers(4), layers(9))
def test_a_layer_that_is_not_asked_about_keeps_all(outer, inner):
    owner = torch.zeros(9, dtype=torch.long)
    assert torch.equal(
        removals({"inner": inner}, {"inner": {"outer": owner}})["inner"],
        removals({"inner": inner}, {})["inner"],
    )
