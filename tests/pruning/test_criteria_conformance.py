"""One conformance test over every criterion: one signature, finite scores, one meaning of the sign."""

import pytest
import torch

from pyro_bmrs import BMRS_N, BMRS_U, SNR, ExpectedScale, LogUniform, Random, TruncatedLogNormal, WeightNorm
from pyro_bmrs.pruning import CriterionError, EvidenceCriterion
from pyro_bmrs.pruning.criteria import parse_criterion, text_of
from pyro_bmrs.pruning.layers import LayerStructures
from pyro_bmrs.pruning.scoring import check_criterion, scores_of

CRITERIA = [
    BMRS_N(), BMRS_N(prior_log_odds=0.0), BMRS_N(scale=0.1, loc=-15.0), BMRS_U(), BMRS_U(bits=4, floor_bits=23),
    SNR(), ExpectedScale(), WeightNorm(0.4), Random(0.4, 3),
]  # fmt: skip


def layers(dtype=torch.float32):
    """Two layers: from clearly needed (θ near 1) to clearly idle (the prior's lower edge)."""
    loc = torch.tensor([-0.01, -0.5, -6.0, -25.0, 1.5], dtype=dtype)
    scale = torch.tensor([0.01, 0.1, 4.0, 3.0, 0.3], dtype=dtype)

    def layer(shift):
        return LayerStructures(
            posterior=TruncatedLogNormal(loc + shift, scale),
            prior=LogUniform(torch.tensor(-20.0), torch.tensor(0.0)),
            kept=torch.ones(5, dtype=torch.bool),
            weight_norm=lambda: torch.tensor([5.0, 4.0, 2.0, 0.1, 6.0]) + shift,
        )

    return {"first": layer(0.0), "second": layer(-0.003)}


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conformance(criterion, dtype):
    given = layers(dtype)
    scores = criterion(given)
    check_criterion(criterion)
    assert parse_criterion(text_of(criterion), getattr(criterion, "prior_log_odds", None)) == criterion
    assert {name: len(score) for name, score in scores_of(given, scores).items()} == {
        "first": 5,
        "second": 5,
    }
    assert isinstance(criterion.unit, str)
    assert set(scores) == set(given)
    for name, score in scores.items():
        assert score.shape == (5,)
        assert score.dtype == torch.float64
        assert torch.isfinite(score).all()
        assert torch.equal(score, criterion(given)[name])  # the same again
    # printed so that it can be read back as Python
    assert eval(str(criterion)) == criterion
    with pytest.raises(AttributeError):  # a criterion does not change under a plan
        criterion.unit2 = 1
    # a spike elsewhere, or an interval that leaves the lower edge out, is asked about another place
    elsewhere = getattr(criterion, "loc", None) or getattr(criterion, "floor_bits", None)
    if not isinstance(criterion, Random) and not elsewhere:
        first = scores["first"]
        assert first[3] >= 0 > first[0]
        assert first[3] > first[1]


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if isinstance(c, EvidenceCriterion)], ids=str)
def test_evidence_is_score_less_log_odds(criterion):
    change, score = criterion.log_evidence_change(layers()), criterion(layers())
    for name in change:
        torch.testing.assert_close(
            score[name] - change[name], torch.full((5,), criterion.prior_log_odds).double()
        )


def test_a_posterior_that_learned_nothing_sits_on_the_fence():
    """Its ΔF is near 0, so the prior log-odds decide: 0 keeps it, the released code's 0.919 removes it."""
    q = TruncatedLogNormal(torch.tensor([-5.0]), torch.tensor([15.0]))
    idle = {"a": LayerStructures(q, LogUniform(), torch.ones(1, dtype=torch.bool), lambda: torch.ones(1))}
    assert float(BMRS_N(prior_log_odds=0.0)(idle)["a"]) == pytest.approx(-0.38, abs=0.005)
    assert float(BMRS_N()(idle)["a"]) > 0


