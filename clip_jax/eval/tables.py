"""Results as a table in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

_HEADING = ("data set", "task", "metric", "%", "95 % interval", "paper")


def results_table(rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """One line a metric: value, interval and the paper's figure, in per cent.

    Args:
        rows: key, row and details of each result, as `Results.read` gives them.
    """
    models = {row["pretrained"] for _, row, _ in rows}
    parts = []
    for model in sorted(models):
        lines = [_HEADING, *_lines([each for each in rows if each[1]["pretrained"] == model])]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADING))]
        text = "\n".join(
            "  ".join(
                cell.rjust(width) if column > 2 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        parts.append(f"\n{model}\n{text}")
    return "\n".join(parts)


def _lines(
    rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]],
) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for _, row, details in rows:
        first = (row["dataset"], row["task"])
        for metric, value in row["metrics"].items():
            interval = details["intervals"].get(metric)
            paper = details["paper"].get(metric)
            shown = metric + (" *" if metric == details["metric"] else "")
            lines.append(
                (
                    *first,
                    shown,
                    f"{100 * value:.2f}",
                    f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}" if interval else "",
                    f"{100 * paper:.1f}" if paper is not None else "",
                )
            )
            first = ("", "")
    return lines
