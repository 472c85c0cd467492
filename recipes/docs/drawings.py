"""The drawings of docs/concepts, one SVG file each.

    python recipes/docs/drawings.py

writes them to docs/drawings. Each has a panel of its own and colours for light and dark, so that any page can show it.
"""

from __future__ import annotations

import math
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parents[2] / "docs" / "drawings"
STYLE = """\
svg { --panel: #ffffff; --ink: #1f2933; --soft: #64707d; --kept: #2563a8; --gone: #c3ccd6; --warm: #b4540a; }
@media (prefers-color-scheme: dark) {
  svg { --panel: #1b2027; --ink: #e6eaef; --soft: #a3afbb; --kept: #6fb1f2; --gone: #4a5560; --warm: #f0a35e; }
}
text { font: 14px system-ui, sans-serif; fill: var(--ink); }
.soft { fill: var(--soft); } .middle { text-anchor: middle; }
.panel { fill: var(--panel); stroke: var(--gone); }
.kept { fill: var(--kept); } .gone { fill: var(--panel); stroke: var(--soft); stroke-dasharray: 3 3; }
.grey { fill: var(--gone); } .warm { fill: var(--warm); }
.line { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.blue { fill: none; stroke: var(--kept); stroke-width: 2.5; }
.orange { fill: none; stroke: var(--warm); stroke-width: 2.5; }
.dots { stroke-dasharray: 2 5; }
"""
SIDE = 30  # of a token's square
STEP = 44  # from one token to the next
DROPPED = frozenset({2, 3, 6})  # of the tokens below
SCORES = (0.62, 0.55, 0.12, 0.20, 0.78, 0.91, 0.16, 0.70, 0.48)
Place = tuple[float, float]


class Drawing:
    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'role="img" aria-labelledby="title description">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="description">{escape(description)}</desc>',
            f"<style>\n{STYLE}</style>",
            f'<rect class="panel" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        ]

    def box(self, at: Place, size: Place, kind: str) -> None:
        (x, y), (width, height) = at, size
        self._lines.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>')

    def text(self, at: Place, words: str, kind: str = "") -> None:
        self._lines.append(f'<text class="{kind}" x="{at[0]:g}" y="{at[1]:g}">{escape(words)}</text>')

    def path(self, points: list[Place], kind: str) -> None:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._lines.append(f'<polyline class="{kind}" points="{joined}"/>')

    def arrow(self, start: Place, end: Place, kind: str = "line") -> None:
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        wings = [(end[0] - 7 * math.cos(angle + turn), end[1] - 7 * math.sin(angle + turn)) for turn in (0.5, -0.5)]
        self.path([start, end], kind)
        self.path([wings[0], end, wings[1]], kind.removesuffix(" dots"))

    def tokens(self, left: float, top: float, kinds: list[str]) -> None:
        for place, kind in enumerate(kinds):
            self.box((left + STEP * place, top), (SIDE, SIDE), kind)

    def svg(self) -> str:
        return "\n".join([*self._lines, "</svg>", ""])


def middle(left: float, place: float) -> float:
    """The middle of the token at `place` in a row that starts at `left`."""
    return left + STEP * place + SIDE / 2


def scores() -> Drawing:
    drawing = Drawing(
        640, 300, "How tokens are scored", "Nine tokens with a bar each; the three lowest are dropped, the order stays."
    )
    left = 200
    drawing.text((20, 80), "score of each token")
    drawing.text((20, 100), "mean of max(0, y)", "soft")
    for place, score in enumerate(SCORES):
        height = 110 * score
        kind = "grey" if place in DROPPED else "kept"
        drawing.box((left + STEP * place + 5, 130 - height), (SIDE - 10, height), kind)
    drawing.text((20, 171), "tokens after the block")
    drawing.tokens(left, 150, ["gone" if place in DROPPED else "kept" for place in range(9)])
    drawing.text((20, 261), "tokens that go on")
    drawing.text((20, 281), "in their own order", "soft")
    kept = [place for place in range(9) if place not in DROPPED]
    drawing.tokens(left, 240, ["kept"] * len(kept))
    for new, old in enumerate(kept):
        drawing.arrow((middle(left, old), 184), (middle(left, new), 236))
    return drawing


