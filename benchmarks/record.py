"""Records of measurements: one JSON file a benchmark, from which tables and plots are made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashsvd_compile import provenance

RESULTS = Path(__file__).parent / "results"


def write(name: str, rows: Sequence[Mapping[str, Any]], *, command: str, folder: Path = RESULTS) -> Path:
    """Write ``benchmarks/results/<name>.json``: the rows with device, versions, commit and command.

    Args:
        rows: every measured row, baselines included; JSON values only.
        command: what to type, in the repository's root, to measure again.
        folder: where to write instead of ``benchmarks/results``.
    """
    record = {
        "name": name,
        "device": provenance.device(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "command": command,
        "rows": list(rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def read(name: str) -> dict[str, Any]:
    """The record of that name, as :func:`write` left it."""
    return json.loads((RESULTS / f"{name}.json").read_text())
