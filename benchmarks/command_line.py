"""What the scripts' command lines share: errors in one line, before anything is done."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Parser", "check_file", "check_folder", "listed"]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which takes no abbreviations."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def check_folder(folder: Path) -> None:
    """Make the folder of ``--out``, if there is none.

    Raises
    ------
    ValueError
        If nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot write there: {error.strerror}") from None


def check_file(file: Path) -> None:
    """Make the file of ``--out``, if there is none.

    Raises
    ------
    ValueError
        If it cannot be written.
    """
    try:
        file.touch()
    except OSError as error:
        raise ValueError(f"--out {file}: cannot write there: {error.strerror}") from None


def listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return a reader of comma-separated values."""

    def read(text: str) -> list[Any]:
        return [convert(part) for part in text.split(",")]

    return read
