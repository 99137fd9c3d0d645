"""`python -m bench NAME ['{"device": "cpu", ...}']`: a measurement without the command line's
parsing; last line JSON.

What `compare` starts for another version of the package. PUSA_BENCH_PACKAGE=DIR: measure the
package in DIR.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def use_package(folder: str) -> None:
    """Import pusa_fast from `folder`: an editable install would otherwise come first, whatever
    PYTHONPATH says."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
    sys.path.insert(0, folder)
    import pusa_fast

    if Path(folder).resolve() not in Path(pusa_fast.__file__).resolve().parents:
        raise ImportError(f"pusa_fast was imported from {pusa_fast.__file__}, not from {folder}")


def main() -> None:
    if folder := os.environ.get("PUSA_BENCH_PACKAGE"):
        use_package(folder)
    from bench import harness

    kind, *rest = sys.argv[1:]
    with harness.quiet_stdout():
        result = harness.execute(kind, harness.Options.from_json(rest[0] if rest else "{}"))
    harness.print_json(result)


if __name__ == "__main__":
    main()
