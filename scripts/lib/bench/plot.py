"""Plots of GB/s over block size as SVG. Knows nothing of how the figures were measured."""
from .rows import BLOCKS, NAMES, TOTAL, show_size
from .tables import Table


def plot(title, lines, ceiling):
    """GB/s over block size as SVG: one line a system, the ceiling dashed."""
    width, height, left, right, top, bottom = 910, 480, 70, 270, 50, 60
    inner, tall = width - left - right, height - top - bottom
    peak = max([ceiling or 0] + [v for _, points in lines for _, v in points] + [0.1]) * 1.1
    sizes = sorted({b for _, points in lines for b, _ in points}) or [1]
    x = lambda b: left + inner * (sizes.index(b) + 0.5) / len(sizes)
    y = lambda v: top + tall * (1 - v / peak)
    colours = ["#1b6ca8", "#5fa8d3", "#d1495b", "#e3a0a8", "#66a182", "#b3d1bf"]
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">']
    out.append(f'<rect width="{width}" height="{height}" fill="white"/><text x="{left}" y="28" font-size="16">{title}</text>')
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if peak / s <= 9)
    for i in range(int(peak / step) + 1):
        out.append(f'<line x1="{left}" x2="{left + inner}" y1="{y(i * step):.1f}" y2="{y(i * step):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8}" y="{y(i * step) + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    for b in sizes:
        out.append(f'<text x="{x(b):.1f}" y="{top + tall + 20}" text-anchor="middle">{show_size(b)}</text>')
    out.append(f'<text x="{left + inner / 2}" y="{height - 16}" text-anchor="middle">block size, {show_size(TOTAL)} in all</text>')
    out.append(f'<text x="20" y="{top + tall / 2}" transform="rotate(-90 20 {top + tall / 2})" text-anchor="middle">GB/s (1e9 bytes), median</text>')
    entries = []
    if ceiling:
        out.append(f'<line x1="{left}" x2="{left + inner}" y1="{y(ceiling):.1f}" y2="{y(ceiling):.1f}" stroke="#333" stroke-width="2" stroke-dasharray="7 5"/>')
        entries.append(("raw TCP, one piece", "#333", "7 5"))
    for i, (name, points) in enumerate(lines):
        colour = colours[i % len(colours)]
        path_points = " ".join(f"{x(b):.1f},{y(v):.1f}" for b, v in sorted(points))
        out.append(f'<polyline points="{path_points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        out += [f'<circle cx="{x(b):.1f}" cy="{y(v):.1f}" r="3.5" fill="{colour}"/>' for b, v in points]
        entries.append((name, colour, ""))
    for i, (name, colour, dash) in enumerate(entries):
        at = top + 14 + 22 * i
        out.append(f'<line x1="{left + inner + 16}" x2="{left + inner + 44}" y1="{at}" y2="{at}" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"/>')
        out.append(f'<text x="{left + inner + 50}" y="{at + 4}">{name}</text>')
    return "\n".join(out + ["</svg>"]) + "\n"


def plots(document, name):
    """The plots of a run: file name and content of each."""
    for congestion, found in document["results"].items():
        table = Table(found)
        lines = []
        for system in ("ours", "nixl", "mooncake"):
            for op in ("write", "read"):
                points = [(block, table.other(system, op, TOTAL, block).get("gbytes_per_s")) for block in BLOCKS]
                points = [(b, v) for b, v in points if v]
                lines += [(f"{NAMES[system]} {op.upper()}", points)] if points else []
        title = f"Host memory over loopback, {document['machine']['cores']} cores, {congestion}"
        yield f"{name}-{congestion}.svg", plot(title, lines, table.ceiling()[0])
