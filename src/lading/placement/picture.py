"""Draw a plan as a picture: a bar for each device, its blocks in execution order, and why what is offloaded is.

Needs ``lading[plot]``; the only file that imports matplotlib. Knows labels and sizes, no plan; keeps no global state.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

from lading.errors import MissingExtraError, PlanError, refusal
from lading.units import format_bytes

_COLOURS = ("#3b6ea8", "#d9823b", "#4f9a6b", "#8e6bb0", "#c2565c", "#3f9aa6")
_OTHER, _INK, _LINE = "#8a8f98", "#2b2f36", "#9aa0a6"
_WIDTH, _LEFT, _RIGHT, _ROW, _TEXT = 11.0, 0.6, 1.5, 0.66, 0.17  # inches
_PLOT_POINTS = (_WIDTH - _LEFT - _RIGHT) * 72
_CHARACTER_POINTS, _EDGE_POINTS, _HAIR_POINTS = 4.0, 3.0, 0.5
_MAX_NOTES = 20


@dataclass(frozen=True, slots=True)
class Segment:
    """One block on its device. ``kind`` decides its colour."""

    label: str
    size_bytes: int
    kind: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One device: its blocks in execution order, what is kept free, and its budget (None: no limit)."""

    label: str
    budget_bytes: int | None
    segments: tuple[Segment, ...]
    reserved_bytes: int = 0

    @property
    def used_bytes(self) -> int:
        """Add up the blocks."""
        return sum(segment.size_bytes for segment in self.segments)


