"""Compressors written down: the expressions that `repr` gives, read back without running code."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from lbgm_compress.compressor import Compressor
from lbgm_compress.compressors.atomo import Atomo
from lbgm_compress.compressors.error_feedback import ErrorFeedback
from lbgm_compress.compressors.identity import Identity
from lbgm_compress.compressors.lbgm import LBGM
from lbgm_compress.compressors.look_back_subspace import LookBackSubspace
from lbgm_compress.compressors.norm_budget import NormBudget
from lbgm_compress.compressors.signsgd import SignSGD
from lbgm_compress.compressors.topk import TopK

__all__ = ["parse_compressor", "parse_compressors"]

COMPRESSORS = (Atomo, ErrorFeedback, Identity, LBGM, LookBackSubspace, SignSGD, TopK)
CONSTRUCTORS = {compressor.__name__: compressor for compressor in COMPRESSORS}
# What compressors take as an argument besides each other.
ARGUMENTS = {NormBudget.__name__: NormBudget}
LONGEST = 10_000


def parse_compressor(text: str) -> Compressor:
    """Return the compressor that `text` describes.

    Only the public constructors are called, with literal arguments or other compressors.

    Parameters
    ----------
    text
        A Python expression, for example ``LBGM(TopK(0.01), delta=0.1)``.

    Raises
    ------
    ValueError
        If it is not such an expression, or a constructor refuses its arguments; one line that
        says what is wrong.

    Examples
    --------
    >>> parse_compressor("LBGM(TopK(ratio=0.01))")
    LBGM(TopK(0.01))
    """
    compressors = parse_compressors(text)
    if len(compressors) != 1:
        raise ValueError(f"expected one compressor, found {len(compressors)} in {text!r}")
    return compressors[0]


def parse_compressors(text: str) -> list[Compressor]:
    """Return the compressors of a comma-separated list, read as `parse_compressor` reads one."""
    if len(text) > LONGEST:
        raise ValueError(f"an expression of {len(text)} characters is too long")
    try:
        # Brackets make a list out of one expression and of several, over any number of lines.
        tree = ast.parse(f"[{text}\n]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot read {text!r} as compressors: {error}") from None
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError(f"cannot read {text!r} as a list of compressors")
    return [_built(node, CONSTRUCTORS) for node in tree.elts]


def _built(node: ast.expr, constructors: Mapping[str, Callable[..., Any]]) -> Any:
    known = ", ".join(CONSTRUCTORS)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        hint = f": write {node.id}(...)" if isinstance(node, ast.Name) else ""
        raise ValueError(f"{ast.unparse(node)!r} is not a compressor{hint}; known are {known}")
    if node.func.id in ARGUMENTS and node.func.id not in constructors:
        raise ValueError(f"{node.func.id} is no compressor, but an argument of LBGM: delta=...")
    if node.func.id not in constructors:
        raise ValueError(f"unknown compressor {node.func.id!r}; known are {known}")
    arguments = [_argument(argument) for argument in node.args]
    keywords: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"{ast.unparse(node)!r} unpacks arguments: write them out")
        keywords[keyword.arg] = _argument(keyword.value)
    try:
        return constructors[node.func.id](*arguments, **keywords)
    except (TypeError, ValueError) as error:
        message = str(error).replace("__init__()", "it")
        raise ValueError(f"{ast.unparse(node)}: {message}") from None


def _argument(node: ast.expr) -> Any:
    if isinstance(node, (ast.Call, ast.Name)):
        return _built(node, {**CONSTRUCTORS, **ARGUMENTS})
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"{ast.unparse(node)!r} is neither a literal nor a compressor") from None
