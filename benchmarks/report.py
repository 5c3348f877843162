"""Puts the parts of the benchmarks together: one JSON file, a table, a plot, and a page that holds them all."""

from __future__ import annotations

import base64
import json
import textwrap
from typing import Any

import jinja2
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from benchmarks.record import FOLDER, Row, shown

PARTS = ("overhead", "embedded", "prefixes", "forms", "streaming", "vllm", "peers")

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>rsafe-plugins: benchmarks</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } td, th { border-bottom: 1px solid #ccc; padding: .3rem .6rem; }
td + td, th + th { text-align: right; } .missed { color: #a40000; } img { max-width: 100%; }
caption { font-weight: bold; text-align: left; padding: 1.5rem 0 .3rem; } p { color: #555; }
</style>
<h1>Benchmarks</h1>
{% for part in parts %}<table><caption>{{ part.title }}</caption><tr><th></th><th>Measured</th><th>Aim</th></tr>
{% for row in part.rows %}<tr{% if row.is_reached == False %} class="missed"{% endif %}>
<td>{{ row.what }}</td><td>{{ shown(row.value) }} {{ row.unit }}</td>
<td>{% if row.aim is not none %}{{ shown(row.aim) }}{% endif %}</td></tr>
{% endfor %}</table>
<p>{{ part.measured }}, {{ part.machine.cores }} cores, {{ part.machine.cpu }}, Python {{ part.machine.python }}:
{% for name, version in part.machine.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}
{% endfor %}</p>
{% endfor %}<img alt="Checks a second, by way of asking" src="data:image/png;base64,{{ plot }}"></html>
"""


def measured() -> list[dict[str, Any]]:
    parts = []
    for name in PARTS:
        path = FOLDER / f"{name}.json"
        if path.exists():
            part = json.loads(path.read_text("utf-8"))
            parts.append({**part, "rows": [Row(**row) for row in part["rows"]]})
    return parts


def table(parts: list[dict[str, Any]]) -> str:
    lines = []
    for part in parts:
        lines += [f"**{part['title']}**", "", "| | Measured | Aim |", "|---|---|---|"]
        for row in part["rows"]:
            aim = "" if row.aim is None else shown(row.aim) + ("" if row.is_reached else ": missed")
            lines.append(f"| {row.what} | {shown(row.value)} {row.unit} | {aim} |")
        lines.append("")
    return "\n".join(lines)


def plot(parts: list[dict[str, Any]]) -> None:
    """Bars of all that is measured in checks a second on an engine, a panel a part."""
    panels = [
        (part["title"], rows)
        for part in parts
        if part["part"] != "overhead" and (rows := [row for row in part["rows"] if row.unit == "checks/s"])
    ]
    heights = [len(rows) + 1 for _, rows in panels]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(9, 0.45 * sum(heights) + 1),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, rows) in zip(axes[:, 0], panels, strict=True):
        bars = axis.barh([row.what for row in rows], [row.value for row in rows], color="#3465a4")
        axis.bar_label(bars, [shown(row.value) for row in rows], padding=3)
        axis.invert_yaxis()
        axis.set_title(textwrap.fill(title, 52), loc="left", fontsize=10)
        axis.set_xlabel("checks a second")
        axis.margins(x=0.12)
    figure.savefig(FOLDER / "results.png", dpi=120)


def main() -> None:
    parts = measured()
    as_json = [{**part, "rows": [vars(row) for row in part["rows"]]} for part in parts]
    (FOLDER / "results.json").write_text(json.dumps(as_json, indent=1) + "\n", "utf-8")
    (FOLDER / "results.md").write_text(table(parts), "utf-8")
    plot(parts)
    image = base64.b64encode((FOLDER / "results.png").read_bytes()).decode()
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    (FOLDER / "results.html").write_text(page.render(parts=parts, plot=image, shown=shown), "utf-8")
    print(f"\n{FOLDER}: results.json, results.md, results.png, results.html")


if __name__ == "__main__":
    main()
