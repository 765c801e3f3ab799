"""The models that clients of one machine hold: files that they share, one for each version."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lbgm_compress.adapters.flower.archive import unpack_state, write_state

__all__ = ["Models"]

# The number of versions of a training that are kept.
VERSIONS = 3
SUFFIX = ".safetensors"
# The time after which a training in the user's own folder is removed, if no model is written.
WEEK = 7 * 24 * 3600.0
logger = logging.getLogger("flwr")


class Models:
    """The last versions of the model of one training, in files.

    Clients that run at the same time may read and write the same files: a file is written whole or
    not at all, and one version has the same content whoever writes it.

    Parameters
    ----------
    training
        The identifier of the training.
    parent
        The folder for all trainings; None for one of the user's own in the folder for temporary
        files, where trainings that have not been used for a week are removed.
    """

    def __init__(self, training: str, parent: Path | None) -> None:
        self._own = parent is None
        self.parent = _own_folder() if parent is None else parent
        # The name comes from the server, and must not lead out of the folder.
        name = "".join(c for c in training if c.isalnum())[:64]
        self.folder = self.parent / f"{name}-models"

    def read(self, version: bytes) -> Any:
        """Return what was kept of a version; None if there is nothing, or it cannot be read."""
        try:
            return unpack_state((self.folder / f"{version.hex()}{SUFFIX}").read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("compression_mod: a kept model is not used: %s", error)
            return None

    def write(self, version: bytes, state: Any) -> None:
        """Keep a version, and remove all files but those of the versions written last.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        if not self.folder.exists():
            self.parent.mkdir(parents=True, exist_ok=True)
            if self._own:
                _remove_old(self.parent.iterdir())
            self.folder.mkdir(mode=0o700, exist_ok=True)
        write_state(self.folder / f"{version.hex()}{SUFFIX}", state)
        written = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            # Another client may have removed it.
            with contextlib.suppress(FileNotFoundError):
                written.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(written)[:-VERSIONS]:
            path.unlink(missing_ok=True)


def _own_folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(tempfile.gettempdir()) / f"lbgm_compress-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_own(folder)
    return folder


def _check_own(folder: Path) -> None:
    """Raise `PermissionError` if a folder may be somebody else's."""
    found = folder.lstat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if not (mine and stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077):
        raise PermissionError(
            f"{folder} is not a folder that only this user may read: remove it, or use "
            "CompressionMod(state_dir=...)"
        )


def _remove_old(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            if folder.stat().st_mtime < time.time() - WEEK:
                shutil.rmtree(folder, ignore_errors=True)
