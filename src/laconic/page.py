"""The report: one self-contained HTML page over plan.json, certificate.json and measurements.json of a finished run.

Values go in, text comes out: every picture is a pure function from numbers to inline SVG, drawn twice (wide, and narrow for phones).
Sizes in bytes (MB = 10^6), KL in nats per token, damage in the unit that the plan names, speed in tokens per second."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from laconic.core.errors import UserError

WIDE, NARROW = 936, 350
COLLAPSED = 0.25
SHOWN = 6
VIRIDIS = ("440154", "472c7a", "3b518b", "2c718e", "21908d", "27ad81", "5cc863", "aadc32", "fde725")
BLUES = ("eaf2fa", "c9dff0", "9ecae1", "6baed6", "4292c6", "2171b5", "08519c", "08306b")
SHADES = 24
WORST_CELLS = 60_000
SUPERSCRIPT = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


# numbers as text


def figure(value: float, digits: int = 3) -> str:
    """`digits` significant digits with thousands separators: 0.0123, 4.51, 1,240; below 1e-4 as 4.21×10⁻⁶."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) < 1e-4:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}\u00d710{str(int(power)).translate(SUPERSCRIPT)}"
    value = float(f"{value:.{digits - 1}e}") if abs(value) < 10**digits else value
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def size(count: float) -> str:
    """Bytes in powers of ten: 3.41 MB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= limit:
            return f"{figure(count / limit)}\u00a0{unit}"
    return f"{count:.0f}\u00a0B"


def many(count: float) -> str:
    """A count in short: 7.34 M."""
    for limit, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= limit:
            return f"{figure(count / limit)}\u00a0{unit}"
    return f"{count:,.0f}"


def percent(fraction: float, digits: int = 1) -> str:
    """12.3 %."""
    return f"{100 * fraction:.{digits}f}\u00a0%"


def change(ratio: float) -> str:
    """A relative change with its sign: +2.6 %."""
    return f"{100 * (ratio - 1):+.1f}\u00a0%".replace("-", "\u2212")


def chance(p: float) -> str:
    """A p-value: p < 0.001 or p = 0.012."""
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{figure(p, 2)}"


def level_words(level: Mapping[str, Any]) -> str:
    """A level in a few characters: `4b g128` (4-bit codes, a scale for each 128; `z½`: zeros also half-way; `s8`: scales of 8 bits),
    `+ r8` (rank 8), `2:4`, `keep 50%`."""
    rest = dict(level)
    words: list[str] = []
    inner = rest.pop("first", None) or rest.pop("grid", None)
    if (keep := rest.pop("keep", None)) is not None:
        run = rest.pop("run", None)
        words.append(f"{round(keep * run)}:{run}" if run else f"keep {100 * keep:.0f}%")
    if isinstance(inner, Mapping):
        words.append(level_words(inner))
    if (bits := rest.pop("bits", None)) is not None:
        group = rest.pop("group", None)
        words.append(f"{bits}b {'row' if group is None else f'g{group}'}{' sym' if rest.pop('symmetric', False) else ''}")
        words += ["z½"] if rest.pop("zeros", "whole") == "half" else []
        words += {"log8": ["s8"], "e4m3": ["sf8"]}.get(rest.pop("scales", "bf16"), [])
    if (rank := rest.pop("rank", None)) is not None:
        words.append(f"+ r{rank}")
    words.extend(f"{key} {value}" for key, value in rest.items() if value is not None)
    return " ".join(words) or "as it is"


def nominal_bits(level: Mapping[str, Any]) -> float | None:
    """Stored bits for a weight of a plain grid level; None where the level alone does not tell."""
    if "bits" not in level or "rank" in level or "keep" in level:
        return None
    group = level.get("group")
    zero = 0 if level.get("symmetric") else level["bits"] + (level.get("zeros") == "half")
    beside = (16 if level.get("scales", "bf16") == "bf16" else 8) + zero
    return float(level["bits"]) + (beside / group if group else 0.0)


# where a site stands


class Place(NamedTuple):
    """A row and a column of the map: `layer` is "" outside the stack."""

    layer: str
    part: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """Site name -> Place. The first number in a dotted name is the layer; numbers after it (experts) fall together."""
    raw: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys(names):
        pieces = name.split(".")
        at = next((i for i, piece in enumerate(pieces) if piece.isdigit()), None)
        if at is None:
            raw[name] = ("", name)
        else:
            raw[name] = (".".join(pieces[: at + 1]), ".".join(p for p in pieces[at + 1 :] if not p.isdigit()) or "weight")
    stacks = {layer.rpartition(".")[0] for layer, _ in raw.values() if layer}
    short: dict[str, set[str]] = {}
    for _, part in raw.values():
        short.setdefault(_last(part), set()).add(part)
    return {
        name: Place(
            layer.rpartition(".")[2] if len(stacks) == 1 else layer,
            _last(part) if len(short[_last(part)]) == 1 else part,
        )
        for name, (layer, part) in raw.items()
    }


def _last(part: str) -> str:
    return part.rpartition(".")[2].removesuffix("_proj")


# drawing


def tag(name: str, text: str = "", **attributes: object) -> str:
    """One SVG element; `text` is escaped unless it is Markup; attribute class_ is class, stroke_width is stroke-width."""
    pairs = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"' for key, value in attributes.items())
    inner = str(text) if isinstance(text, Markup) else escape(text)
    return f"<{name}{pairs}>{inner}</{name}>" if inner else f"<{name}{pairs}/>"


def _short(value: object) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def titled(name: str, title: str, **attributes: object) -> str:
    """An element that says what it is under the pointer and to a reader of the screen."""
    return tag(name, Markup(tag("title", title)), **attributes)


def picture(width: float, height: float, label: str, parts: Iterable[str]) -> Markup:
    """An inline SVG of fixed size with an accessible name."""
    head = tag("title", label)
    return Markup(
        f'<svg role="img" aria-label="{escape(label)}" width="{_short(width)}" height="{_short(height)}" '
        f'viewBox="0 0 {_short(width)} {_short(height)}">{head}{"".join(parts)}</svg>'
    )


def both(draw: Callable[[float], Markup]) -> Markup:
    """The same picture for a wide window and for a phone; the style sheet shows one of them."""
    return Markup(f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>')


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] to [start, stop] pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        scale = math.log10 if self.log else float
        span = scale(self.high) - scale(self.low)
        return self.start + (scale(value) - scale(self.low)) / (span or 1.0) * (self.stop - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """About `wanted` round values inside."""
        if self.log:
            low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if high - low <= 3 else (1,)
            found = [step * 10.0**power for power in range(low, high + 1) for step in steps]
            return [value for value in found if self.low <= value <= self.high]
        rough = (self.high - self.low) / max(wanted, 1)
        power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
        step = next((m * power for m in (1, 2, 5, 10) if m * power >= rough), power)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def shade(fraction: float, anchors: Sequence[str] = VIRIDIS) -> str:
    """Colour at `fraction` (0 to 1) of a palette, as #rrggbb."""
    at = min(max(fraction, 0.0), 1.0) * (len(anchors) - 1)
    i = min(int(at), len(anchors) - 2)
    pair = [[int(c[k : k + 2], 16) for k in (0, 2, 4)] for c in anchors[i : i + 2]]
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02x}" for a, b in zip(pair[0], pair[1], strict=True))


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    linear = [(c / 255) ** 2.2 for c in (int(colour[k : k + 2], 16) for k in (1, 3, 5))]
    return "#fff" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.18 else "#111"


