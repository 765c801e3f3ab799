"""Read compressors from text: the expressions that their `repr` gives, without running code."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import lbgm_compress.compressors as built_in
import lbgm_compress.reducibles as reducibles
from lbgm_compress.algorithm import Algorithm

__all__ = ["import_known", "parse_compressor", "parse_compressors"]

BUILT_IN: tuple[type, ...] = tuple(
    one
    for _, one in sorted(
        (name, getattr(room, name)) for room in (built_in, reducibles) for name in room.__all__
    )
)
LONGEST = 10_000


def parse_compressor(text: str, known: Iterable[type] = ()) -> Any:
    """Return the compressor or reducible that an expression describes.

    Only constructors of the package's compressors and of `known` are called, with literals or
    other such objects as arguments. Nothing else in `text` is evaluated.

    Parameters
    ----------
    text
        A Python expression, for example ``LBGM(TopK(0.01), delta=0.1)``.
    known
        Further classes that the expression may name, by their ``__name__``: compressors of your
        own, and classes that their constructors take as arguments.

    Raises
    ------
    ValueError
        If `text` is not such an expression or a constructor refuses its arguments (a message of one
        line), or two classes have one name.
    TypeError
        If `known` holds something that is not a class.

    Examples
    --------
    >>> from lbgm_compress import parse_compressor
    >>> parse_compressor("LBGM(TopK(ratio=0.01))")
    LBGM(TopK(0.01))
    """
    compressors = parse_compressors(text, known)
    if len(compressors) != 1:
        raise ValueError(f"expected one compressor, found {len(compressors)} in {text!r}")
    return compressors[0]


def parse_compressors(text: str, known: Iterable[type] = ()) -> list[Any]:
    """Return the compressors of a comma-separated list.

    Parameters and errors are those of `parse_compressor`.
    """
    classes = _by_name(known)
    if not isinstance(text, str):
        raise TypeError(f"expected an expression as text, such as 'LBGM(TopK(0.01))', not {text!r}")
    if len(text) > LONGEST:
        raise ValueError(f"an expression of {len(text)} characters is too long")
    try:
        # Brackets make a list out of one expression and of several, over any number of lines.
        tree = ast.parse(f"[{text}\n]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = f": {error}" if not isinstance(error, SyntaxError) else ""
        raise ValueError(
            f"cannot read {text!r} as compressors{reason}: check its brackets, commas and quotes"
        ) from None
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError(f"cannot read {text!r} as a list of compressors")
    return [_compressor(node, classes) for node in tree.elts]


def import_known(specs: Iterable[str]) -> list[type]:
    """Import classes for the argument `known` of `parse_compressor`.

    The working directory is put at the front of ``sys.path``, as ``python -m`` does.

    Parameters
    ----------
    specs
        One ``"module:Class"`` for each class.

    Raises
    ------
    ValueError
        If one cannot be imported, or is not a class.
    """
    directory = os.getcwd()
    classes = []
    for spec in specs:
        module, colon, name = spec.partition(":")
        if not (module and colon and name):
            raise ValueError(f"{spec!r} does not name a class: write MODULE:CLASS")
        if directory not in sys.path:
            sys.path.insert(0, directory)
        try:
            found = getattr(importlib.import_module(module), name)
        except Exception as error:  # A module of the user's may raise anything.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"cannot import {spec!r}: {reason}") from error
        if not isinstance(found, type):
            raise ValueError(f"{spec!r} is not a class, but {found!r}")
        classes.append(found)
    return classes


def _by_name(known: Iterable[type]) -> dict[str, type]:
    """Return the classes that an expression may name."""
    classes = {one.__name__: one for one in BUILT_IN}
    if isinstance(known, type):
        raise TypeError(f"known takes a list of classes: write known=[{known.__name__}]")
    for one in known:
        if not isinstance(one, type):
            raise TypeError(f"known takes classes, as in known=[RandomK], not {one!r}")
        name = one.__name__
        if classes.setdefault(name, one) is not one:
            whose = "lbgm_compress has" if classes[name] in BUILT_IN else "known has twice"
            raise ValueError(f"{one!r} has a name that {whose}, {name}: rename the class")
    return classes


def _compressor(node: ast.expr, classes: Mapping[str, type]) -> Algorithm:
    names = ", ".join(name for name, one in classes.items() if issubclass(one, Algorithm))
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        hint = _hint(node.id, classes) if isinstance(node, ast.Name) else ""
        raise ValueError(f"{ast.unparse(node)!r} is not a compressor{hint}; known are {names}")
    name = node.func.id
    if classes.get(name) is built_in.NormBudget:
        raise ValueError(f"{name} is no compressor, but an argument of LBGM: delta=...")
    if name in classes and not issubclass(classes[name], Algorithm):
        raise ValueError(f"{name} is no compressor, but an argument of one; known are {names}")
    built = _built(node, classes)
    assert isinstance(built, Algorithm)
    return built


def _built(node: ast.Call | ast.Name, classes: Mapping[str, type]) -> Any:
    """Call the constructor that `node` names."""
    known = ", ".join(classes)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        hint = _hint(node.id, classes) if isinstance(node, ast.Name) else ""
        raise ValueError(f"{ast.unparse(node)!r} is not a compressor{hint}; known are {known}")
    name = node.func.id
    if name not in classes:
        near = difflib.get_close_matches(name, classes, 1)
        raise ValueError(
            f"unknown compressor {name!r}; known are {known}"
            f"{f' (did you mean {near[0]}?)' if near else ''}; a class of your own is passed as "
            f"known=[{name}] (--known MODULE:{name} on a command line)"
        )
    arguments = [_argument(argument, classes) for argument in node.args]
    keywords: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"{ast.unparse(node)!r} unpacks arguments: write them out")
        keywords[keyword.arg] = _argument(keyword.value, classes)
    try:
        return classes[name](*arguments, **keywords)
    except (TypeError, ValueError) as error:
        message = str(error).replace(f"{name}.__init__()", f"{name}()")
        raise ValueError(f"{ast.unparse(node)}: {message}") from None


def _hint(name: str, classes: Mapping[str, type]) -> str:
    """Return what to write in the place of a bare name."""
    if name.lower() in ("true", "false", "none"):
        return f": write {name.capitalize()}"
    near = difflib.get_close_matches(name, classes, 1)
    return f": write {near[0]}(...)" if near else f": write {name!r}, in quotes, if it is text"


def _argument(node: ast.expr, classes: Mapping[str, type]) -> Any:
    if isinstance(node, (ast.Call, ast.Name)):
        return _built(node, classes)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"{ast.unparse(node)!r} is neither a literal nor a compressor") from None