def reductions() -> Drawing:
    drawing = Drawing(
        640,
        420,
        "What becomes of dropped tokens",
        "For five reductions: dropped tokens are gone, seen by convolutions, frozen, pooled or merged.",
    )
    left = 220
    kinds = ["gone" if place in DROPPED else "kept" for place in range(9)]
    rows = (
        ("drop", "gone"),
        ("context", "convolutions see them"),
        ("frozen", "scans read them too"),
        ("pool", "the nearest scans for them"),
        ("local-merge", "averaged into the nearest"),
    )
    for number, (name, words) in enumerate(rows):
        top = 40 + 76 * number
        drawing.text((20, top + 14), name)
        drawing.text((20, top + 32), words, "soft")
        shown = ["grey" if kind == "gone" and name in ("context", "frozen", "pool") else kind for kind in kinds]
        drawing.tokens(left, top, shown)
        for place in sorted(DROPPED):
            x = middle(left, place)
            if name == "context":
                drawing.arrow((x, top - 3), (middle(left, 4 if place < 4 else 7) - 4, top - 3), "orange")
            elif name == "frozen":
                drawing.arrow((x, top - 3), (middle(left, 4 if place < 4 else 7) - 4, top - 3), "orange")
                drawing.arrow((x, top + SIDE + 6), (left + 9 * STEP, top + SIDE + 6), "blue")
            elif name in ("pool", "local-merge"):
                target = {2: 1, 3: 4, 6: 5}[place]
                drawing.arrow((x, top + SIDE + 4), (middle(left, target), top + SIDE + 4), "blue")
                if name == "pool":
                    drawing.arrow((x, top - 3), (middle(left, 4 if place < 4 else 7) - 4, top - 3), "orange")
    drawing.path([(20, 408), (44, 408)], "orange")
    drawing.text((52, 413), "seen by the convolution", "soft")
    drawing.path([(250, 408), (274, 408)], "blue")
    drawing.text((282, 413), "goes on in the scan", "soft")
    return drawing


def alignment() -> Drawing:
    drawing = Drawing(
        640,
        320,
        "Hidden state alignment",
        "The hidden state decays over three dropped tokens; without alignment it does not, and stays too large.",
    )
    left, top, bottom = 70, 40, 230
    gap = (3, 4, 5)

    def state(aligned: bool) -> list[Place]:
        """Of the kept tokens. Each token lets the state decay, a dropped one only if the scan is aligned."""
        value, points = 1.0, []
        for place in range(9):
            if place not in gap:
                points.append((middle(left, place), bottom - (bottom - top) * value))
            if aligned or place + 1 not in gap:
                value *= 0.78
            if place + 1 == gap[-1] + 1:
                value += 0.28  # what the next kept token puts in
        return points

    drawing.text((left, 26), "hidden state h of one channel, after each token", "soft")
    drawing.path([(left - 6, top), (left - 6, bottom), (left + 9 * STEP, bottom)], "line")
    drawing.path(state(aligned=False), "orange")
    drawing.path(state(aligned=True), "blue")
    drawing.path([(left + STEP * 3 - 7, top), (left + STEP * 3 - 7, bottom)], "line dots")
    drawing.path([(left + STEP * 6 - 7, top), (left + STEP * 6 - 7, bottom)], "line dots")
    drawing.text((left + STEP * 4.5 - 7, top + 12), "gap", "soft middle")
    drawing.tokens(left, 244, ["gone" if place in gap else "kept" for place in range(9)])
    drawing.text((left, 304), "dropped tokens add no input, but the state still decays by exp(A s) over them")
    drawing.path([(490, 96), (514, 96)], "orange")
    drawing.text((520, 101), "not aligned")
    drawing.path([(490, 126), (514, 126)], "blue")
    drawing.text((520, 131), "aligned")
    return drawing


DRAWINGS = {"scores": scores, "reductions": reductions, "alignment": alignment}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