# the Pareto picture


class Mark(NamedTuple):
    """One point of the picture: `kind` is its style, `low` and `high` its interval if there is one."""

    kind: str
    says: str
    bytes: float
    kl: float
    low: float | None = None
    high: float | None = None


def symbol(kind: str, x: float, y: float, title: str = "") -> str:
    """The sign of a kind of point; shapes differ, so that colour alone carries nothing."""
    if kind == "certified":
        d = f"M{x:.1f} {y - 8:.1f}l8 8l-8 8l-8-8z"
        return titled("path", title, d=d, class_="m-certified") if title else tag("path", d=d, class_="m-certified")
    if kind == "uniform":
        return titled("rect", title, x=x - 6, y=y - 6, width=12, height=12, class_="m-uniform")
    return titled("circle", title, cx=x, cy=y, r={"solved": 6, "chosen": 9, "cut": 5}.get(kind, 2.6), class_=f"m-{kind}")


def pareto_picture(width: float, frontier: Sequence[Mapping[str, Any]], marks: Sequence[Mark], parameters: float, unit: str) -> Markup:
    """Size in bytes (below) and bits per weight (above) against damage or KL on a log axis."""
    wide = width > 500
    height, left, right, top, bottom = (430 if wide else 340), 66, 22, 56, 50
    points = [(float(p["bytes"]), float(p["damage"])) for p in frontier if p["damage"] > 0]
    xs = [x for x, _ in points] + [m.bytes for m in marks]
    ys = [y for _, y in points] + [v for m in marks for v in (m.kl, m.low, m.high) if v is not None and v > 0]
    pad = 0.04 * ((max(xs) - min(xs)) or max(xs) or 1.0)
    x = Axis(min(xs) - pad, max(xs) + pad, left, width - right)
    y = Axis(min(ys) / 1.35, max(ys) * 1.35, height - bottom, top, log=True)
    out: list[str] = []
    for value in y.ticks(6):
        out.append(tag("line", x1=left, x2=width - right, y1=y(value), y2=y(value), class_="grid"))
        out.append(tag("text", figure(value, 1), x=left - 8, y=y(value) + 4, class_="tick end"))
    unit_bytes, unit_name = next(((b, n) for b, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if x.high >= b), (1.0, "B"))
    for value in Axis(x.low / unit_bytes, x.high / unit_bytes, left, width - right).ticks(8 if wide else 4):
        at = x(value * unit_bytes)
        out.append(tag("line", x1=at, x2=at, y1=top, y2=height - bottom, class_="grid"))
        out.append(tag("text", f"{value:g}", x=at, y=height - bottom + 18, class_="tick mid"))
    out.append(tag("text", f"size, {unit_name}", x=(left + width - right) / 2, y=height - 8, class_="axis mid"))
    if parameters:
        bits = Axis(x.low * 8 / parameters, x.high * 8 / parameters, left, width - right)
        for value in bits.ticks(8 if wide else 4):
            out.append(tag("line", x1=bits(value), x2=bits(value), y1=top - 5, y2=top, class_="rule"))
            out.append(tag("text", f"{value:g}", x=bits(value), y=top - 10, class_="tick mid"))
        out.append(tag("text", "bits per weight", x=(left + width - right) / 2, y=16, class_="axis mid"))
        out.append(tag("line", x1=left, x2=width - right, y1=top, y2=top, class_="rule"))
    middle = (top + height - bottom) / 2
    out.append(tag("text", unit, x=15, y=middle, transform=f"rotate(-90 15 {middle:.0f})", class_="axis mid"))
    out.append(tag("line", x1=left, x2=width - right, y1=height - bottom, y2=height - bottom, class_="rule"))
    if points:
        path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
        out.append(tag("path", d=path, class_="frontier"))
        if len(points) <= 60:
            out.extend(symbol("predicted", x(a), y(b), f"predicted: {size(a)}, {figure(b)}") for a, b in points)
    for mark in marks:
        if mark.low and mark.high and mark.low > 0:
            out.append(tag("path", d=f"M{x(mark.bytes):.1f} {y(mark.low):.1f}V{y(mark.high):.1f}", class_="whisker"))
        if mark.kl > 0:
            out.append(symbol(mark.kind, x(mark.bytes), y(mark.kl), f"{mark.says}: {size(mark.bytes)}, {figure(mark.kl)}"))
    return picture(width, height, f"Size against {unit}: predicted frontier and {', '.join(m.says for m in marks)}", out)


