"""The report of the walkthrough: one HTML page."""

import collections
import html
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attn.studies.report import Table, escape
from attn.studies.walkthrough.claims import Check, Claim, Measurement, verdict
from attn.studies.walkthrough.registry import CLAIMS
from attn.studies.web import html_equation, html_figure, html_page

_TITLE = "Attention, measured"
_LEAD = "Each claim about attention is a measurement that could have come out either way."
_RULE = (
    "Each check compares a number with a threshold. A claim holds if all of its checks hold, and in part if some do. "
    "A premise is a check of whether the comparison is fair: if it fails, the claim is undecided."
)
_QUICK = (
    '<p class="quick"><strong>A quick run.</strong> Widths, lengths, steps and seeds are reduced, as listed below. So '
    "little training may miss what a claim says, or leave it undecided: verdicts may differ from those of "
    "<code>attn walkthrough</code> without <code>--quick</code>, which measures at full size.</p>"
)
# The class of a verdict or result, which gives its color, and its mark.
_STYLES = {
    "holds": ("holds", "✓"),
    "holds in part": ("part", "◐"),
    "does not hold": ("fails", "✗"),
    "undecided": ("fails", "?"),
}
# Sizes in words; others are shown as their name and value.
_SIZES = {
    "compared": "all models at widths {}",
    "distance": "gradients over {} symbols",
    "each": "{} strings per length",
    "fitted": "probes fitted to {} strings",
    "keys": "{} keys",
    "layers": "{} layers",
    "length": "attention measured on {} symbols",
    "longer": "one LSTM trained {} times as long",
    "max_length": "longest string {}",
    "min_length": "shortest string {}",
    "num_heads": "{} heads",
    "num_layers": "{} layers",
    "pairs": "{} pairs of a query and a key",
    "probed": "bits read at lengths {}",
    "queries": "{} queries",
    "reactions": "{} reactions",
    "replaced_tokens": "share of replaced symbols {}",
    "rounds": "{} rounds",
    "steps": "{} training steps",
    "strings": "{} strings",
    "tokens": "{} tokens per batch",
    "trained_to": "trained on lengths up to {}",
    "trained_width": "trained at width {}",
}
_LONG = 12  # rows of a table from which on it is folded


def write(measured: Mapping[str, Measurement]) -> str:
    """Return the page of the measured claims, with a list of the others."""
    names = [name for name in CLAIMS if name in measured]
    checks = {name: CLAIMS[name].check(measured[name].numbers) for name in names}
    body = (
        f'<div class="page">\n<nav class="contents" aria-label="Claims"><ol>{_contents(checks)}</ol></nav>\n'
        f"<header>{_header(measured, checks)}</header>\n"
        f"<main>\n{''.join(section(name, measured[name]) for name in names)}</main>\n"
        '<footer class="small"><p>Made by <code>attn walkthrough</code> from the JSON files beside this page, which '
        "have all numbers. The page loads nothing. To measure a claim again, delete its JSON file and run its command."
        '</p><p class="top"><a href="#top">To the top</a></p></footer>\n</div>'
    )
    return html_page(_TITLE, f"{_LEAD} Claims measured: {len(names)}, with numbers, thresholds and figures.", body)


def _contents(checks: Mapping[str, Sequence[Check]]) -> str:
    """Return a link per claim, with the mark of its verdict."""
    items = []
    for name, of_claim in checks.items():
        words = verdict(of_claim)
        style, mark = _STYLES[words]
        sign = f'<span class="mark {style}" aria-hidden="true">{mark}</span>'
        title = escape(CLAIMS[name].title)
        unseen = f'<span class="unseen">: {words}</span>'
        items.append(f'<li><a href="#{name}">{sign}<span>{_number(name)}{title}{unseen}</span></a></li>')
    return "".join(items)


def _header(measured: Mapping[str, Measurement], checks: Mapping[str, Sequence[Check]]) -> str:
    counts = collections.Counter(map(verdict, checks.values()))
    counted = " ".join(f"<span>{_badge(words)} {counts[words]}</span>" for words in _STYLES if counts[words])
    total = f"{len(checks)} claim{'s' * (len(checks) > 1)}"
    counted = f'<p class="counts"><span>{total}:</span> {counted}</p>{_summary(checks)}' if checks else ""
    missing = [f"{CLAIMS[name].title} ({name})" for name in CLAIMS if name not in measured]
    more = f'<p class="muted">Not measured yet: {escape(", ".join(missing))}.</p>' if missing else ""
    note = _QUICK if any(each.quick for each in measured.values()) else ""
    lead = f'<h1 id="top">{_TITLE}</h1><p class="lead">{_LEAD}</p><p class="muted">{_RULE}</p>'
    return f"{lead}{note}{counted}{more}"


def _summary(checks: Mapping[str, Sequence[Check]]) -> str:
    """Return the table of all claims: sentence, verdict, and what was measured."""
    rows = []
    for name, of_claim in checks.items():
        claim = CLAIMS[name]
        rows.append(
            f'<tr role="row"><th scope="row" role="rowheader">{_number(name)}'
            f'<a href="#{name}">{escape(claim.title)}</a><p>{escape(claim.sentence)}</p></th>'
            f'<td role="cell">{_badge(verdict(of_claim))}<span class="small">checks: {_counted(of_claim)}</span></td>'
            f'<td role="cell">{escape(_first_line(claim.measure))}</td></tr>'
        )
    return _blocks("summary", "All claims and their verdicts", ("Claim", "Verdict", "Measurement"), rows)


