"""One self-contained HTML page of all results in a directory."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.eval.results import Results

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } h3 { font-size: 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left }
th { font-weight: 600 } .n { text-align: right; white-space: nowrap }
.soft, figcaption { color: var(--soft); font-size: .85rem } a { color: inherit }
.bar { height: .5rem; background: #4a90d9; border-radius: 2px; min-width: 1px }
figure { margin: 1rem 0; display: inline-block; vertical-align: top; max-width: 100% }
img { max-width: 100%; height: auto; background: white; border-radius: 4px }
details > summary { cursor: pointer; margin: .5rem 0 }
"""
_CAPTIONS = {
    "pictures": "Hits (green) and the misses that the model was surest of (red)",
    "confusion": "Confusion matrix",
    "classes": "Accuracy by class",
    "calibration": "Calibration",
    "shots": "Few-shot",
    "groups": "By group",
}


def write_page(
    results: Results, rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]
) -> None:
    """Writes report.html, with the pictures inside."""
    models = sorted({row["pretrained"] for _, row, _ in rows})
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Evaluation</title><style>{_STYLE}</style>",
        f"<h1>Evaluation of {html.escape(', '.join(models))}</h1>",
        "<p class='soft'>Values in per cent. Intervals: 95 %, by the bootstrap over examples. "
        "Paper: Radford et al., 2021, the model of the same architecture.</p>",
        _overview(rows),
    ]
    for path in _plots(results, "across"):
        parts.append(_figure(path, ""))
    for key, row, details in rows:
        parts.append(_section(results, key, row, details))
    (results.directory / "report.html").write_text("\n".join(parts) + "</html>\n")


def _overview(rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> str:
    lines = [
        "<div class='wide'><table><tr><th>data set<th>task<th>model<th>metric<th class='n'>%"
        "<th style='width:9rem'><th class='n'>95 % interval<th class='n'>paper"
        "<th class='n'>examples</tr>"
    ]
    for key, row, details in rows:
        metric = details["metric"]
        if metric not in row["metrics"]:
            metric = next(iter(row["metrics"]))
        value = row["metrics"][metric]
        lines.append(
            f"<tr><td><a href='#{html.escape(key)}'>{html.escape(details['title'])}</a>"
            f"<td>{row['task']}<td>{html.escape(row['model'])}<td>{metric}"
            f"<td class='n'>{100 * value:.2f}"
            f"<td><div class='bar' style='width:{100 * min(max(value, 0), 1):.1f}%'></div>"
            f"<td class='n'>{_interval(details, metric)}<td class='n'>{_paper(details, metric)}"
            f"<td class='n'>{details['examples']:,}</tr>"
        )
    return "".join(lines) + "</table></div>"


def _section(results: Results, key: str, row: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    notes = list(details["notes"])
    if details["unreadable"]:
        notes.insert(0, f"{details['unreadable']} unreadable pictures were left out.")
    metrics = "".join(
        f"<tr><td>{name}<td class='n'>{100 * value:.2f}<td class='n'>{_interval(details, name)}"
        f"<td class='n'>{_paper(details, name)}</tr>"
        for name, value in row["metrics"].items()
    )
    plots = _plots(results, key)
    first = [_figure(path, key) for path in plots if _kind(path, key) == "pictures"]
    others = [_figure(path, key) for path in plots if _kind(path, key) != "pictures"]
    folded = f"<details><summary>Charts</summary>{''.join(others)}</details>" if others else ""
    return (
        f"<h2 id='{html.escape(key)}'>{html.escape(details['title'])}, {row['task']}</h2>"
        f"<p class='soft'>{html.escape(row['pretrained'])}. {details['examples']:,} examples. "
        f"{html.escape(' '.join(_sentence(note) for note in notes))}</p>"
        f"<div class='wide'><table style='max-width:36rem'><tr><th>metric<th class='n'>%"
        f"<th class='n'>95 % interval<th class='n'>paper</tr>{metrics}</table></div>"
        f"{''.join(first)}{folded}"
    )


def _sentence(note: str) -> str:
    return note if note.endswith((".", "!", "?")) else f"{note}."


def _interval(details: Mapping[str, Any], metric: str) -> str:
    interval = details["intervals"].get(metric)
    return f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}" if interval else ""


def _paper(details: Mapping[str, Any], metric: str) -> str:
    figure = details["paper"].get(metric)
    return f"{100 * figure:.1f}" if figure is not None else ""


def _plots(results: Results, key: str) -> list:
    directory = results.directory / "plots"
    found = directory.glob(f"{key}--*.png") if directory.exists() else ()
    return sorted(found, key=lambda path: path.name)


def _kind(path, key: str) -> str:
    return path.stem.removeprefix(f"{key}--")


def _figure(path, key: str) -> str:
    kind = _kind(path, key or "across")
    caption = _CAPTIONS.get(kind, kind.replace("_", " "))
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<figure><img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
