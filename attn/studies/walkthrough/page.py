"""The report of the walkthrough: one HTML page."""

import html
import inspect
from collections.abc import Mapping

from attn.studies.report import escape, html_equation, html_figure, html_page
from attn.studies.walkthrough.claims import Check, Claim, Measurement, verdict
from attn.studies.walkthrough.registry import CLAIMS

_CLASS = {"holds": "holds", "holds in part": "part", "does not hold": "fails", "undecided": "fails"}
_INTRODUCTION = (
    "<p>Each claim of the attention walkthrough is a measurement that could come out either way. The verdicts are "
    "computed from the numbers and the thresholds beside them.</p>\n"
)
_REDUCED = (
    '<p class="reduced">A quick run: widths, lengths, steps and seeds are reduced, as each section tells. '
    "<code>attn walkthrough</code> without <code>--quick</code> measures at full size.</p>"
)


def write(measured: Mapping[str, Measurement]) -> str:
    """Return the page of the measured claims, with a list of the others."""
    sections = [section(name, measured[name]) for name in CLAIMS if name in measured]
    missing = [f"{CLAIMS[name].title} ({name})" for name in CLAIMS if name not in measured]
    more = f"<p>Not measured yet: {escape(', '.join(missing))}.</p>" if missing else ""
    note = _REDUCED if any(each.quick for each in measured.values()) else ""
    return html_page("Attention, measured", f"{_INTRODUCTION}{note}{_summary(measured)}{more}\n" + "\n".join(sections))


def _summary(measured: Mapping[str, Measurement]) -> str:
    rows = []
    for name in CLAIMS:
        if name in measured:
            checks = CLAIMS[name].check(measured[name].numbers)
            counted = [check.holds() for check in checks if not check.premise]
            link = f'<a href="#{name}">{escape(CLAIMS[name].title)}</a>'
            rows.append(f"<tr><td>{link}</td><td>{_verdict(checks)}</td><td>{sum(counted)} of {len(counted)}</td></tr>")
    head = "<tr><th>claim</th><th>verdict</th><th>checks that hold</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def section(name: str, measured: Measurement) -> str:
    """Return the part of the page about a claim."""
    claim, machine = CLAIMS[name], measured.machine
    checks = claim.check(measured.numbers)
    caption = inspect.getdoc(claim.draw).partition("\n")[0]
    method = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in claim.method)
    tables = "".join(table.html() for table in claim.tables(measured.numbers))
    return (
        f'<section id="{name}"><h2>{escape(claim.title)}: {_verdict(checks)}</h2>'
        f'<blockquote>{escape(claim.sentence)}</blockquote><p><small>Source: <a href="{html.escape(claim.link)}">'
        f"{escape(claim.source)}</a>.</small></p>"
        f"{html_equation(claim.equation)}{method}"
        f"{_checks(checks)}{html_figure(claim.draw(measured.numbers), caption)}<p><small>{escape(caption)}</small></p>"
        f'<div class="tables">{tables}</div>'
        f"<p><small>{_sizes(claim, measured)} Measured in {measured.seconds:.0f} s on "
        f"{escape(', '.join(sorted(set(machine['devices']))))} with {machine['cores']} cores, jax {machine['jax']}, by "
        f"<code>attn walkthrough --only {name}{' --quick' if measured.quick else ''}</code>; all numbers are in "
        f"{name}.json.</small></p></section>"
    )


def _sizes(claim: Claim, measured: Measurement) -> str:
    """Return the sizes, and the full sizes of those that are reduced."""
    texts = []
    for field, value in measured.sizes.items():
        full = getattr(claim.full, field)
        full = list(full) if isinstance(full, tuple) else full
        instead = f" (full: {full})" if measured.quick and full != value else ""
        texts.append(f"{field.replace('_', ' ')} {value}{instead}")
    return escape("Sizes: " + "; ".join(texts) + ".")


def _verdict(checks: list[Check]) -> str:
    words = verdict(checks)
    return f'<span class="{_CLASS[words]}">{words}</span>'


def _checks(checks: list[Check]) -> str:
    rows = []
    for check in checks:
        words = "holds" if check.holds() else "does not hold"
        number = f"{check.measured:.4g}" if isinstance(check.measured, float) else str(check.measured)
        cells = f"<td>{escape(check.says)}</td><td>{number}</td><td>{escape(check.must_be())}</td>"
        rows.append(f'<tr>{cells}<td class="{_CLASS[words]}">{words}</td></tr>')
    return f"<table><tr><th>measured</th><th></th><th>must be</th><th></th></tr>{''.join(rows)}</table>"
