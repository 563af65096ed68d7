"""Which structures go, given scores: floors, and structures inside others."""

from dataclasses import replace

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.pruning.decision import Candidates, removals

quick = settings(max_examples=200, deadline=None)


def inside(owner, enclosed):
    """The nesting of a layer `inner` in a layer `outer`."""
    return Nesting({"inner": {"outer": owner}}, {"outer": enclosed.bool()})


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
    found = removals({"one": one, "other": other}, Nesting())
    for name, layer in (("one", one), ("other", other)):
        assert torch.equal(found[name], layer.decided())


@quick
@given(st.data(), layers(4), layers(9), st.booleans())
def test_what_lies_inside_goes_along_and_something_stays(data, outer, inner, inner_first):
    owner = torch.tensor(data.draw(st.lists(st.integers(-1, 3), min_size=9, max_size=9)))
    given_layers = {"inner": inner, "outer": outer} if inner_first else {"outer": outer, "inner": inner}
    found = removals(given_layers, inside(owner, torch.zeros(4)))
    assert list(found) == list(given_layers)
    inside_of_gone = found["outer"][owner.clamp(min=0)] & (owner >= 0)
    assert not (inside_of_gone & ~found["inner"]).any()
    assert not (~inner.kept & ~found["inner"]).any()
    assert all((~removed).any() for removed in found.values())
    alone = removals({"outer": outer}, Nesting())["outer"]
    saved = torch.nonzero(alone & ~found["outer"]).flatten()
    assert len(saved) <= 1  # by the best of what would all have gone with it
    if len(saved):
        assert inner.score[inner.kept].min() == inner.score[inner.kept & (owner == saved)].min()
    free = inner.kept & ~inside_of_gone
    asked = replace(inner, kept=free).decided()
    if free.any():
        assert torch.equal(found["inner"], asked)


@quick
@given(layers(4), layers(9))
def test_a_layer_that_is_not_asked_about_keeps_all(outer, inner):
    owner = torch.zeros(9, dtype=torch.long)
    assert torch.equal(
        removals({"inner": inner}, inside(owner, torch.ones(4)))["inner"],
        removals({"inner": inner}, Nesting())["inner"],
    )
    assert torch.equal(
        removals({"outer": outer}, inside(owner, torch.ones(4)))["outer"],
        removals({"outer": outer}, Nesting())["outer"],
    )


@quick
@given(st.data(), layers(4), layers(9))
def test_what_is_read_no_more_goes_but_for_the_floor(data, outer, inner):
    owner = torch.tensor(data.draw(st.lists(st.integers(-1, 3), min_size=9, max_size=9)))
    enclosed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=4, max_size=4)))
    # what has gone took along what lay inside of it
    there = inner.kept & (outer.kept[owner.clamp(min=0)] | (owner < 0))
    assume(there.any())
    inner = replace(inner, kept=there, removed=inner.removed | ~there)
    found = removals({"outer": outer, "inner": inner}, inside(owner, enclosed))
    read = torch.zeros(5, dtype=torch.bool).index_fill(0, owner[~found["inner"]], True)[:4]
    stays = ~found["outer"]
    unread = stays & enclosed & ~read
    if unread.any():
        others = int((stays & ~unread).sum())
        assert int(stays.sum()) <= -(-max(others, outer.least) // outer.multiple) * outer.multiple
    if not enclosed.any():
        without = removals({"outer": outer, "inner": inner}, inside(owner, torch.zeros(4)))
        assert all(torch.equal(found[site], without[site]) for site in found)


def test_a_chain_of_structures_inside_structures_goes_as_a_whole():
    def all_stay(size):
        return torch.zeros(size, dtype=torch.bool)

    outer, middle, inner = (
        Candidates(all_stay(size), -torch.ones(size), ~all_stay(size)) for size in (2, 4, 8)
    )
    gone = torch.arange(8) < 4  # all of the first two of the middle, which are all of the first outer one
    nesting = Nesting(
        {
            "middle": {"outer": torch.arange(4) // 2},
            "inner": {"outer": torch.arange(8) // 4, "middle": torch.arange(8) // 2},
        },
        {"outer": torch.tensor([True, True]), "middle": torch.tensor([True] * 4)},
    )
    found = removals(
        {"outer": outer, "middle": middle, "inner": Candidates(gone, inner.score, inner.kept)}, nesting
    )
    assert {site: torch.nonzero(removed).flatten().tolist() for site, removed in found.items()} == {
        "outer": [0], "middle": [0, 1], "inner": [0, 1, 2, 3],
    }  # fmt: skip
