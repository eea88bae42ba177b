"""The section of a search's report about latency: what rows take, and how far that can be believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from search import plots
from search.latency import ALLOWED_ERROR, ALLOWED_TAU, SEPARABLE
from search.plots import escaped
from search.report_data import (
    Run,
    option_text,
    plural,
)
from search.report_pieces import absent, folded, number, table


def latency_section(run: Run) -> str:
    title = "<h2>Latency: the table against measurement</h2>"
    found = run.latency
    if not found:
        sentence = (
            "This folder has no table of latencies (latency.json): the judged subnets were measured one by one, and "
            "nothing says how far two measurements of the same one lie apart. <code>--budget latency_ms=…</code> "
            "lets a search make a table and check it."
        )
        return title + absent(sentence) if "latency_ms" in run.costs else ""
    told = ""
    key = {name: value for name, value in (found.get("key") or {}).items() if name != "space" and value is not None}
    if key:
        under = ", ".join(f"{escaped(name)} {escaped(value)}" for name, value in key.items())
        told += f"<p>Measured under: {under}. The table holds for nothing else.</p>"
    spread, noise = found.get("spread_ms"), found.get("noise_ms")
    if spread is not None and noise is not None:
        told += separation(spread, noise)
    return f"{title}{told}{validation(found.get('validation') or {})}{entries(found)}"


def separation(spread: float, noise: float) -> str:
    """Whether latency tells the subnets of this space apart at all."""
    both = (
        f"The latencies of the subnets spread over {spread:.3g} ms, and a repeated measurement moves by {noise:.3g} ms"
    )
    if spread >= SEPARABLE * noise:
        return f"<p>{both}: {spread / noise if noise else math.inf:.1f} times less, so latency tells subnets apart.</p>"
    return (
        f'<div class="caution"><h3>Latency cannot separate these</h3><p>{both}. That is not even {SEPARABLE:g} '
        "times as much, so one subnet is as fast as the other as far as can be told here. MACs are the cost to look at."
        "</p></div>"
    )


def validation(found: Mapping[str, Any]) -> str:
    """Predictions beside measurements beside repeated measurements."""
    subnets = found.get("subnets") or []
    if not subnets:
        return ""
    points = [(str(s["number"]), s["predicted_ms"], s["measured_ms"], s.get("again_ms")) for s in subnets]
    error, again, tau, tau_again = (found.get(name) for name in ("error", "repeat_error", "tau", "repeat_tau"))
    lines = [
        f"<tr><td>mean relative error</td>{number(error, '{:.1%}')}{number(again, '{:.1%}')}</tr>",
        f"<tr><td>Kendall's tau of the order</td>{number(tau)}{number(tau_again)}</tr>",
    ]
    near = error is not None and error <= max(ALLOWED_ERROR, again or 0.0)
    ordered = tau_again is None or (tau or 0.0) >= ALLOWED_TAU * tau_again
    verdict = (
        "So the table can stand in for a measurement here."
        if near and ordered
        else "So the table is not to be trusted here: subnets that matter are measured themselves."
    )
    return (
        f'<div class="panels"><figure>{plots.agreement(points, "ms")}</figure><div>'
        + table(["measured against", ">the table", ">itself again"], lines)
        + f"<p>{plural(len(subnets), 'subnet')} drawn at random were measured from end to end (disc), and once more "
        "(ring). On the dashed line the table is right. It cannot agree with a measurement better than the measurement "
        "agrees with its own repetition, so read one column against the other. Tau is 1 where both put all subnets in "
        f"the same order. {verdict}</p></div></div>"
    )


def entries(found: Mapping[str, Any]) -> str:
    """The table itself."""
    lines = [
        f"<tr><td>{escaped(one.get('row', ''))}</td><td>{escaped(picks_text(one.get('picks')))}</td>"
        f"{number(one.get('ms'), '{:.3f}')}{number(one.get('iqr'), '{:.3f}')}{number(one.get('count'), '{:.0f}')}</tr>"
        for one in found.get("entries") or ()
    ]
    if not lines:
        return ""
    fitted = found.get("kind") == "regression"
    what = (
        "What a row with these options takes longer than with its fastest ones, in whole subnets, and how many subnets "
        "had it. Rows measured alone did not add up, so this was fitted."
        if fitted
        else "Median milliseconds of a row with these options, measured alone, and the distance between its quartiles."
    )
    fixed = found.get("fixed_ms")
    rest = "" if fixed is None else f" What all subnets have in common takes {fixed:.3g} ms."
    return folded(
        f"The table: {plural(len(lines), 'entry', 'entries')}, {'fitted to whole subnets' if fitted else 'by row'}",
        f"<p>{what}{rest}</p>"
        + table(["row", "options", ">ms", ">quartiles", ">subnets" if fitted else ">runs"], lines, sortable=True),
    )


def picks_text(picks: Any) -> str:
    if isinstance(picks, Mapping):
        return ", ".join(f"{name} {option_text(pick)}" for name, pick in picks.items())
    return " ".join(map(option_text, picks)) if isinstance(picks, list) else option_text(picks)
