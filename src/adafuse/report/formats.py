"""How numbers and texts are printed: three digits, an interval as fine as it deserves, a unit; and templates.

In: numbers with their intervals. Out: short strings. Next: claims.py; tables.py, whose columns name these.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2

from adafuse.report import rules
from adafuse.report.rules import MIN_SEEDS, Difference, Number, Verdict, judge_difference

# what Markdown takes for the beginning of HTML
TAG = re.compile(r"<(?=[A-Za-z/!?])")
GAP, MARK = "–", "withdrawn: "
UNITS = {"G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
# by name: what a value is multiplied by, and how it is printed
SCALED = {"short": (1, "{:.3g}"), "whole": (1, "{:,.0f}"), "printed": (1, "{:g}"), "score": (100, "{:.1f}")}
SCALED |= {"share": (100, "{:.0f} %"), "tenths": (100, "{:.1f} %"), "resolution": (100, "± {:.2g} %")}


def shown(form: str, found: Number) -> str:
    """A number as a column of tables.yaml wants it, with its mark if it is withdrawn."""
    if form in ("n", "hosts"):
        return str(getattr(found, form) or "")
    told = WITH_INTERVAL[form](found) if form in WITH_INTERVAL else plain(form, found.value)
    return MARK * bool(found.withdrawn) + told


def plain(form: str, value: float) -> str:
    """A bare value by the name of its format."""
    if form in SCALED:
        scale, template = SCALED[form]
        return template.format(scale * value)
    if form == "yes":
        return "yes" if value else "no"
    return count(value) if form == "count" else digits(value)


def ours_text(found: Number | str) -> str:
    """Our side of a claim."""
    if isinstance(found, str) or not found:
        return str(found or GAP)
    text = f"{points_text(found)} points" if isinstance(found, Difference) else hosts_text(found)
    return MARK * bool(found.withdrawn) + text


def ratio_text(found: Number) -> str:
    """1.29 [1.25, 1.33], with as many decimals as the interval's width deserves."""
    if math.isnan(found.low):
        return f"{digits(found.value)} (no interval)"
    if found.low == found.high:
        return f"{found.value:.4f}" + (f" ({found.reason})" if found.reason else "")
    return f"{found.value:.{_places(found)}f} {_ends(found, found.low, found.high)}"


def verdict_text(found: Verdict) -> str:
    """The word, and that of the rule before where it is another."""
    return found.verdict + (f" (before {rules.SINCE}: {found.before})" if found.before else "")


def hosts_text(found: Number) -> str:
    """A ratio, and of what its interval is: 1.29 [1.25, 1.33; one host]; of several where the next one would lie."""
    if not found.hosts or not found.low < found.high:
        return ratio_text(found)
    low, high = (f"{end:.{_places(found)}f}" for end in (found.predict_low, found.predict_high))
    return f"{ratio_text(found)[:-1]}; {f'next host {low}–{high}' if found.hosts > 1 else 'one host'}]"


def predicted_text(found: Number) -> str:
    """Where the next host's ratio would lie: [1.21, 1.38]."""
    return _ends(found, found.predict_low, found.predict_high)


def within_text(found: Number) -> str:
    """The interval of these very hosts; of one it is the only one."""
    ends = (found.within_low, found.within_high) if found.hosts > 1 else (found.low, found.high)
    return _ends(found, *ends)


def _ends(found: Number, low: float, high: float) -> str:
    places = _places(found)
    return GAP if math.isnan(low) else f"[{low:.{places}f}, {high:.{places}f}]"


def _places(found: Number) -> int:
    return min(4, max(2, math.ceil(-math.log10(found.high - found.low)))) if found.low < found.high else 4


def signed_text(found: Number, scale: float, places: int) -> str:
    """+0.5 [-1.0, +2.0]."""
    value, low, high = (f"{scale * own:+.{places}f}" for own in (found.value, found.low, found.high))
    return f"{value} (no interval)" if math.isnan(found.low) else f"{value} [{low}, {high}]"


# differences of accuracies, which are fractions, and of losses
points_text, nats_text = partial(signed_text, scale=100, places=1), partial(signed_text, scale=1, places=3)


def judged_text(found: Number) -> str:
    """A difference in points with its verdict in a word or three, unless it is withdrawn; none on too few seeds."""
    word = "" if found.withdrawn else judge_difference(found).word
    return f"{points_text(found)} {word}".strip() if found.n >= MIN_SEEDS else GAP


WITH_INTERVAL: dict[str, Callable[[Number], str]] = {"interval": ratio_text, "points": points_text}
WITH_INTERVAL |= {
    "nats": nats_text,
    "judged": judged_text,
    "predicted": predicted_text,
    "within": within_text,
}
# the worst value of a check, and its bound
WITH_INTERVAL |= {"bounded": lambda found: f"{plain('short', found.value)} of {plain('short', found.high)}"}


def with_unit(found: Number, unit: str) -> str:
    """A number of a goal: a ratio where there is no unit."""
    if found.low < found.high and not unit:
        return hosts_text(found)
    return plain("tenths", found.value) if unit == "%" else f"{digits(found.value)} {unit}".strip()


def digits(value: float | None) -> str:
    """Three significant digits without exponents: 0.0312, 1.29, 12.9, 1290."""
    if value is None or math.isnan(value):
        return GAP
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def count(value: float) -> str:
    """A count with its unit: 7.07 G."""
    unit = next((unit for unit, scale in UNITS.items() if abs(value) >= scale), "")
    return f"{digits(value / UNITS[unit])} {unit}".strip()


def percent_text(ratio: float) -> str:
    """A ratio as the paper prints it: 1.29 is +29 %."""
    extra = 100 * (ratio - 1)
    return f"{extra:+.0f} %" if abs(extra) >= 10 else f"{extra:+.2g} %"


def rendered(template: str, **names: Any) -> str:
    """A template of templates/, filled."""
    return environment(template.rpartition(".")[2]).get_template(f"{template}.j2").render(**names)


@cache
def environment(kind: str = "") -> jinja2.Environment:
    """Of the templates, with formats as filters. What records say is text: in `html`, and no tag in `md`, whatever
    shows it.
    """
    found = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    found.loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    found.autoescape = kind == "html"
    if kind == "md":
        found.finalize = lambda value: TAG.sub("&lt;", value) if isinstance(value, str) else value
    found.filters |= {"ratio": hosts_text, "points": points_text, "ours": ours_text, "unit": with_unit}
    found.filters |= {"share": partial(plain, "share"), "digits": digits, "verdict": verdict_text}
    found.filters |= {"sha256": _sha256}
    found.globals |= {"rules": rules}
    return found


def _sha256(text: str) -> str:
    """As a Content-Security-Policy names a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
