"""A timeline as a picture: a band for each lane, a bar for each phase, time from left to right."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shim.telemetry.timeline_model import Lane, Phase, Timeline

_WIDTH, _LEFT, _RIGHT = 1280, 150, 24
_TOP, _ROW, _BAR, _GAP = 56, 20, 16, 10
_LETTER = 6.2  # the mean width of a letter, in pixels
_LABEL_LETTERS = 20
_COLUMNS, _LINE = 3, 15
_TICKS = 10
_COLOURS = ("#4e79a7", "#76b7b2", "#59a14f", "#e0a526", "#e8853b", "#d1615d", "#9270a8", "#8c7460")
_STYLE = (
    "text{font:11px sans-serif;fill:#222}.title{font-size:14px;font-weight:bold}.lane{font-weight:bold}"
    ".list{fill:#444}.tick{fill:#666;text-anchor:middle}.grid{stroke:#ddd}.moment{stroke-width:2}"
)


def draw(timeline: Timeline) -> str:
    """Draw a timeline.

    A phase's name is in its bar, or beside it if there is room; a list below has all names.

    :param timeline: the timeline.
    :returns: an SVG document.
    """
    lanes = timeline.lanes()
    lines = math.ceil(len(timeline.phases) / _COLUMNS)
    scale = (_WIDTH - _LEFT - _RIGHT) / (timeline.length_s or 1.0)
    chart = _TOP + sum(_height(lane) for lane in lanes) + _GAP
    height = chart + lines * _LINE + 2 * _GAP
    heading = f"{timeline.title}: {_milliseconds(timeline.length_s)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}">',
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text class="title" x="{_GAP}" y="22">{escape(heading)}</text>',
        *_axis(timeline.length_s, scale=scale, height=chart),
    ]
    top = _TOP
    for number, lane in enumerate(lanes):
        parts += _lane(lane, top=top, scale=scale, colour=_COLOURS[number % len(_COLOURS)])
        top += _height(lane)
    for number, phase in enumerate(timeline.phases):
        column, line = divmod(number, lines)
        x, y = _GAP + column * (_WIDTH - _GAP) / _COLUMNS, chart + _GAP + (line + 1) * _LINE
        parts.append(f'<text class="list" x="{x:.0f}" y="{y}">{escape(_phrase(phase))}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _phrase(phase: Phase) -> str:
    took = "" if phase.is_moment else f", {_milliseconds(phase.took_s)}"
    return f"at {_milliseconds(phase.began_s)}{took}: {phase.lane}: {phase.name}"


def _height(lane: Lane) -> int:
    return len(lane.rows) * _ROW + _GAP


def _axis(length_s: float, *, scale: float, height: int) -> Iterator[str]:
    step_s = _step(length_s)
    for number in range(int(length_s / step_s) + 1):
        x = _LEFT + number * step_s * scale
        yield f'<line class="grid" x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{height - _GAP}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{_TOP - 14}">{number * step_s * 1000:g} ms</text>'


def _step(length_s: float) -> float:
    """Choose a round distance of ticks: 1, 2 or 5 times a power of ten."""
    step_s = 0.001
    while True:
        for factor in (1, 2, 5):
            if length_s <= factor * step_s * _TICKS:
                return factor * step_s
        step_s *= 10


def _lane(lane: Lane, *, top: int, scale: float, colour: str) -> Iterable[str]:
    name = lane.name if len(lane.name) <= _LABEL_LETTERS else f"{lane.name[: _LABEL_LETTERS - 1]}…"
    title = f"<title>{escape(lane.name)}</title>"
    yield f'<text class="lane" x="{_GAP}" y="{top + 12}">{escape(name)}{title}</text>'
    for number, row in enumerate(lane.rows):
        before = [_LEFT, *(_LEFT + phase.ended_s * scale for phase in row[:-1])]
        after = [*(_LEFT + phase.began_s * scale for phase in row[1:]), _WIDTH]
        for phase, left, right in zip(row, before, after, strict=True):
            y = top + number * _ROW
            yield from _bar(phase, left, right, y=y, scale=scale, colour=colour)


def _bar(phase: Phase, left: float, right: float, *, y: int, scale: float, colour: str) -> Iterator[str]:
    """Draw a phase; its name may fill the gap between its neighbours."""
    x, width = _LEFT + phase.began_s * scale, phase.took_s * scale
    yield f"<g><title>{escape(_phrase(phase))}</title>"
    if phase.is_moment:
        yield f'<line class="moment" stroke="{colour}" x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + _BAR}"/>'
    else:
        yield (
            f'<rect x="{x:.1f}" y="{y}" width="{max(width, 1.0):.1f}" height="{_BAR}" rx="2" '
            f'fill="{colour}" fill-opacity="0.55"/>'
        )
    wanted = len(phase.name) * _LETTER + 6
    if wanted <= width:
        yield f'<text x="{x + 3:.1f}" y="{y + 12}">{escape(phase.name)}</text>'
    elif wanted <= right - x - width:
        yield f'<text x="{x + width + 3:.1f}" y="{y + 12}">{escape(phase.name)}</text>'
    elif wanted <= x - left:
        yield f'<text x="{x - 3:.1f}" y="{y + 12}" text-anchor="end">{escape(phase.name)}</text>'
    yield "</g>"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
