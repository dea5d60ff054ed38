"""The page: one HTML file that loads nothing, made from the numbers alone."""

import base64
import html
import inspect
import io
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from attn.walkthrough.claims import Check, Claim, Measured, Table, verdict
from attn.walkthrough.registry import CLAIMS

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 0.6rem 0 } caption { text-align: left; font-size: 0.9rem; color: #555 }
th, td { padding: 0.15rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; font-variant-numeric: tabular-nums }
img { max-width: 100% } section { border-top: 2px solid #eee; margin-top: 2.5rem } .tables { display: flex;
flex-wrap: wrap; gap: 0 2rem } .holds { color: #176b2c } .fails { color: #a11a1a } .part { color: #8a5a00 }
blockquote { margin: 0.5rem 0; padding-left: 1rem; border-left: 4px solid #ccc; font-size: 1.1rem }
small { color: #555 } .reduced { background: #fff4d6; padding: 0.5rem 1rem }
"""
_CLASS = {"holds": "holds", "holds in part": "part", "does not hold": "fails", "undecided": "fails"}


def write(measured: Mapping[str, Measured]) -> str:
    """The page of the claims that have been measured; the others are named as not measured yet."""
    sections = [section(name, measured[name]) for name in CLAIMS if name in measured]
    missing = [f"{CLAIMS[name].title} ({name})" for name in CLAIMS if name not in measured]
    more = f"<p>Not measured yet: {_text(', '.join(missing))}.</p>" if missing else ""
    reduced = any(each.quick for each in measured.values())
    note = (
        '<p class="reduced">A quick run: widths, lengths, steps and seeds are reduced, as each section tells. '
        "<code>attn walkthrough</code> without <code>--quick</code> measures at full size.</p>"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width"><title>Attention, measured</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>Attention, measured</h1>\n"
        "<p>Each claim of the attention walkthrough is a measurement that could come out either way. The verdicts are "
        "computed from the numbers and the thresholds beside them.</p>\n"
        f"{note if reduced else ''}{_summary(measured)}{more}\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _summary(measured: Mapping[str, Measured]) -> str:
    rows = []
    for name in CLAIMS:
        if name in measured:
            checks = CLAIMS[name].check(measured[name].numbers)
            counted = [check.holds() for check in checks if not check.premise]
            link = f'<a href="#{name}">{_text(CLAIMS[name].title)}</a>'
            rows.append(f"<tr><td>{link}</td><td>{_verdict(checks)}</td><td>{sum(counted)} of {len(counted)}</td></tr>")
    head = "<tr><th>claim</th><th>verdict</th><th>checks that hold</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def section(name: str, measured: Measured) -> str:
    """The part of the page that shows a claim."""
    claim = CLAIMS[name]
    checks = claim.check(measured.numbers)
    caption = inspect.getdoc(claim.draw).partition("\n")[0]
    method = "".join(f"<p>{_text(paragraph)}</p>" for paragraph in claim.method)
    tables = "".join(_table(table) for table in claim.tables(measured.numbers))
    machine = measured.machine
    return (
        f'<section id="{name}"><h2>{_text(claim.title)}: {_verdict(checks)}</h2>'
        f'<blockquote>{_text(claim.sentence)}</blockquote><p><small>Source: <a href="{html.escape(claim.link)}">'
        f"{_text(claim.source)}</a>.</small></p>"
        f"{_image(_equation(claim.equation), claim.equation)}{method}"
        f"{_checks(checks)}{_image(claim.draw(measured.numbers), caption)}<p><small>{_text(caption)}</small></p>"
        f'<div class="tables">{tables}</div>'
        f"<p><small>{_sizes(claim, measured)} Measured in {measured.seconds:.0f} s on "
        f"{_text(', '.join(sorted(set(machine['devices']))))} with {machine['cores']} cores, jax {machine['jax']}, by "
        f"<code>attn walkthrough --only {name}{' --quick' if measured.quick else ''}</code>; all numbers are in "
        f"{name}.json.</small></p></section>"
    )


def _sizes(claim: Claim, measured: Measured) -> str:
    """The sizes, and where they are reduced."""
    said = []
    for field, value in measured.sizes.items():
        full = getattr(claim.full, field)
        full = list(full) if isinstance(full, tuple) else full
        instead = f" (full: {full})" if measured.quick and full != value else ""
        said.append(f"{field.replace('_', ' ')} {value}{instead}")
    return _text("Sizes: " + "; ".join(said) + ".")


def _verdict(checks: list[Check]) -> str:
    words = verdict(checks)
    return f'<span class="{_CLASS[words]}">{words}</span>'


def _checks(checks: list[Check]) -> str:
    rows = "".join(
        f"<tr><td>{_text(check.says)}</td><td>{_number(check.measured)}</td><td>{_text(check.must_be())}</td>"
        f'<td class="{"holds" if check.holds() else "fails"}">{"holds" if check.holds() else "does not hold"}</td></tr>'
        for check in checks
    )
    return f"<table><tr><th>measured</th><th></th><th>must be</th><th></th></tr>{rows}</table>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{_number(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<table><caption>{_text(table.caption)}</caption>{f'<tr>{head}</tr>' if head else ''}{rows}</table>"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _text(str(value))


def _text(text: str) -> str:
    return html.escape(text, quote=False)


def _equation(tex: str) -> Figure:
    """An equation alone."""
    figure = Figure(figsize=(0.01, 0.01))
    figure.text(0, 0, f"${tex}$", fontsize=12)
    return figure


def _image(figure: Figure, words: str) -> str:
    """A figure inside the page."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "attn"}):  # the same numbers give the same page
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    data = base64.b64encode(file.getvalue().encode()).decode()
    return f'<p><img alt="{html.escape(words)}" src="data:image/svg+xml;base64,{data}"></p>'
