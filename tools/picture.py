"""Draws docs/architecture.svg: the rooms and the imports between them, as they are in the code.

    python -m tools.picture

Every room stands above all rooms that it imports. An arrow means "imports"; it is left out where a longer way of arrows
says the same. The output depends on the code and on DESIGN.md alone, so a test can compare it with the committed file.
"""

import html
import re
from collections.abc import Mapping
from itertools import pairwise

from tools.house import ROOT, House, Room

BOX_WIDTH, BOX_HEIGHT = 248, 96
GAP_X, GAP_Y, MARGIN = 34, 46, 24
LANE = 24  # the width kept free where an arrow passes a layer
SWEEPS = 8
TEXT_WIDTH = 34  # characters of a small line that fit a box
NOT_DRAWN = ("tools", "cluster")  # they import no room and no room imports them
STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#1b2733}"
    ".name{font-size:17px;font-weight:600}.knows{font-size:12px}.packages{font-size:12px;fill:#7a3e00}"
    ".box{fill:#f3f7fb;stroke:#41627f;stroke-width:1.4}.arrow{fill:none;stroke:#5d7287;stroke-width:1.5}"
)

Arrows = Mapping[str, set[str]]


def draw(house: House) -> str:
    """The picture as SVG text."""
    arrows = {room: targets - set(NOT_DRAWN) for room, targets in house.room_arrows().items() if room not in NOT_DRAWN}
    direct = without_implied(arrows)
    layers, ways = layered(direct)
    xs, width = placed(layers)
    height = 2 * MARGIN + len(layers) * (BOX_HEIGHT + GAP_Y) - GAP_Y
    tops = {name: MARGIN + i * (BOX_HEIGHT + GAP_Y) for i, layer in enumerate(layers) for name in layer}
    body = [_arrow([(xs[name], tops[name]) for name in way]) for way in sorted(ways)]
    body += [_box(house.rooms[name], xs[name], tops[name]) for layer in layers for name in layer if name in arrows]
    title = "Rooms of nltrain; an arrow means: imports"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
            'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="#5d7287"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


def without_implied(arrows: Arrows) -> dict[str, set[str]]:
    """The arrows that no longer way of arrows implies (the transitive reduction). `arrows` must have no circle."""
    below: dict[str, set[str]] = {}

    def reach(room: str) -> set[str]:
        if room not in below:
            below[room] = set().union(*({target} | reach(target) for target in arrows[room]))
        return below[room]

    return {room: {t for t in ts if not any(t in reach(other) for other in ts - {t})} for room, ts in arrows.items()}


def layered(arrows: Arrows) -> tuple[list[list[str]], list[list[str]]]:
    """The layers from top to bottom, and for each arrow the names that it passes.

    A room is one layer below the lowest room that imports it. An arrow over several layers gets a name of its own in
    each layer between (`from>to@layer`), so that a lane is kept free for it.
    """
    depth: dict[str, int] = {}

    def depth_of(room: str) -> int:
        if room not in depth:
            depth[room] = max((depth_of(other) + 1 for other in arrows if room in arrows[other]), default=0)
        return depth[room]

    layers: list[list[str]] = [[] for _ in range(max(map(depth_of, arrows)) + 1)]
    for room in arrows:
        layers[depth[room]].append(room)
    ways = []
    for room in arrows:
        for target in sorted(arrows[room]):
            lanes = [f"{room}>{target}@{i}" for i in range(depth[room] + 1, depth[target])]
            for i, lane in enumerate(lanes, depth[room] + 1):
                layers[i].append(lane)
            ways.append([room, *lanes, target])
    _uncross(layers, ways)
    return layers, ways


def _uncross(layers: list[list[str]], ways: list[list[str]]) -> None:
    """Sort each layer by the mean place of its neighbours, downwards and upwards by turns: fewer arrows cross."""
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        pairs = [pair if down else pair[::-1] for way in ways for pair in pairwise(way)]
        order = range(1, len(layers)) if down else range(len(layers) - 2, -1, -1)
        for i in order:
            before = layers[i - 1 if down else i + 1]
            place = {name: (k + 0.5) / len(before) for k, name in enumerate(before)}
            means = {}
            for k, name in enumerate(layers[i]):
                seen = [place[a] for a, b in pairs if b == name and a in place]
                means[name] = sum(seen) / len(seen) if seen else (k + 0.5) / len(layers[i])
            layers[i].sort(key=lambda name: (means[name], name))


def placed(layers: list[list[str]]) -> tuple[dict[str, int], int]:
    """The middle of every box and lane, each layer centred; and the width of the picture."""

    def width_of(name: str) -> int:
        return LANE if "@" in name else BOX_WIDTH

    widths = [sum(map(width_of, layer)) + GAP_X * (len(layer) - 1) for layer in layers]
    width = max(widths) + 2 * MARGIN
    xs = {}
    for layer, own in zip(layers, widths, strict=True):
        left = (width - own) // 2
        for name in layer:
            xs[name] = left + width_of(name) // 2
            left += width_of(name) + GAP_X
    return xs, width


def _arrow(points: list[tuple[int, int]]) -> str:
    """From the bottom of the first box, through the lanes, to the top of the last one."""
    x, top = points[0]
    y = top + BOX_HEIGHT
    path = f"M{x} {y}"
    for i, (next_x, next_top) in enumerate(points[1:], 1):
        middle = (y + next_top) // 2
        path += f"C{x} {middle} {next_x} {middle} {next_x} {next_top}"
        x, y = next_x, next_top
        if i < len(points) - 1:
            y += BOX_HEIGHT
            path += f"L{x} {y}"
    return f'<path class="arrow" marker-end="url(#tip)" d="{path}"/>'


def _box(room: Room, x: int, top: int) -> str:
    packages = ", ".join(sorted(room.third_party))
    lines = [("name", room.name)]
    lines += [("knows", line) for line in wrapped(re.sub(r"`", "", room.knows))]
    lines += [("packages", line) for line in wrapped(packages)] if packages else []
    step = 17
    first = top + (BOX_HEIGHT - step * (len(lines) - 1)) // 2 + 5
    left = x - BOX_WIDTH // 2
    text = "".join(
        f'<text class="{kind}" x="{x}" y="{first + i * step}" text-anchor="middle">{html.escape(line)}</text>'
        for i, (kind, line) in enumerate(lines)
    )
    return f'<rect class="box" x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7"/>{text}'


def wrapped(text: str) -> list[str]:
    """`text` in lines that fit a box."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > TEXT_WIDTH:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def main() -> None:
    """Write the picture."""
    path = ROOT / "docs" / "architecture.svg"
    path.write_text(draw(House()))
    print(path)


if __name__ == "__main__":
    main()
