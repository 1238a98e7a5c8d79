"""The loss curve of a run as a picture, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from spark_fast.evaluate.grid import save_png

SIZE = (800, 500)
LEFT, TOP, RIGHT, BOTTOM = 80, 40, 770, 440  # the plot's frame
LINE, GRID, INK = (31, 119, 180), (225, 225, 225), "black"


def draw_loss_curve(points: Sequence[tuple[float, float]], path: Path, title: str = "Pre-training loss") -> None:
    """Draw (epoch, loss) points as a line with labelled axes into a PNG. Points without a finite loss are left out."""
    points = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    canvas = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(canvas)
    small, large = ImageFont.load_default(size=14), ImageFont.load_default(size=16)
    draw.text(((LEFT + RIGHT) / 2, 20), title, fill=INK, font=large, anchor="mm")
    draw.text(((LEFT + RIGHT) / 2, 485), "epoch", fill=INK, font=large, anchor="mm")
    draw.text((LEFT, 20), "loss", fill=INK, font=large, anchor="mm")
    x_ticks = _ticks(0, max((x for x, _ in points), default=1))
    y_ticks = _ticks(min((y for _, y in points), default=0), max((y for _, y in points), default=1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    for x in x_ticks:
        at = place(x, y_ticks[0])[0]
        draw.line([(at, TOP), (at, BOTTOM)], fill=GRID)
        draw.text((at, BOTTOM + 8), f"{x:g}", fill=INK, font=small, anchor="mt")
    for y in y_ticks:
        at = place(0, y)[1]
        draw.line([(LEFT, at), (RIGHT, at)], fill=GRID)
        draw.text((LEFT - 8, at), f"{y:g}", fill=INK, font=small, anchor="rm")
    draw.rectangle([LEFT, TOP, RIGHT, BOTTOM], outline=INK)
    line = [place(x, y) for x, y in points]
    if len(line) > 1:
        draw.line(line, fill=LINE, width=2, joint="curve")
    for x, y in line if len(line) <= 50 else ():
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=LINE)
    save_png(canvas, path)


def _ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose low..high."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= wanted)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]