def draw(path: Path, *, bars: Sequence[Bar], title: str, notes: Sequence[str] = ()) -> None:
    """Write the picture to an ``.svg`` or ``.png`` file; widths are bytes, on one scale for all devices.

    Raises:
        PlanError: the file is to be of another format.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix not in (".svg", ".png"):
        found, expected = f"suffix {path.suffix!r}", "'.svg' or '.png'"
        raise PlanError(refusal(f"picture {path}", found=found, expected=expected, way_out="rename it"))
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        found, way_out = f"no module {error.name!r}", "install it with: pip install 'lading[plot]'"
        raise MissingExtraError(refusal("picture", found=found, expected="matplotlib", way_out=way_out)) from error
    more = [f"… and {len(notes) - _MAX_NOTES} more"] if len(notes) > _MAX_NOTES else []
    wrap = textwrap.TextWrapper(150, subsequent_indent="    ")
    text = [line for note in [*notes[:_MAX_NOTES], *more] for line in wrap.wrap(note)]
    sizes: Counter[str] = Counter()
    for segment in (segment for bar in bars for segment in bar.segments):
        sizes[segment.kind] += segment.size_bytes
    visible = [kind for kind, size_bytes in sizes.most_common() if 1000 * size_bytes >= sizes.total()]
    colours = dict(zip(visible, _COLOURS, strict=False))
    below, plot = 0.85 + _TEXT * len(text), max(1, len(bars)) * _ROW
    height = below + plot + 0.45
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    axes = figure.add_axes((_LEFT / _WIDTH, below / height, _PLOT_POINTS / 72 / _WIDTH, plot / height))
    _draw_bars(axes, bars, colours)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK, parse_math=False)
    keys = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    keys += [Patch(color=_OTHER, label="other")] if len(visible) > len(colours) else []
    keys.append(Patch(facecolor="white", edgecolor=_LINE, hatch="/////", label="reserved"))
    keys.append(Patch(facecolor="white", edgecolor=_LINE, label="free"))
    place = (_LEFT / _WIDTH, (below - 0.3) / height)
    rules: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": _INK, "borderaxespad": 0, "borderpad": 0}
    figure.legend(handles=keys, loc="upper left", bbox_to_anchor=place, ncols=8, **rules)
    style: dict[str, Any] = {"fontsize": 8, "color": _INK, "va": "top", "parse_math": False}
    for row, line in enumerate(text):
        figure.text(_LEFT / _WIDTH, (below - 0.65 - _TEXT * row) / height, line, **style)
    figure.savefig(path, dpi=160, metadata={"Title": title, "Description": "\n".join(notes)})


def _draw_bars(axes: Any, bars: Sequence[Bar], colours: dict[str, str]) -> None:
    most = max([1, *(bar.used_bytes + bar.reserved_bytes for bar in bars)])
    limit = max([most, *(min(bar.budget_bytes or 0, 3 * most // 2) for bar in bars)])
    frame: dict[str, Any] = {"height": 0.6, "facecolor": "white", "edgecolor": _LINE, "linewidth": 0.8}
    for row, bar in enumerate(bars):
        budget_bytes = bar.budget_bytes or 0
        axes.barh(row, min(budget_bytes, 2 * limit), **frame)  # one that is larger than the picture stays open
        axes.barh(row, bar.reserved_bytes, left=bar.used_bytes, hatch="/////", **frame)
        _draw_blocks(axes, row, bar.segments, colours, limit)
        facts = [f"{format_bytes(bar.used_bytes)} used"]
        facts += [f"{format_bytes(bar.reserved_bytes)} reserved"] if bar.reserved_bytes else []
        free_bytes = budget_bytes - bar.used_bytes - bar.reserved_bytes
        facts += [] if bar.budget_bytes is None else [f"{format_bytes(free_bytes)} free"]
        axes.text(1.01 * limit, row, "\n".join(facts), fontsize=7.5, color=_INK, va="center")
        names = f"{len(bar.segments)} blocks: {_span(bar.segments)}" if len(bar.segments) > 1 else ""
        axes.text(0, row + 0.44, names, fontsize=6.5, color=_OTHER, va="center", parse_math=False)
    ticks = range(0, limit + 1, 1 << (limit // 6).bit_length())
    axes.set_xticks(ticks, [format_bytes(tick).replace(".0 ", " ") for tick in ticks])
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set(xlim=(0, limit), ylim=(len(bars or "-") - 0.4, -0.4))
    axes.tick_params(labelsize=8, length=0, labelcolor=_INK)
    axes.spines[:].set_visible(False)


def _draw_blocks(axes: Any, row: int, segments: Sequence[Segment], colours: dict[str, str], limit: int) -> None:
    """Draw blocks, edged and named where there is room for all of a run of one kind; else one name for the run."""
    points, start = _PLOT_POINTS / limit, 0
    for kind, pieces in groupby(_pieces(segments, _HAIR_POINTS / points), key=lambda piece: piece.kind):
        run = list(pieces)
        colour, smallest = colours.get(kind, _OTHER), min(piece.size_bytes for piece in run) * points
        whole = Segment(_span(run), sum(piece.size_bytes for piece in run), kind)
        shown = run if smallest >= _EDGE_POINTS else [whole]
        edges = list(accumulate((piece.size_bytes for piece in shown), initial=start))
        spans = [(left, right - left) for left, right in pairwise(edges)]
        edge = {"edgecolor": "white", "linewidth": 0.7} if whole.size_bytes * points >= _EDGE_POINTS else {}
        axes.broken_barh(spans, (row - 0.3, 0.6), facecolor=colour, **edge)
        if not all(_fits(piece, points) for piece in shown):
            shown, edges = [whole], [start]
        for piece, left in zip(shown, edges, strict=False):
            if _fits(piece, points):
                place = {"ha": "center", "va": "center", "bbox": {"color": colour, "linewidth": 0, "pad": 1.5}}
                middle = left + piece.size_bytes / 2
                axes.text(middle, row, piece.label, color="white", fontsize=7, parse_math=False, **place)
        start += whole.size_bytes


def _fits(piece: Segment, points: float) -> bool:
    return len(piece.label) * _CHARACTER_POINTS < piece.size_bytes * points


def _span(segments: Sequence[Segment]) -> str:
    """Name neighbours by the first and the last, without repeating the module that both are in."""
    first, last = segments[0].label, segments[-1].label
    return first if len(segments) == 1 else f"{first} … {last.removeprefix(first[: first.rfind('.') + 1])}"


def _pieces(segments: Sequence[Segment], hair_bytes: float) -> Iterator[Segment]:
    """Join neighbours too narrow to be seen into pieces that are, each named and coloured as the largest in it."""
    joined: list[Segment] = []
    size_bytes = 0
    for index, segment in enumerate(segments):
        joined.append(segment)
        size_bytes += segment.size_bytes
        if size_bytes >= hair_bytes or index == len(segments) - 1:
            largest = max(joined, key=lambda each: each.size_bytes)
            yield Segment(largest.label, size_bytes, largest.kind)
            joined, size_bytes = [], 0