# the heat map


class Cell(NamedTuple):
    """All rows of the menu at one place and level: summed damage and bytes, and whether the plan chose it."""

    damage: float
    bytes: int
    chosen: bool


Column = tuple[str, str]


class Heat(NamedTuple):
    """The menu as a table: (part, layer, column) -> Cell, with the axes in order and the span of log10 damage."""

    parts: tuple[str, ...]
    layers: tuple[str, ...]
    columns: tuple[Column, ...]
    cells: Mapping[tuple[str, str, Column], Cell]
    span: tuple[float, float]
    unit: str


def heat_of(menu: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, Any]]) -> Heat:
    """Rows of one place and level are added (experts of one layer, say); rows that were not priced (damage null) are left out."""
    menu = [row for row in menu if row["damage"]["value"] is not None]
    where = places(row["site"] for row in menu)
    picked = {(row["site"], _column(row)) for row in choices}
    dearest: dict[str, float] = {}
    for row in menu:
        dearest[row["site"]] = max(dearest.get(row["site"], 1.0), float(row["bytes"]))
    cells: dict[tuple[str, str, Column], Cell] = {}
    price: dict[Column, list[float]] = {}
    for row in menu:
        place, column = where[row["site"]], _column(row)
        key = (place.part, place.layer, column)
        old = cells.get(key, Cell(0.0, 0, False))
        chosen = old.chosen or (row["site"], column) in picked
        cells[key] = Cell(old.damage + float(row["damage"]["value"]), old.bytes + int(row["bytes"]), chosen)
        price.setdefault(column, []).append(row["bytes"] / dearest[row["site"]])
    order = sorted(price, key=lambda c: (c[0], sum(price[c]) / len(price[c]), c[1]))
    logs = [math.log10(cell.damage) for cell in cells.values() if cell.damage > 0]
    found = list(where.values())
    return Heat(
        tuple(dict.fromkeys(p.part for p in sorted(found, key=lambda p: not p.layer))),
        tuple(dict.fromkeys(p.layer for p in found if p.layer)),
        tuple(order),
        cells,
        (min(logs, default=0.0), max(logs, default=1.0)),
        str(menu[0]["damage"]["unit"]) if menu else "",
    )


def _column(row: Mapping[str, Any]) -> Column:
    return str(row["method"]), level_words(row["level"])


def heat_panel(heat: Heat, parts: Sequence[str], columns: Sequence[Column], title: str, wide_cells: bool) -> Markup:
    """One panel: layers (or sites outside the stack) downwards, levels across; one path for each shade keeps it small."""
    alone = len(parts) > 1 or not any((parts[0], layer, c) in heat.cells for layer in heat.layers for c in columns)
    lines = [(part, "") for part in parts] if alone else [(parts[0], layer) for layer in heat.layers]
    labels = [part if alone else layer for part, layer in lines]
    tall = 17 if len(lines) <= 16 else 12 if len(lines) <= 40 else 9
    broad = 16 if wide_cells else 11
    left = 10 + 7.2 * max(len(_clip(label)) for label in labels)
    runs = list(dict.fromkeys(method for method, _ in columns))
    xs = [left + j * broad + 7 * runs.index(method) for j, (method, _) in enumerate(columns)]
    top = (30 if len(runs) == 1 else 46) + 5.9 * max(len(words) for _, words in columns)
    stride = max(1, math.ceil(11 / tall), 4 if len(lines) > 40 else 1)
    low, high = heat.span
    paths: dict[int, list[str]] = {}
    rings: list[str] = []
    table: list[list[str | None]] = []
    for i, (part, layer) in enumerate(lines):
        values: list[str | None] = []
        for j, column in enumerate(columns):
            cell = heat.cells.get((part, layer, column))
            values.append(None if cell is None else f"{figure(cell.damage)}|{size(cell.bytes)}")
            if cell is None:
                continue
            at = (math.log10(cell.damage) - low) / ((high - low) or 1.0) if cell.damage > 0 else 0.0
            paths.setdefault(round(at * (SHADES - 1)), []).append(f"M{xs[j]:.1f} {top + i * tall:.0f}h{broad - 1}v{tall - 1}h-{broad - 1}z")
            if cell.chosen:
                rings.append(f"M{xs[j] + 1:.1f} {top + i * tall + 1:.1f}h{broad - 3}v{tall - 3}h-{broad - 3}z")
        table.append(values)
    out = [tag("text", title, x=left, y=13, class_="panel")]
    for j, (_, words) in enumerate(columns):
        at = xs[j] + broad / 2 + 3.5
        out.append(tag("text", words, x=at, y=top - 5, transform=f"rotate(-90 {at:.1f} {top - 5:.1f})", class_="level"))
    for method in runs if len(runs) > 1 else ():
        out.append(tag("text", method.rpartition(".")[2], x=xs[[m for m, _ in columns].index(method)], y=31, class_="level"))
    for i, label in enumerate(labels):
        if i % stride == 0:
            out.append(tag("text", _clip(label), x=left - 5, y=top + i * tall + tall / 2 + 3.5, class_="tick end"))
    out.extend(tag("path", d="".join(d), fill=shade(k / (SHADES - 1))) for k, d in sorted(paths.items()))
    out.extend(tag("path", d="".join(rings), class_=name) for name in ("ring-under", "ring") if rings)
    width, height = max(xs[-1] + broad + 2, left + 7.6 * len(title)), top + tall * len(lines) + 2
    data = {
        "x": [round(x, 1) for x in xs], "y": top, "w": broad, "h": tall, "unit": heat.unit, "cells": table,
        "rows": [label if alone else f"layer {label}, {parts[0]}" for label in labels],
        "columns": [f"{method}, {words}" for method, words in columns],
    }  # fmt: skip
    drawn = picture(width, height, f"Damage of {title}: layers downwards, levels across, the chosen cell outlined", out)
    return Markup(f'<div class="panel" data-heat="{escape(json.dumps(data, ensure_ascii=False, separators=(",", ":")))}">{drawn}</div>')


