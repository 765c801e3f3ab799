"""Compressors written as text."""

from __future__ import annotations

import pytest

from lbgm_compress import LBGM, Atomo, ErrorFeedback, Identity, NormBudget, SignSGD, TopK
from lbgm_compress.compressors.parse import parse_compressor, parse_compressors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Identity()", Identity()),
        ("TopK(0.01)", TopK(0.01)),
        ("TopK(ratio=1e-2, values='int8')", TopK(0.01, "int8")),
        ("SignSGD(vote=True)", SignSGD(vote=True)),
        ("LBGM()", LBGM()),
        ("LBGM(TopK(0.01), NormBudget(0.1))", LBGM(TopK(0.01), NormBudget(0.1))),
        (
            "LBGM(delta=NormBudget(1e-3, local_steps=8), compare='raw')",
            LBGM(delta=NormBudget(0.001, 8), compare="raw"),
        ),
        (" LBGM( ErrorFeedback(TopK(0.01)),\n delta=0.1 ) ", LBGM(ErrorFeedback(TopK(0.01)), 0.1)),
        ("ErrorFeedback(inner=LBGM(Atomo(rank=2)))", ErrorFeedback(LBGM(Atomo(2)))),
    ],
)
def test_expression_gives_the_compressor_and_repr_gives_it_back(text, expected):
    assert parse_compressor(text) == expected
    assert parse_compressor(repr(expected)) == expected


def test_list_keeps_its_order():
    text = "TopK(0.01), LBGM(ErrorFeedback(TopK(0.01)), delta=0.1)"
    assert parse_compressors(text) == [TopK(0.01), LBGM(ErrorFeedback(TopK(0.01)), delta=0.1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("TopK(0.01", "cannot read"),
        ("TopK(0.01)] + [Identity()", "cannot read"),
        ("TopK", r"write TopK\(\.\.\.\)"),
        ("Topk(0.01)", "unknown compressor 'Topk'; known are Atomo"),
        ("TopK(2)", "ratio must be above 0 and at most 1, not 2"),
        ("TopK()", "missing 1 required positional argument: 'ratio'"),
        ("TopK(0.1, precision='int8')", "unexpected keyword argument 'precision'"),
        ("TopK(0.1 + 0.1)", "neither a literal nor a compressor"),
        ("TopK(**{'ratio': 0.1})", "unpacks arguments"),
        ("LBGM(LBGM())", "looks back itself"),
        ("NormBudget(0.1)", "NormBudget is no compressor, but an argument of LBGM"),
        ("LBGM(delta=NormBudget(-1))", "budget must be at least 0 and finite, not -1"),
        ("LBGM(x)", "is not a compressor"),
        ("__import__('os').system('false')", "is not a compressor"),
        ("TopK(__import__('os').getpid())", "is not a compressor"),
        ("(lambda: 1)()", "is not a compressor"),
        ("LBGM(" * 3000 + ")" * 3000, "too long"),
        ("LBGM(" * 500 + ")" * 500, "cannot read|looks back|recursion"),
        ("Identity(), Identity()", "expected one compressor, found 2"),
    ],
)
def test_anything_else_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_compressor(text)
    assert "\n" not in str(error.value)
