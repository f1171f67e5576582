"""Picture of a report page for the documents: its legend and its first two charts, side by side, as one SVG.

python docs/images/make_picture.py runs/demo/report.html docs/images/report.svg
"""

import re
import sys
from html import unescape
from pathlib import Path

WIDTH, HEIGHT, LEGEND, MARGIN = 420, 258, 34, 16


def main(page: str, picture: str) -> None:
    """Write the picture of the page."""
    text = Path(page).read_text()
    colours = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", text.split("@media")[0]))
    charts = re.findall(r"<figcaption>(.*?)</figcaption>\s*(<svg.*?</svg>)", text, re.DOTALL)[:2]
    legend = re.search(r'<ul class="legend">(.*?)</ul>', text, re.DOTALL)
    entries = re.findall(r"color: var\((--[\w-]+)\)\">(.*?)</span>(.*?)</li>", legend[1], re.DOTALL) if legend else []
    size = f'width="{MARGIN + len(charts) * (WIDTH + MARGIN)}" height="{HEIGHT + LEGEND + 40}"'
    parts = [f'<rect {size} rx="8" fill="#ffffff"/>']
    for number, (colour, glyph, name) in enumerate(entries):
        x = MARGIN + number * 220
        label = unescape(re.sub(r"<[^>]*>", "", name)).strip()
        parts.append(f'<text x="{x}" y="24" fill="{colours[colour]}">{glyph}</text>')
        parts.append(f'<text x="{x + 20}" y="24" fill="{colours["--ink"]}">{label}</text>')
    for number, (title, chart) in enumerate(charts):
        x = MARGIN + number * (WIDTH + MARGIN)
        parts.append(f'<text x="{x}" y="{LEGEND + 18}" font-weight="600" fill="{colours["--ink"]}">{title}</text>')
        start, drawing = chart.removesuffix("</svg>").split(">", 1)
        scale = WIDTH / float(re.findall(r'viewBox="0 0 ([\d.]+)', start)[0])
        drawing = re.sub(r"var\((--[\w-]+)\)", lambda name: colours[name[1]], drawing)
        parts.append(f'<g transform="translate({x} {LEGEND + 28}) scale({scale:.4f})">{drawing}</g>')
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" font-family="sans-serif"'
    body = "\n".join(parts)
    whole = f'<svg {head} font-size="14" {size}>\n{body}\n</svg>\n'
    Path(picture).write_text(re.sub(r"[ \t]+\n", "\n", whole))


if __name__ == "__main__":
    main(*sys.argv[1:])