def _clip(label: str, limit: int = 16) -> str:
    pieces = label.split(".")
    while len(".".join(pieces)) > limit and len(pieces) > 1:
        pieces.pop(0)
    short = ".".join(pieces)
    return short if len(short) <= limit else "\u2026" + short[1 - limit :]


class Tab(NamedTuple):
    """The panels of one method, or of all."""

    name: str
    panels: list[Markup]


def heat_tabs(heat: Heat) -> list[Tab]:
    """A tab for each method, most often chosen first, after one with all of them where they fit side by side."""
    inside = [part for part in heat.parts if any((part, layer, c) in heat.cells for layer in heat.layers for c in heat.columns)]
    outside = [part for part in heat.parts if any((part, "", c) in heat.cells for c in heat.columns)]
    used: dict[str, int] = {}
    for (_, _, (method, _)), cell in heat.cells.items():
        used[method] = used.get(method, 0) + cell.chosen

    def panels(columns: Sequence[Column], roomy: bool) -> list[Markup]:
        found = []
        for group, title in [([part], part) for part in inside] + ([(outside, "outside the layers")] if outside else []):
            present = [c for c in columns if any(key[2] == c and key[0] in group for key in heat.cells)]
            if present:
                found.append(heat_panel(heat, group, present, title, roomy))
        return found

    by_method = {m: [c for c in heat.columns if c[0] == m] for m in sorted(used, key=lambda m: -used[m])}
    tabs = [Tab(f"{method} \u00b7 {used[method]} chosen", panels(columns, len(columns) <= 17)) for method, columns in by_method.items()]
    if len(by_method) > 1 and len(heat.columns) <= 48 and len(heat.cells) < WORST_CELLS // 4:
        tabs.append(Tab("all methods", panels([c for columns in by_method.values() for c in columns], False)))
    return tabs


def heat_scale(heat: Heat, width: float) -> Markup:
    """The colour bar."""
    low, high = heat.span
    bar = min(width, 420.0) - 60
    out = [tag("rect", x=30 + i * bar / 48, y=2, width=bar / 48 + 0.6, height=12, fill=shade(i / 47)) for i in range(48)]
    for fraction in (0, 0.5, 1):
        text = figure(10 ** (low + fraction * (high - low)), 2)
        out.append(tag("text", text, x=30 + fraction * bar, y=30, class_="tick mid"))
    return picture(bar + 60, 36, f"Colour scale: damage in {heat.unit}, logarithmic", out)


# bits and damage by layer


class Spot(NamedTuple):
    """What the plan bought at one place."""

    bits: float | None
    damage: float | None
    says: str


