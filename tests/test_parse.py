"""Compressors written as text."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from lbgm_compress import (
    LBGM,
    Atomo,
    ErrorFeedback,
    Identity,
    NormBudget,
    SignSGD,
    TopK,
    parse_compressor,
)
from lbgm_compress.compressors.parse import import_known, parse_compressors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Identity()", Identity()),
        ("TopK(0.01)", TopK(0.01)),
        ("TopK(ratio=1e-2, values='int8')", TopK(0.01, "int8")),
        ("TopK(1e-2, chunk=4096)", TopK(0.01, chunk=4096)),
        ("SignSGD(vote=True)", SignSGD(vote=True)),
        ("LBGM()", LBGM()),
        ("LBGM(TopK(0.01), NormBudget(0.1))", LBGM(TopK(0.01), NormBudget(0.1))),
        (
            "LBGM(delta=NormBudget(1e-3, local_steps=8), compare='raw')",
            LBGM(delta=NormBudget(0.001, 8), compare="raw"),
        ),
        (" LBGM( ErrorFeedback(TopK(0.01)),\n delta=0.1 ) ", LBGM(ErrorFeedback(TopK(0.01)), 0.1)),
        ("ErrorFeedback(inner=LBGM(Atomo(rank=2)))", ErrorFeedback(LBGM(Atomo(2)))),
        ("ErrorFeedback(TopK(0.01), 0.95)", ErrorFeedback(TopK(0.01), decay=0.95)),
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
        ("TopK(0.1, chunk=0)", "chunk must be a whole number of at least 1, not 0"),
        ("ErrorFeedback(TopK(0.1), decay=2)", "decay must be above 0 and at most 1, not 2"),
        ("TopK()", "missing 1 required positional argument: 'ratio'"),
        ("TopK(0.1, precision='int8')", "unexpected keyword argument 'precision'"),
        ("TopK(0.1 + 0.1)", "neither a literal nor a compressor"),
        ("TopK(**{'ratio': 0.1})", "unpacks arguments"),
        ("LBGM(LBGM())", "looks back itself"),
        ("NormBudget(0.1)", "NormBudget is no compressor, but an argument of LBGM"),
        ("LBGM(delta=NormBudget(-1))", "budget must be at least 0 and finite, not -1"),
        ("LBGM(Mine(0.1))", r"passed as known=\[Mine\] \(--known MODULE:Mine on a command line\)"),
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


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An argument of a compressor that is not one."""

    warmup: int


@dataclasses.dataclass(frozen=True, repr=False)
class Mine(Identity):
    """A compressor that the package does not know."""

    schedule: Schedule | None = None


def test_classes_of_ones_own_are_known_by_name():
    known = [Mine, Schedule]
    mine = Mine(Schedule(3))
    assert parse_compressor("Mine()", known=[Mine]) == Mine()
    assert parse_compressor(repr(LBGM(mine)), known) == LBGM(mine)
    assert parse_compressors("TopK(0.1), ErrorFeedback(Mine(Schedule(warmup=3)))", known) == [
        TopK(0.1),
        ErrorFeedback(mine),
    ]
    assert parse_compressor("TopK(0.1)", known=[TopK, Mine, Mine]) == TopK(0.1)
    for text, message in [
        (
            "Other()",
            "known are Atomo, .*, NormBudget, .*, TopK, Mine, Schedule; a class of your own",
        ),
        ("Schedule(3)", "Schedule is no compressor, but an argument of one; .*, TopK, Mine$"),
        ("Mine(warmup=3)", "unexpected keyword argument 'warmup'"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_compressor(text, known)


def test_known_takes_classes_of_different_names():
    for wrong in (Mine(), "Mine", len):
        with pytest.raises(TypeError, match=r"known takes classes, as in known=\[RandomK\], not"):
            parse_compressor("Identity()", known=[wrong])
    with pytest.raises(ValueError, match="a name that lbgm_compress has, TopK: rename the class"):
        parse_compressor("Identity()", known=[type("TopK", (Identity,), {})])
    with pytest.raises(ValueError, match="a name that known has twice, Mine: rename the class"):
        parse_compressor("Identity()", known=[Mine, type("Mine", (Identity,), {})])


def test_command_lines_import_classes_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(
        "import lbgm_compress\nclass RandomK(lbgm_compress.Identity):\n    pass\nnumber = 3\n"
    )
    (tmp_path / "broken_of_mine.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    [random_k] = import_known(["of_mine:RandomK"])
    assert repr(parse_compressor("LBGM(RandomK())", known=[random_k])) == "LBGM(RandomK())"
    for spec, message in [
        ("of_mine", "'of_mine' does not name a class: write MODULE:CLASS"),
        ("of_mine:", "write MODULE:CLASS"),
        ("nowhere_at_all:RandomK", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("of_mine:TopK", "has no attribute 'TopK'"),
        ("of_mine:number", "'of_mine:number' is not a class, but 3"),
        ("broken_of_mine:RandomK", "ZeroDivisionError: division by zero"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            import_known([spec])
        assert "\n" not in str(error.value)