def _blocks(style: str, caption: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    """Return a table whose rows are blocks on a narrow screen.

    The roles are those that its elements have anyway: browsers drop them where the style makes blocks of rows.
    """
    head = "".join(f'<th scope="col" role="columnheader">{name}</th>' for name in columns)
    return (
        f'<table class="{style}" role="table"><caption class="unseen">{caption}</caption><thead role="rowgroup">'
        f'<tr role="row">{head}</tr></thead><tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def _counted(checks: Sequence[Check]) -> str:
    """Return how many checks hold, premises not counted."""
    counted = [check.holds() for check in checks if not check.premise]
    return f"{sum(counted)} of {len(counted)} hold"


def section(name: str, measured: Measurement) -> str:
    """Return the part of the page about a claim."""
    claim, numbers = CLAIMS[name], measured.numbers
    checks = claim.check(numbers)
    method = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in claim.method)
    quick = '<span class="tag">quick run</span>' if measured.quick else ""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><div class="heading">'
        f'<h2 id="{name}-title">{_number(name)}{escape(claim.title)}</h2>{_badge(verdict(checks))}{quick}'
        f'<a class="anchor" href="#{name}" aria-label="Link to {html.escape(claim.title)}">#</a></div>'
        f"<blockquote>{escape(claim.sentence)}</blockquote>"
        f'<p class="small">Source: <a href="{html.escape(claim.link)}">{escape(claim.source)}</a></p>'
        f"{html_equation(claim.equation)}"
        f"<h3>What was measured</h3>{method}{html_figure(claim.figure(numbers), _first_line(claim.draw))}"
        f"<h3>Checks: {_counted(checks)}</h3>{_checks(claim, checks)}"
        f"{_tables(claim.tables(numbers))}{_small_print(name, claim, measured)}</section>\n"
    )


def _number(name: str) -> str:
    """Return the number of a claim in the walkthrough."""
    return f'<span class="number-of">{[*CLAIMS].index(name) + 1}</span> '


def _first_line(function: Callable) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _badge(words: str) -> str:
    style, mark = _STYLES[words]
    return f'<span class="verdict {style}"><span aria-hidden="true">{mark}</span> {words}</span>'


def _checks(claim: Claim, checks: Sequence[Check]) -> str:
    rows = []
    for check in checks:
        words = "holds" if check.holds() else "does not hold"
        number = f"{check.measured:.4g}" if isinstance(check.measured, float) else str(check.measured)
        rows.append(
            f'<tr class="{_STYLES[words][0]}" role="row"><th scope="row" role="rowheader">{escape(check.says)}</th>'
            f'<td class="value" role="cell"><data value="{number}">{_powers(number)}</data></td>'
            f'<td role="cell">{_powers(escape(check.must_be()))}</td><td role="cell">{_badge(words)}</td></tr>'
        )
    return _blocks("checks", f"Checks of {escape(claim.title)}", ("Measured", "Value", "Must be", "Result"), rows)


def _powers(text: str) -> str:
    """Return text with numbers such as 1e-05 as powers of ten."""

    def power(match: re.Match) -> str:
        factor, exponent = "" if match[1] == "1" else f"{match[1]} × ", int(match[2])
        return f"{factor}10<sup>{'−' * (exponent < 0)}{abs(exponent)}</sup>"

    return re.sub(r"(?<![\w.])(\d[\d.]*)e([+-]\d+)\b", power, text)


def _tables(tables: Sequence[Table]) -> str:
    """Return the tables of a claim; long ones are folded."""
    parts = []
    for table in tables:
        long = len(table.rows) >= _LONG
        summary = f"<summary>{escape(table.caption)}: {len(table.rows)} rows</summary>"
        parts.append(f"<details>{summary}{table.html()}</details>" if long else table.html())
    return f'<h3>Numbers</h3><div class="tables">{"".join(parts)}</div>' if parts else ""


def _small_print(name: str, claim: Claim, measured: Measurement) -> str:
    """Return the sizes, the time and machine, and how to measure the claim again."""
    machine = measured.machine
    devices = ", ".join(sorted(set(machine["devices"])))
    command = f"attn walkthrough --only {name}{' --quick' if measured.quick else ''}"
    return (
        f'<p class="small">Sizes: {escape(_sizes(claim, measured))}.</p><p class="small">Measured in '
        f"{measured.seconds:,.0f} s on {escape(devices)} with {machine['cores']} cores, jax {escape(machine['jax'])}; "
        f"trainings that had been done before are not counted. All numbers are in {name}.json. To measure it again: "
        f"<code>{command}</code>, after deleting {name}.json.</p>"
    )


def _sizes(claim: Claim, measured: Measurement) -> str:
    """Return the sizes in words, and the full sizes of those that are reduced."""
    texts = []
    for field, value in measured.sizes.items():
        full = getattr(claim.full, field)
        full = list(full) if isinstance(full, tuple) else full
        instead = f" (full: {_listed(full)})" if measured.quick and full != value else ""
        words = _SIZES.get(field, f"{field.replace('_', ' ')} {{}}")
        texts.append(words.format(_listed(value)) + instead)
    return "; ".join(texts)


def _listed(value: Any) -> str:
    """Return a size as text: a list with commas, or as a range."""
    if isinstance(value, list):
        if len(value) > 3 and value == list(range(value[0], value[-1] + 1)):
            return f"{value[0]} to {value[-1]}"
        return ", ".join(map(_listed, value))
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)