def layer_picture(width: float, spots: Mapping[Place, Spot], unit: str) -> Markup:
    """A row for each layer: bits of each part as cells, damage as a bar; sites outside the layers below."""
    layers = list(dict.fromkeys(p.layer for p in spots if p.layer))
    parts = list(dict.fromkeys(p.part for p in spots if p.layer))
    outside = [p for p in spots if not p.layer]
    wide = width > 500
    tall = 22 if len(layers) <= 40 else 17
    names = [_clip(p.part, 22) for p in outside]
    # a phone has no room for long names at the left: there they stand above their row
    extra = 0 if wide else 16
    left = 14 + 7.2 * max((len(name) for name in layers + (names if wide else [])), default=1)
    room = (width - left) * (0.56 if wide else 0.58)
    broad = min(max(room / max(len(parts), 1), 26.0), 64.0)
    steep = any(len(part) * 6.2 > broad - 2 for part in parts)
    top = 40 + (5.8 * max((len(_clip(part, 14)) for part in parts), default=0) if steep else 0)
    bar_at = left + broad * max(len(parts), 2) + (18 if wide else 8)
    width = max(width, bar_at + 90)
    room_for_bar = width - bar_at - (62 if wide else 50)
    bits = [s.bits for s in spots.values() if s.bits is not None]
    low, high = min(bits, default=0.0), max(bits, default=1.0)
    priced = all(spot.damage is not None for spot in spots.values())
    totals = {layer: sum(s.damage or 0.0 for p, s in spots.items() if p.layer == layer) for layer in layers}
    most = max([*totals.values(), *(spots[p].damage or 0.0 for p in outside), 0.0]) or 1.0
    out = [tag("text", "bits per weight", x=left, y=13, class_="axis")]
    if priced:
        out.append(tag("text", "damage", x=bar_at, y=13, class_="axis"))
    for j, part in enumerate(parts):
        at = left + j * broad + broad / 2
        turn = {"transform": f"rotate(-90 {at + 4:.1f} {top - 6:.1f})", "class_": "level"} if steep else {"class_": "tick mid"}
        out.append(tag("text", _clip(part, 14), x=at + (4 if steep else 0), y=top - 6, **turn))

    def cell(spot: Spot, x: float, y: float, w: float) -> None:
        known = spot.bits is not None
        colour = shade(((spot.bits or 0.0) - low) / ((high - low) or 1.0), BLUES) if known else ""
        fill = {"fill": colour} if known else {"class_": "unknown"}
        out.append(titled("rect", spot.says, x=x, y=y, width=w - 2, height=tall - 2, rx=2, **fill))
        ink = {"style": f"fill:{ink_on(colour)}"} if known else {}
        text = f"{spot.bits:.1f}" if known else "\u2013"
        out.append(tag("text", text, x=x + (w - 2) / 2, y=y + tall / 2 + 3, class_="cell mid", **ink))

    def bar(value: float, y: float, says: str) -> None:
        if not priced:
            return
        out.append(titled("rect", says, x=bar_at, y=y + 1, width=max(room_for_bar * value / most, 1.0), height=tall - 5, class_="bar"))
        out.append(tag("text", figure(value, 2), x=bar_at + room_for_bar * value / most + 6, y=y + tall / 2 + 3, class_="tick"))

    for i, layer in enumerate(layers):
        y = top + i * tall
        out.append(tag("text", layer, x=left - 8, y=y + tall / 2 + 3, class_="tick end"))
        for j, part in enumerate(parts):
            if (spot := spots.get(Place(layer, part))) is not None:
                cell(spot, left + j * broad, y, broad)
        bar(totals[layer], y, f"layer {layer}: damage {figure(totals[layer])} {unit}")
    for i, place in enumerate(outside):
        y = top + (len(layers) + i) * tall + (i + 1) * extra + (8 if layers else 0)
        if wide:
            out.append(tag("text", names[i], x=left - 8, y=y + tall / 2 + 3, class_="tick end"))
        else:
            out.append(tag("text", names[i], x=left, y=y - 4, class_="tick"))
        cell(spots[place], left, y, broad * max(len(parts), 2))
        bar(spots[place].damage or 0.0, y, f"{place.part}: damage {figure(spots[place].damage or 0.0)} {unit}")
    height = top + len(layers) * tall + len(outside) * (tall + extra) + 14
    return picture(width, height, "Bits per weight of each layer and part, and damage by layer", out)


def spots_of(choices: Sequence[Mapping[str, Any]], weights: Callable[[Mapping[str, Any]], float | None]) -> dict[Place, Spot]:
    """Chosen rows by place; rows of one place (experts) are added."""
    where = places(row["site"] for row in choices)
    grouped: dict[Place, list[Mapping[str, Any]]] = {}
    for row in choices:
        grouped.setdefault(where[row["site"]], []).append(row)
    found: dict[Place, Spot] = {}
    for place, rows in grouped.items():
        counts = [weights(row) for row in rows]
        bits = 8 * sum(r["bytes"] for r in rows) / sum(c or 0 for c in counts) if all(counts) else nominal_bits(rows[0]["level"])
        values = [r["damage"]["value"] for r in rows]
        damage = None if None in values else float(sum(values))
        how = ", ".join(dict.fromkeys(f"{r['method']} {level_words(r['level'])}" for r in rows))
        name = rows[0]["site"] if len(rows) == 1 else f"{len(rows)} sites of layer {place.layer}, {place.part}"
        stored = size(sum(r["bytes"] for r in rows))
        density = "" if bits is None else f", {bits:.2f} bits per weight"
        harm = "" if damage is None else f", damage {figure(damage)} {rows[0]['damage']['unit']}"
        says = f"{name}: {how}, {stored}{density}{harm}"
        found[place] = Spot(bits, damage, says)
    return found


def counter(out: Path) -> Callable[[Mapping[str, Any]], float | None]:
    """Weights that a chosen row covers: `parameters` of the row, else the shapes that the stored forms name, else None."""
    forms: Mapping[str, Any] = {}
    for name in ("config.json", "laconic.json"):
        if (out / name).is_file():
            stored = _read(out / name)
            forms = stored.get("quantization_config", stored).get("forms", forms)

    def count(row: Mapping[str, Any]) -> float | None:
        if row.get("parameters"):
            return float(row["parameters"])
        shapes = [shape_of(forms.get(name, {})) for name in row["covers"]]
        return float(sum(math.prod(s) for s in shapes if s)) if shapes and all(shapes) else None

    return count


def shape_of(form: Mapping[str, Any]) -> Sequence[int] | None:
    """The shape of a described form; that of its first term for a sum."""
    if "shape" in form:
        return list(form["shape"])
    return shape_of(form["terms"][0]) if form.get("terms") else None


# speed


class Bar(NamedTuple):
    """One measured speed in tokens per second with its spread."""

    who: str
    value: float
    low: float | None
    high: float | None


