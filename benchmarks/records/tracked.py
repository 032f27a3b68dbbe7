"""Which results folders git knows: the committed page is made from these, whatever else was run in the checkout."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def own_folders(results: Path) -> frozenset[str]:
    """Names of the folders below `results` that git does not know: runs of whoever uses this checkout.

    Empty where git is missing, and where git knows nothing below `results`: then all runs are the user's.
    """
    git = shutil.which("git")
    if git is None or not results.is_dir():
        return frozenset()
    found = subprocess.run(  # noqa: S603 - fixed arguments
        [git, "-C", str(results), "ls-files", "-z"], capture_output=True, text=True, check=False, timeout=60
    )
    known = {name.partition("/")[0] for name in found.stdout.split("\0") if name}
    return frozenset(path.name for path in results.iterdir() if path.is_dir() and known) - known
