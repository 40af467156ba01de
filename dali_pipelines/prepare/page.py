"""The statistics as one page that needs nothing beside it, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from dali_pipelines.prepare.charts import Chart, counts, distribution, to_svg
from dali_pipelines.prepare.stats import Statistics, View

_STYLE = (
    "body{font:14px/1.45 sans-serif;color:#222;max-width:1240px;margin:2em auto;padding:0 1em}"
    "h1{font-size:20px}h2{font-size:16px;margin-top:2em}table{border-collapse:collapse}"
    "td,th{padding:2px 14px 2px 0;text-align:left;vertical-align:top}td.n,th.n{text-align:right}"
    "svg{border:1px solid #ddd;margin:0 8px 8px 0}td.p{word-break:break-all}"
)
_BAD_ROWS = 50


def charts_of(found: Statistics, view: View) -> list[Chart]:
    """What the page and the picture show."""
    size = "any size" if view.max_pixels is None else f"at most {view.max_pixels:,} pixels"
    setting = f"{view.frames} frames, {size}, cells of {view.patch * view.cell_reduction}"
    text = "Text tokens per sample" if view.tokenizer else "Characters of text per sample"
    return [
        distribution("Length of videos", found.seconds, "s"),
        distribution("Frames of videos", found.frames),
        distribution("Shorter side", found.heights, "px"),
        distribution("Width by height", found.aspects),
        distribution("Size of files", found.megabytes, "MB"),
        counts("Codecs", found.codecs),
        distribution("Visual tokens per sample", found.visual, about=setting),
        distribution(text, found.text),
        counts("Samples by what they hold", found.kinds),
        counts("Samples by task (one may have several)", found.tasks),
        counts("Samples by split", found.splits),
        counts("Left out", found.left_out),
    ]


def page(title: str, made: dict[str, Any], charts: Sequence[Chart], report: Sequence[dict[str, str]]) -> str:
    """The page as HTML.

    Args:
        title: its heading.
        made: the manifest.
        charts: the pictures.
        report: samples that were left out; the first ones are listed.
    """
    total = sum(split["bytes"] for split in made["splits"].values())
    facts = [
        ("samples", f"{made['samples']:,}"),
        ("shards", f"{len(made['shards']):,}, {total / 1e6:,.1f} MB"),
        ("left out", f"{made['left_out']:,}, of these {made['duplicates']:,} duplicates"),
        ("samples that share their files with others", f"{made['samples_that_share_files']:,}"),
        ("inputs", ", ".join(made["settings"]["inputs"])),
        ("re-encoded", _pairs(made["settings"]["reencode"]) or "no"),
        ("tokens counted with", _pairs(made["view"])),
    ]
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        _table((), facts),
        "<h2>Splits</h2>",
        _table(
            ("split", "shards", "samples", "MB"),
            [(n, s["shards"], f"{s['samples']:,}", f"{s['bytes'] / 1e6:,.1f}") for n, s in made["splits"].items()],
        ),
        "<h2>Distributions</h2>",
        *(to_svg(chart) for chart in charts),
    ]
    for heading, key in (("Left out", "left_out"), ("Refused by training for their text", "refused")):
        if made["statistics"][key]:
            rows = [(f"{n:,}", reason) for reason, n in made["statistics"][key].items()]
            parts += [f"<h2>{heading}</h2>", _table(("samples", "reason"), rows)]
    if report:
        shown = [tuple(line[key] for key in ("key", "path", "stage", "reason")) for line in report[:_BAD_ROWS]]
        rest = f" (the first {_BAD_ROWS} of {len(report):,}; report.jsonl has all)" if len(report) > _BAD_ROWS else ""
        parts += [f"<h2>Each of them{rest}</h2>", _table(("key", "path", "stage", "reason"), shown)]
    return "\n".join([*parts, "</body></html>\n"])


def _pairs(values: dict[str, Any] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (values or {}).items() if value is not None)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td class=p>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{top}{body}</table>"
