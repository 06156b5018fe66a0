"""How the figures look: colors, matplotlib settings, axes, and the way into a page that is light or dark."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

# The page exchanges each value for the custom property of that name, which also has a dark one.
COLORS = {
    "ink": "#1b1f24",
    "muted": "#626b76",
    "rule": "#d5dae0",
    "paper": "#fefefe",
    "series-0": "#0067a8",
    "series-1": "#c8510a",
    "series-2": "#00845f",
    "series-3": "#9a4c91",
    "series-4": "#a17600",
    "series-5": "#3f8fc4",
}
SERIES = [color for name, color in COLORS.items() if name.startswith("series")]
MARKERS, DASHES = "os^Dv*", ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)))
GROUP_STYLE = {"many": (SERIES[0], "-"), "medium": (SERIES[2], (0, (4, 1.2))), "few": (SERIES[1], (0, (1.5, 1)))}
STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": COLORS["ink"],
    "text.parse_math": False,  # a class may be called "$x$"
    "axes.labelcolor": COLORS["muted"],
    "axes.titlecolor": COLORS["ink"],
    "axes.edgecolor": COLORS["rule"],
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": COLORS["rule"],
    "grid.linewidth": 0.5,
    "hatch.color": COLORS["rule"],
    "xtick.color": COLORS["rule"],
    "ytick.color": COLORS["rule"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "semi_fast",
}
WIDTH = 9.6  # inches; 691 user units of the inlined SVG
NAMED = 30  # classes that still get their names on an axis
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def inline_svg(figure: Figure, prefix: str, label: str) -> Markup:
    """The figure as an element of a page: its own ids, colors as custom properties, short numbers, nothing to load."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has its own fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", lambda tag: _inline_tag(tag[0], prefix), text[text.index("<svg") :])
    look = f'role="img" aria-label="{escape(label)}" style="max-width:{figure.get_figwidth() * 6.6:.1f}rem"'
    return Markup(re.sub(r"\n\s*", "\n", text).replace("<svg", f"<svg {look}", 1))


def _inline_tag(tag: str, prefix: str) -> str:
    if tag.startswith("<svg"):
        tag = re.sub(r' (?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", tag)
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag)  # names of parts, referred to by nothing
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", tag)
    tag = re.sub(r"(?<![\w#.])-?\d+\.\d{4,}", lambda value: f"{float(value[0]):.3f}".rstrip("0").rstrip("."), tag)
    for name, color in COLORS.items():
        tag = tag.replace(color, f"var(--{name})")
    return tag


def shorten(name: str, most: int = 18) -> str:
    """`name` on one line, without control characters, at most `most` characters."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split()) or "\N{EN DASH}"
    return name if len(name) <= most else name[: most - 1] + "…"


def panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows of `columns`, each row `height` inches."""
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in grid[count:]:
        axis.remove()
    return figure, list(grid[:count])


def line(axis: Axes, x: np.ndarray, y: np.ndarray, index: int, **look: Any) -> None:
    """A line in the color and dash of series `index`; a single point is marked."""
    look = {"color": SERIES[index % 6], "linestyle": DASHES[index // 6 % 4], **look}
    if "marker" in look or np.isfinite(y).sum() == 1:  # a single point has no line to be seen by
        look = {"marker": "o", "markersize": 4, "markevery": max(1, len(x) // 12), **look}
    axis.plot(x, y, **look)


def heat(figure: Figure, axis: Axes, table: np.ndarray, extent: tuple, label: str | None, axes: Any = None) -> None:
    """Percentages [rows, columns] as colors, NaN hatched, with a colorbar where there is a `label`."""
    colors = matplotlib.colormaps["Blues"].with_extremes(bad=(0, 0, 0, 0))
    axis.patch.set(hatch="//////", facecolor="none", edgecolor=COLORS["rule"], linewidth=0)
    values = np.ma.masked_invalid(table)
    image = axis.imshow(values, cmap=colors, vmin=0, vmax=100, aspect="auto", interpolation="none", extent=extent)
    axis.grid(visible=False)
    if label:
        bar = figure.colorbar(image, ax=axes or axis, label=label, pad=0.015, aspect=32, fraction=0.04)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def class_ticks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Positions and texts of class ticks: names, or ranks where there are many classes."""
    if len(names) <= NAMED:
        return list(range(len(names))), [shorten(name) for name in names]
    stride = 10 * max(1, round(len(names) / 100))
    ticks = [0, *range(stride - 1, len(names), stride)]
    return ticks, [str(tick + 1) for tick in ticks]


def class_axis(axis: Axes, names: Sequence[str]) -> None:
    """Classes along x, their names turned where they would collide."""
    ticks, shown = class_ticks(names)
    crowded = len(names) <= NAMED and max(map(len, shown)) * len(names) > 90
    turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axis.set_xticks(ticks, shown, **turn)
    axis.set_xlim(-0.5, len(names) - 0.5)
    if len(names) > NAMED:
        axis.set_xlabel("class, rank by labeled images")


def marker(index: int, count: int, *, hollow: bool) -> dict[str, Any]:
    """Marked points on a thin line; the line alone where `count` points would crowd."""
    look: dict[str, Any] = {"linewidth": 0.8, "marker": MARKERS[index % 6], "markersize": 5}
    look |= {"markerfacecolor": "none", "markeredgewidth": 1.0} if hollow else {}
    return look if count <= NAMED else {"linewidth": 1.2}


def percent_axis(axis: Axes, title: str) -> None:
    """The y axis from 0 to 100 %, with room for a line at either end to be seen."""
    axis.set_title(title and f"{title}, %")
    axis.set_ylim(-2, 102)
    axis.set_yticks(range(0, 101, 20))


def step_axis(axis: Axes) -> None:
    """The x axis in steps."""
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def log_ticks(axis: Any) -> None:
    """Ticks of a log axis at 1, 2, 5, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else ""))
    axis.set_minor_locator(NullLocator())


def legend(figure: Figure, *axes: Axes) -> None:
    """One legend above all panels for the labels of `axes`."""
    pairs = [pair for axis in axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    if pairs:
        handles, names = zip(*pairs, strict=True)
        figure.legend(handles, names, loc="outside upper left", ncols=min(4, len(names)), borderaxespad=0)