def speed_picture(width: float, groups: Sequence[tuple[str, Sequence[Bar]]], unit: str = "tokens/s") -> Markup:
    """Bars from zero, original above compressed, each group on its own scale, whiskers from low to high."""
    left, right, tall = 86, 130, 24
    out: list[str] = []
    y = 6.0
    for name, bars in groups:
        x = Axis(0.0, max(max(b.value, b.high or 0.0) for b in bars) or 1.0, left, width - right)
        out.append(tag("text", name, x=0, y=y + 12, class_="panel"))
        y += 20
        for b in bars:
            spread = f", {figure(b.low)} to {figure(b.high)}" if b.low is not None and b.high is not None else ""
            says = f"{name}, {b.who}: {figure(b.value)} {unit}{spread}"
            kind = "bar-original" if b.who == "original" else "bar"
            out.append(tag("text", b.who, x=left - 8, y=y + 15, class_="tick end"))
            out.append(titled("rect", says, x=left, y=y + 2, width=max(x(b.value) - left, 1.0), height=tall - 6, class_=kind))
            end = x(b.value)
            if b.low is not None and b.high is not None:
                out.append(
                    tag(
                        "path",
                        d=f"M{x(b.low):.1f} {y + 11:.1f}H{x(b.high):.1f}M{x(b.low):.1f} {y + 7:.1f}v8M{x(b.high):.1f} {y + 7:.1f}v8",
                        class_="whisker",
                    )
                )
                end = max(end, x(b.high))
            out.append(tag("text", f"{figure(b.value)} {unit}", x=end + 8, y=y + 15, class_="tick strong"))
            y += tall
        y += 10
    return picture(width, y, "Speed of the original and the compressed model: " + ", ".join(name for name, _ in groups), out)


def spread_of(block: Mapping[str, Any], key: str, value: float) -> tuple[float | None, float | None]:
    """The interval of a measured value from `details`."""
    detail = (block.get("details") or {}).get(key) or {}
    if detail.get("low") is not None and detail.get("high") is not None:
        return float(detail["low"]), float(detail["high"])
    if isinstance(detail.get("spread"), (int, float)):
        return value - float(detail["spread"]), value + float(detail["spread"])
    return None, None


SPEEDS = (("decode", "decode_tokens_per_s"), ("prefill", "prefill_tokens_per_s"))


def speed_groups(measured: Mapping[str, Any]) -> list[tuple[str, list[Bar]]]:
    """Bars of what was measured."""
    original = dict(measured.get("original") or {})
    details = measured.get("details") or {}
    original.setdefault("details", {key: details.get(f"{key}_original") for _, key in SPEEDS})
    found: list[tuple[str, list[Bar]]] = []
    for name, key in SPEEDS:
        pairs = (("original", original), ("compressed", measured))
        if bars := [Bar(who, float(b[key]), *spread_of(b, key, float(b[key]))) for who, b in pairs if b.get(key)]:
            found.append((name, bars))
    return found


def ratios(measured: Mapping[str, Any]) -> dict[str, float]:
    """Compressed over original for each speed that both have."""
    groups = ((name, {b.who: b.value for b in bars}) for name, bars in speed_groups(measured))
    return {name: by["compressed"] / by["original"] for name, by in groups if len(by) == 2}


# generations


PIECE = re.compile(r"\s*\S+|\s+\Z")


class Pair(NamedTuple):
    """A prompt and two answers, each cut at the first token that differs: (same, differing token, rest)."""

    prompt: str
    original: tuple[str, str, str]
    compressed: tuple[str, str, str]
    says: str


def pair_of(generation: Mapping[str, Any]) -> Pair:
    """`original` and `compressed` are lists of tokens, or plain text, which is compared word by word."""
    sides = [generation[key] for key in ("original", "compressed")]
    unit = "word" if any(isinstance(side, str) for side in sides) else "token"
    pieces = [PIECE.findall(side) if isinstance(side, str) else [str(t) for t in side] for side in sides]
    same = next((i for i, (a, b) in enumerate(zip(*pieces, strict=False)) if a != b), min(len(p) for p in pieces))
    cut = [("".join(p[:same]), "".join(p[same : same + 1]), "".join(p[same + 1 :])) for p in pieces]
    if same == len(pieces[0]) == len(pieces[1]):
        says = f"identical, {same} {unit}s"
    else:
        says = f"first {same} {unit}{'' if same == 1 else 's'} equal" if same else f"they differ from the first {unit} on"
    return Pair(str(generation["prompt"]), cut[0], cut[1], says)


# facts in words


class Tile(NamedTuple):
    """One headline number: `tone` is plain, good or bad."""

    label: str
    value: str
    note: str
    tone: str = "plain"


def tiles(certificate: Mapping[str, Any], measured: Mapping[str, Any] | None, quality: Mapping[str, Any]) -> list[Tile]:
    """The headline. A number that was not measured has no tile; speed is not shown beside a failed reload check."""
    before, after, bits = certificate["bytes_original"], certificate["bytes"], certificate["bits_per_weight"]
    found = [
        Tile(
            "Size",
            f"{size(before)} \u2192 {size(after)}",
            f"{figure(before / after)}\u00d7 smaller, {percent(after / before)} of the original, {figure(bits)} bits per weight",
        )
    ]
    if "kl_mean" in quality:
        interval = (
            f"95\u00a0% interval {figure(quality['kl_mean_low'])} to {figure(quality['kl_mean_high'])}, "
            if "kl_mean_low" in quality
            else ""
        )
        found.append(
            Tile(
                "KL to the original, mean",
                figure(quality["kl_mean"]),
                f"{interval}nats per {'sample' if 'accuracy' in quality else 'token'}",
            )
        )
    if collapsed(quality):
        found.append(
            Tile("Quality", "collapsed", f"top-1 agreement {percent(quality['top1_agreement'])} is under {percent(COLLAPSED, 0)}", "bad")
        )
    elif "perplexity" in quality:
        was, now = quality.get("perplexity_original"), quality["perplexity"]
        note = (
            "per token"
            if was is None
            else f"{change(now / was)} per token"
            + (f", {chance(quality['perplexity_p_value'])} (paired)" if "perplexity_p_value" in quality else "")
        )
        found.append(Tile("Perplexity", figure(now) if was is None else f"{figure(was)} \u2192 {figure(now)}", note))
    if "accuracy" in quality:
        was = quality.get("accuracy_original")
        found.append(
            Tile(
                "Accuracy",
                percent(quality["accuracy"]) if was is None else f"{percent(was)} \u2192 {percent(quality['accuracy'])}",
                "of the certified examples",
            )
        )
    if "top1_agreement" in quality and not collapsed(quality):
        found.append(Tile("Top-1 agreement", percent(quality["top1_agreement"], 2), "of predictions are those of the original"))
    if (load := certificate.get("multiplications")) is not None:
        most = f"of the original\u2019s on average, {percent(load['worst'] / load['dense'])} at most; {load['unit']}"
        found.append(Tile("Multiplications", percent(load["expected"] / load["dense"]), most))
    if measured and reload_ok(certificate):
        speed = ratios(measured)
        for name, ratio in speed.items():
            word = "of the original\u2019s speed: slower" if ratio < 1 else "of the original\u2019s speed"
            found.append(Tile(f"{name.capitalize()} speed", f"{ratio:.2f}\u00d7", word, "bad" if ratio < 1 else "plain"))
    return found


