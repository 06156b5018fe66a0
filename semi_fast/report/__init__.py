"""The report: run directories in, one offline HTML page and the numbers behind its figures out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

MARK = b"semi_fast report</title>"
MARK_BYTES = 2**16
"""Of a page, for its mark."""
NOTE, SAYS = "README.txt", "which semi_fast writes together with the page"
"""In a folder of data, so that it is known for ours."""


def data_folder(page: Path) -> Path:
    """Where the numbers behind a page lie: beside it, under its own name."""
    return page.with_name(f"{page.stem}_data")


def check_page(page: Path) -> None:
    """Raise ValueError unless a report may be written there: a page of ours is replaced with its data, nothing else."""
    data = data_folder(page)
    if page.is_dir():
        raise ValueError(f"a report is one file; {page} is a directory; name a file such as report.html in it")
    if page.suffix != ".html":
        raise ValueError(f"a report is a page, NAME.html; got {page}; its numbers go to {data.name}/ as CSV")
    if page.exists():
        with page.open("rb") as file:
            if MARK not in file.read(MARK_BYTES):
                raise ValueError(f"a report replaces nothing but a report; {page} is none; choose another name")
    if data.is_symlink() or (data.exists() and not (data.is_dir() and _is_ours(data, page))):
        raise ValueError(f"a report keeps its numbers in {data.name}/; {data} is something else; choose another name")


def _is_ours(data: Path, page: Path) -> bool:
    note = data / NOTE
    if not note.is_file():  # as in those of older versions, which belong to the page of a run
        return not any(data.iterdir()) or (page.name == "report.html" and page.exists())
    return SAYS in note.read_text(encoding="utf-8", errors="replace")


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the page of one run, or of several compared, to `out` and return `out`.

    The numbers behind the figures go to `data_folder(out)`. Each file is replaced whole or not at all.
    Raises ValueError for a directory that is no run directory, for a damaged file in one, and for an unusable `out`.
    """
    from semi_fast.report.page import write_page  # matplotlib and jinja2 only when a page is written

    return write_page(run_dirs, out)