def test_the_deadest_unit_needs_the_whole_interval():
    """ΔF = -9.3 with a' = 2^-23 at loc = -20, scale = 1 (paper notes); a' = a removes it."""
    q = TruncatedLogNormal(torch.tensor([-20.0]), torch.tensor([1.0]))
    dead = {"a": LayerStructures(q, LogUniform(), torch.ones(1, dtype=torch.bool), lambda: torch.ones(1))}
    assert float(BMRS_U(8, floor_bits=23, prior_log_odds=0.0)(dead)["a"]) == pytest.approx(-9.3, abs=0.05)
    assert float(BMRS_U(8, prior_log_odds=0.0)(dead)["a"]) > 0


@pytest.mark.parametrize("kind", [Random, WeightNorm])
@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.1, 1), (0.5, 5), (1.0, 10)])
def test_fractions_are_of_all_structures(kind, fraction, expected):
    scores = kind(fraction)(layers())
    assert sum(int((score >= 0).sum()) for score in scores.values()) == expected


def test_a_fraction_of_equal_weights_is_no_more():
    """Of 10 equal structures a quarter goes, not all: ties are broken by order."""
    equal = {
        name: LayerStructures(layer.posterior, layer.prior, layer.kept, lambda: torch.ones(5))
        for name, layer in layers().items()
    }
    scores = torch.cat([*WeightNorm(0.25)(equal).values()])
    assert (scores >= 0).tolist() == [True, True] + [False] * 8


def test_a_plain_function_is_a_criterion():
    def narrow(given):
        return {name: layer.posterior.scale for name, layer in given.items()}

    check_criterion(narrow)
    assert text_of(narrow).endswith("narrow")
    assert scores_of(layers(), narrow(layers()))["first"].dtype == torch.float64


@pytest.mark.parametrize(
    "wrong",
    [
        None, [torch.ones(5)], {"first": torch.ones(5)}, {"first": torch.ones(5), "second": torch.ones(4)},
        {"first": [1.0] * 5, "second": torch.ones(5)}, {"first": torch.ones(5), "other": torch.ones(5)},
        {"first": torch.ones(5, 1), "second": torch.ones(5)}, {"first": 1j * torch.ones(5), "second": torch.ones(5)},
    ],
    ids=lambda wrong: str(wrong)[:30],
)  # fmt: skip
def test_a_wrong_return_is_one_clear_error(wrong):
    message = (
        r"criterion must return a tensor of scores for each layer, of the sizes {'first': 5, 'second': 5}"
    )
    with pytest.raises(CriterionError, match=message):
        scores_of(layers(), wrong)


def test_random_follows_its_seed():
    one, two = Random(0.5, 1)(layers())["first"], Random(0.5, 2)(layers())["first"]
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BMRS_N(scale=0.0), "scale must be positive and finite: got 0.0"),
        (lambda: BMRS_N(prior_log_odds=float("nan")), "prior_log_odds must be finite"),
        (lambda: BMRS_N(loc=float("inf")), "loc must be finite or None"),
        (lambda: BMRS_U(bits=8, floor_bits=4), "floor_bits must be above bits=8"),
        (lambda: SNR(-1.0), "threshold must be positive"),
        (lambda: ExpectedScale(1.0), "between 0 and 1"),
        (lambda: WeightNorm(1.5), r"fraction must be in \[0, 1\]"),
        (lambda: Random(0.5, -1), "seed must be"),
        (lambda: parse_criterion("BMRS"), "criterion must be one of.*got 'BMRS'"),
        (lambda: parse_criterion("SNR:level=2"), "SNR takes threshold: got 'level=2'"),
        (lambda: parse_criterion("SNR:threshold=x"), "needs a number for threshold: got 'x'"),
        (lambda: parse_criterion("SNR", prior_log_odds=0.0), "prior_log_odds goes with"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_criteria_are_read_from_text():
    assert parse_criterion("BMRS_N", 0.5) == BMRS_N(prior_log_odds=0.5)
    assert parse_criterion("BMRS_U:bits=4,floor_bits=23") == BMRS_U(4, 23)
    assert parse_criterion("Random:fraction=0.25,seed=7") == Random(0.25, 7)
