"""The report's figures: matplotlib drawings as SVG text that takes its colours and its font from the page around it.

A drawing is made once for light and for dark pages: it is drawn in stand-in colours, which are then replaced by CSS
variables (`--accent`, ...). Text stays text, so it can be selected, searched and read aloud.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

from mezo_lightning.reporting.outcome import is_flat, training_value
from mezo_lightning.reporting.records import StepRecord, ValidationRecord

# Stand-in colours (never seen) and the CSS variables that take their place.
ACCENT, TRAIN, SECOND, WARN, INK, MUTED, GRID, CARD = (f"#0102{n:02x}" for n in range(8))
_VARIABLES = dict(
    zip(
        (ACCENT, TRAIN, SECOND, WARN, INK, MUTED, GRID, CARD),
        ("--accent", "--train", "--second", "--warn", "--ink", "--muted", "--grid", "--card"),
        strict=True,
    )
)
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mezo-lightning",  # the same run gives the same file
    "font.size": 12,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
}
_POINTS_PER_INCH = 72
_BINS = 200  # more points than pixels help nobody


def curve(
    steps: Sequence[StepRecord],
    validations: Sequence[ValidationRecord],
    metric: str,
    *,
    width: int,
    height: int,
) -> str:
    """A metric over the steps: training batches (points and their running mean) and validations."""
    with _Drawing(width, height) as (figure, axes):
        taken = [step for step in steps if step.skipped is None]
        x, y = _binned([s.step for s in taken], [training_value(s, metric) for s in taken])
        if len(x):
            axes.plot(x, y, "o", color=TRAIN, markersize=3.5, markeredgewidth=0, alpha=0.6)
            axes.plot(x, _running_mean(y), color=TRAIN, linewidth=2.5)
        points = [(v.step, v.metrics[metric]) for v in validations if math.isfinite(v.metrics.get(metric, math.nan))]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=ACCENT, linewidth=2.5, markersize=7, markeredgecolor=CARD)
        axes.margins(x=0.02, y=0.12)
        _step_axis(axes)
        return _svg(figure)


def gradient_histogram(projected_grads: Sequence[float], *, width: int, height: int) -> str:
    """How the projected gradients are spread; the outermost bars hold everything beyond the 1st and 99th percentile."""
    values = np.array([g for g in projected_grads if math.isfinite(g)])
    with _Drawing(width, height) as (figure, axes):
        reach = float(np.percentile(np.abs(values), 99)) if len(values) else 1.0
        reach = reach or 1.0
        count = min(41, max(11, int(math.sqrt(max(len(values), 1))) | 1))  # odd: one bar is centred on zero
        axes.hist(np.clip(values, -reach, reach), bins=count, range=(-reach, reach), color=ACCENT, rwidth=0.88)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        axes.set_xlabel("projected gradient")
        return _svg(figure)


def ties(steps: Sequence[StepRecord], *, width: int, height: int) -> str:
    """Shares of tied samples and of identical completions over the steps; flat and skipped steps as ticks below."""
    with _Drawing(width, height) as (figure, axes):
        taken = [step for step in steps if step.skipped is None]
        identical = [math.nan if s.identical_fraction is None else s.identical_fraction for s in taken]
        x, y = _binned([s.step for s in taken], [s.tie_fraction for s in taken])
        axes.plot(x, 100 * _running_mean(y), color=ACCENT, linewidth=2, marker="o" if len(x) == 1 else "")
        x, y = _binned([s.step for s in taken], identical)
        axes.plot(x, 100 * _running_mean(y), "--", color=SECOND, linewidth=2, marker="o" if len(x) == 1 else "")
        for color, level, marked in (
            (WARN, -7, [s.step for s in steps if s.skipped is not None]),
            (MUTED, -14, [s.step for s in taken if is_flat(s)]),
        ):
            marked = _thinned(marked, among=len(steps))
            axes.plot(marked, [level] * len(marked), "|", color=color, markersize=7, markeredgewidth=1.5)
        axes.set_ylim(-18, 104)
        axes.set_yticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        if steps:
            axes.set_xlim(min(s.step for s in steps) - 0.5, max(s.step for s in steps) + 0.5)
        _step_axis(axes)
        return _svg(figure)


class _Drawing:
    """A figure of so many pixels with one set of axes, under our style and away from pyplot's global state."""

    def __init__(self, width: int, height: int):
        self._style = matplotlib.rc_context(_STYLE)
        self._size = (width / _POINTS_PER_INCH, height / _POINTS_PER_INCH)

    def __enter__(self) -> tuple[Figure, Axes]:
        self._style.__enter__()
        figure = Figure(figsize=self._size, layout="constrained")
        return figure, figure.add_subplot()

    def __exit__(self, *exception: object) -> None:
        self._style.__exit__(None, None, None)


def _step_axis(axes: Axes) -> None:
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("step")


def _binned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal runs of consecutive points, at most `_BINS` of them; points without a value left out."""
    known = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if not known:
        return np.empty(0), np.empty(0)
    groups = np.array_split(np.array(known, dtype=float), min(_BINS, len(known)))
    means = np.array([group.mean(axis=0) for group in groups])
    return means[:, 0], means[:, 1]


def _thinned(steps: Sequence[int], among: int) -> list[int]:
    """The first of the steps that would fall on the same spot of the page."""
    first: dict[int, int] = {}
    for step in steps:
        first.setdefault(step * _BINS // max(among, _BINS), step)
    return list(first.values())


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a tenth of the points, over fewer at the ends."""
    half = len(values) // 20
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _svg(figure: Figure) -> str:
    """The drawing as an inline `<svg>` element."""
    figure.patch.set_alpha(0)
    figure.axes[0].patch.set_alpha(0)
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # it would style the whole page
    text = re.sub(r"font-family: [^;\"]+; ", "", text)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