def collapsed(quality: Mapping[str, Any]) -> bool:
    """Top-1 agreement with the original under 25 %."""
    return float(quality.get("top1_agreement", 1.0)) < COLLAPSED


def reload_ok(certificate: Mapping[str, Any]) -> bool:
    """Whether the stored artifact, loaded back, gave what was searched."""
    return bool((certificate.get("reload") or {}).get("ok", False))


QUALITY_WORDS = {
    "perplexity": "perplexity, compressed",
    "perplexity_original": "perplexity, original",
    "perplexity_p_value": "perplexity, p of the paired test",
    "kl_mean": "KL, mean",
    "kl_median": "KL, median",
    "kl_p95": "KL, 95th percentile",
    "kl_p99": "KL, 99th percentile",
    "kl_p999": "KL, 99.9th percentile",
    "top1_agreement": "top-1 agreement",
    "accuracy": "accuracy, compressed",
    "accuracy_original": "accuracy, original",
    "accuracy_p_value": "accuracy, p of the paired test",
}


class Line(NamedTuple):
    """One line of the table of quality."""

    name: str
    value: str
    interval: str
    unit: str
    n: str


def quality_lines(quality: Mapping[str, Any], details: Mapping[str, Any]) -> list[Line]:
    """Every measured number with unit, interval and count."""
    found: list[Line] = []
    for key, name in QUALITY_WORDS.items():
        if key not in quality:
            continue
        detail = details.get(key) or {}
        share = key in ("top1_agreement", "accuracy", "accuracy_original")
        words: Callable[[float], str] = (
            (lambda v: percent(v, 2)) if share else (lambda v: figure(v, 2)) if key.endswith("p_value") else figure
        )
        low, high = detail.get("low", quality.get(f"{key}_low")), detail.get("high", quality.get(f"{key}_high"))
        interval = "" if low is None or high is None else f"{words(low)} to {words(high)}"
        unit = str(detail.get("unit") or ("nats per token" if key.startswith("kl") else "")).replace("/", " per ")
        n = detail.get("n")
        found.append(
            Line(
                name,
                words(quality[key]),
                interval,
                "" if share and unit in ("1", "fraction", "share") else str(unit),
                f"{n:,}" if isinstance(n, int) else str(n or ""),
            )
        )
    return found


