"""Tables as text."""

from __future__ import annotations

from collections.abc import Container, Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: Container[int] = (0,), rule: bool = False) -> str:
    """Columns of equal width, those of `left` to the left, the rest to the right; a rule below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [*rows[:1], ["─" * width for width in widths], *rows[1:]] if rule else rows
    put = [str.ljust if i in left else str.rjust for i in range(len(widths))]
    return "\n".join("  ".join(f(c, w) for f, c, w in zip(put, line, widths, strict=True)).rstrip() for line in lines)
