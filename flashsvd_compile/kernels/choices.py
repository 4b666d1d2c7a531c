"""Tiles that were chosen by timing, one readable JSON file for each kind of launch.

A file says what it was chosen for, so that one of another chip, version or kernel is no choice for this one. Files are
replaced as a whole: of processes that tune at once each finds none or a complete one.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Any)
Problem = Mapping[str, str | int | bool]
"""All that the fastest tile depends on; ``kernel`` is the kernel's name."""

FOLDER_VARIABLE = "FLASHSVD_CACHE_DIR"


class Choices:
    """A folder of choices. Whatever is wrong with it is logged and costs a choice, never a call.

    Args:
        folder: made when the first choice is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, problem: Problem, tiles: Sequence[T]) -> T | None:
        """The tile that was chosen for a problem, if it is still one of these ``NamedTuple``."""
        path = self._path(problem)
        try:
            stored = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("ignored %s: %s", path, error)
            return None
        if isinstance(stored, dict) and stored.get("problem") == problem:
            for tile in tiles:
                if stored.get("tile") == tile._asdict():
                    return tile
        logger.warning("ignored %s: not a choice for %s", path, problem)
        return None

    def write(self, problem: Problem, tile: Any, share: float) -> None:
        """Keep a choice, and for the reader its share of the time that the table's tile takes."""
        content = {"problem": problem, "tile": tile._asdict(), "share_of_time": round(share, 3)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", dir=self.folder, suffix=".tmp", delete=False) as file:
                json.dump(content, file, indent=1)
            os.replace(file.name, self._path(problem))
        except OSError as error:
            logger.warning("the choice of %s is not kept: %s", tile, error)

    def _path(self, problem: Problem) -> Path:
        digest = hashlib.sha256(json.dumps(problem).encode()).hexdigest()
        return self.folder / f"{problem['kernel']}-{digest[:16]}.json"


def folder_of_user() -> Path:
    """``tiles`` in ``$FLASHSVD_CACHE_DIR``, else in ``flashsvd_compile`` of ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get(FOLDER_VARIABLE) or os.path.join(caches, "flashsvd_compile")
    return Path(os.path.expanduser(folder), "tiles")