def facts(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested value as flat lines of key and text."""
    if isinstance(value, Mapping):
        return [line for key, inner in value.items() for line in facts(inner, f"{prefix} {str(key).replace('_', ' ')}".strip())]
    if prefix.endswith(" bytes") and isinstance(value, int):
        return [(prefix.removesuffix(" bytes"), size(value))]
    if isinstance(value, (list, tuple)):
        return [(prefix, ", ".join(str(item) for item in value))] if value else []
    return [(prefix, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value > 9999 else str(value))]


class Kept(NamedTuple):
    """Tensors that no method touched, for one reason."""

    why: str
    number: int
    bytes: str
    names: list[str]


def kept_of(kept: Sequence[Mapping[str, Any]]) -> list[Kept]:
    """By reason, most bytes first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in kept:
        groups.setdefault(str(row["why"]), []).append(row)
    ranked = sorted(groups.items(), key=lambda item: -sum(r["bytes"] for r in item[1]))
    return [Kept(why, len(rows), size(sum(r["bytes"] for r in rows)), [r["tensor"] for r in rows]) for why, rows in ranked]


def _was_cut(row: Mapping[str, Any]) -> bool:
    return str(row["why"]).startswith("cut from")


def marks_of(plan: Mapping[str, Any], certificate: Mapping[str, Any], quality: Mapping[str, Any], on_kl: bool) -> list[Mark]:
    """The points to draw: judged plans, the chosen plan as predicted, and what was certified."""
    judged = {
        "solved": "chosen plan, judged on the search part",
        "uniform": "best uniform plan, judged on the search part",
        "tuned": "the better plan, tuned, judged on the search part",
    }
    found = [Mark(j["plan"], judged.get(j["plan"], j["plan"]), j["bytes"], j["kl"]) for j in plan.get("judged") or () if on_kl]
    predicted = plan.get("predicted") or {}
    if predicted.get("damage"):
        damage = predicted["damage"]
        value = float(damage["value"]) if isinstance(damage, Mapping) else float(damage)
        found.append(Mark("chosen", "chosen plan, predicted", predicted["bytes"], value))
    for one in certificate.get("elastic") or () if on_kl else ():
        says = "the same file cut when it is loaded, certified"
        found.append(Mark("cut", says, one["bytes"], one["kl_mean"], one.get("kl_mean_low"), one.get("kl_mean_high")))
    if on_kl and "kl_mean" in quality:
        mark = Mark(
            "certified",
            "result, certified",
            certificate["bytes"],
            quality["kl_mean"],
            quality.get("kl_mean_low"),
            quality.get("kl_mean_high"),
        )
        found.append(mark)
    return found


def legend_of(marks: Sequence[Mark], unit: str) -> list[tuple[Markup, str, str]]:
    """Sign, meaning and numbers of each point."""
    found = []
    for mark in marks:
        drawn = Markup(f'<svg width="22" height="22" aria-hidden="true">{symbol(mark.kind, 11, 11)}</svg>')
        interval = f" ({figure(mark.low)} to {figure(mark.high)})" if mark.low is not None and mark.high is not None else ""
        found.append((drawn, mark.says, f"{size(mark.bytes)}, {figure(mark.kl)}{interval} {unit}"))
    return found


# the page


def render(out: Path, *, against: str | None = None, generations: list[dict[str, Any]] | None = None) -> Path:
    """Write `out`/report.html and return its path.

    against: how to call the original (default: as the plan names it). generations: {"prompt", "original", "compressed"} each, answers as
    text or as lists of decoded tokens. Raises UserError where `out` is no finished result."""
    out = Path(out)
    if not (out / "certificate.json").is_file() or not (out / "plan.json").is_file():
        raise UserError(
            f"{out} is not a result of laconic (no certificate.json and plan.json in it): name the folder that laconic compress wrote"
        )
    plan, certificate = _read(out / "plan.json"), _read(out / "certificate.json")
    measured = _read(out / "measurements.json") if (out / "measurements.json").is_file() else None
    quality, model = certificate.get("quality") or {}, plan["model"]
    menu, choices = plan.get("menu") or plan["choices"], plan["choices"]
    unit = str(choices[0]["damage"]["unit"] or "") if choices else ""
    priced = any(row["damage"]["value"] is not None for row in choices)
    # a plan without prices has only measured points, and those are KL
    unit = unit if priced and unit else "nats per sample" if "accuracy" in quality else "nats per token"
    on_kl = unit.startswith("nats")
    frontier, marks = plan.get("pareto") or [], marks_of(plan, certificate, quality, on_kl)
    label = f"KL, {unit}" if on_kl else f"predicted damage, {unit}"
    heat = heat_of(menu, choices)
    spots = spots_of(choices, counter(out))
    groups = speed_groups(measured) if measured else []
    name = against or model.get("spec") or "nano"
    values = {
        "name": str(name).rstrip("/").rpartition("/")[2] or name,
        "against": name,
        "out": out.resolve().name,
        "plan": plan,
        "certificate": certificate,
        "measured": measured,
        "quality": quality,
        "sound": reload_ok(certificate),
        "collapsed": collapsed(quality),
        "tiles": tiles(certificate, measured, quality),
        "ratios": ratios(measured or {}),
        "lines": quality_lines(quality, certificate.get("details") or {}),
        "pareto": both(lambda w: pareto_picture(w, frontier, marks, model.get("parameters", 0), label))
        if any(p["damage"] > 0 for p in frontier) or any(m.kl > 0 for m in marks)
        else None,
        "legend": legend_of(marks, unit),
        "frontier": frontier,
        "tabs": heat_tabs(heat) if len(heat.cells) <= WORST_CELLS else [],
        "scale": heat_scale(heat, NARROW),
        "heat": heat,
        "unit": unit,
        "priced": priced,
        "where": choices[0]["damage"].get("where", "") if choices else "",
        "layers": both(lambda w: layer_picture(w, spots, unit)) if spots else None,
        "kept": kept_of([row for row in plan.get("kept") or () if not _was_cut(row)]),
        "cut": plan.get("cut"),
        "smaller": kept_of([row for row in plan.get("kept") or () if _was_cut(row)]),
        "speed": both(lambda w: speed_picture(w, groups)) if groups else None,
        "pairs": [pair_of(g) for g in generations or ()],
        "data": data_table(certificate.get("data") or plan.get("data") or {}),
        "shown": SHOWN,
        "peak_of": ((measured or {}).get("details") or {}).get("peak_memory_bytes", {}).get("what", "process tree"),
        "one_line": f"laconic bench {out.name} --against {model['spec']}" if model.get("spec") else f"laconic bench {out.name}",
    }
    page = _environment().get_template("report.html.j2").render(values)
    target = out / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


class Table(NamedTuple):
    """The three parts of the data side by side, and all that is said of them together."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    rest: list[tuple[str, str]]


def data_table(record: Mapping[str, Any]) -> Table:
    """The record of the split; parts that are mappings make the table."""
    parts = {
        key: dict(facts(value)) for key, value in record.items() if key in ("calibrate", "search", "certify") and isinstance(value, Mapping)
    }
    columns = list(dict.fromkeys(key for part in parts.values() for key in part))
    rows = [(name, [part.get(column, "") for column in columns]) for name, part in parts.items()]
    return Table(columns, rows, facts({key: value for key, value in record.items() if key not in parts}))


def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(size=size, figure=figure, percent=percent, many=many, facts=facts)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run laconic compress again with --overwrite") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: run laconic compress again with --overwrite")
    return found
