"""The report: run directories in, one offline HTML page and the numbers behind its figures out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page of one run, or of several compared, to `out` and return `out`.

    The numbers behind the figures go to `report_data/` beside it. Each file is replaced whole or not at all.
    Raises ValueError for a directory that is no run directory, for a damaged file in one, and for an unusable `out`.
    """
    from semi_fast.report.page import write_page  # matplotlib and jinja2 only when a page is written

    return write_page(run_dirs, out)
