"""What is printed during a run: tables and notes that go above a progress bar, in a terminal and in a pipe.

Text is laid out by rich and then written through `tqdm.write`, which lifts all progress bars for the moment (rich's own
bars catch what is written to stdout). Colours only in a terminal. Completions are untrusted: what could steer a
terminal is shown, not sent.
"""

import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from mezo_lightning.reporting.outcome import Outcome
from mezo_lightning.reporting.report import SamplePair, prompt_tail, text_head

_WIDTHS = (60, 140)  # below, tables break; above, the eye loses the line
_TEXT = 110
_COLOURS = {"up": "green", "down": "red", "same": "default"}


def write(renderable: RenderableType) -> None:
    """Print above the progress bar."""
    narrowest, widest = _WIDTHS
    width = min(max(shutil.get_terminal_size((100, 24)).columns - 1, narrowest), widest)
    colours = "auto" if sys.stdout.isatty() else None
    buffer = io.StringIO()
    Console(file=buffer, width=width, force_terminal=sys.stdout.isatty(), color_system=colours).print(
        renderable, crop=False
    )
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(line.rstrip() for line in buffer.getvalue().rstrip("\n").split("\n"))
    # In one piece: rich's bar redraws itself after each. With a blank line: at times it erases one line too many.
    try:
        tqdm.write(text.encode(encoding, "replace").decode(encoding) + "\n\n", file=sys.stdout, end="")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`| head`) has left: no reason to end hours of training
        pass


def sample_table(pairs: Sequence[SamplePair], title: str) -> Table:
    """Prompt, completion before, completion now, score; where nothing is completed, the target and its loss."""
    twice = any(pair.now is not None for pair in pairs)
    completed = any(pair.before or pair.now for pair in pairs)  # a loss of targets completes nothing
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, expand=True
    )
    table.add_column("prompt", ratio=4, style="dim", overflow="fold")
    if completed:
        table.add_column("before" if twice else "completion", ratio=3, overflow="fold")
    if completed and twice:
        table.add_column("now", ratio=3, overflow="fold")
    aimed = not completed and any(pair.target is not None for pair in pairs)
    if aimed:
        table.add_column("target", ratio=3, overflow="fold")
    scored = any(pair.score_before != "none" for pair in pairs)  # votes are no scores
    if scored:
        table.add_column("loss" if pairs[0].score_name == "loss" else "score", no_wrap=True, justify="right")
    for pair in pairs:
        row = [Text(visible(prompt_tail(pair.prompt, _TEXT)))]
        if completed:
            row.append(Text(visible(pair.before)))
        if completed and twice:
            row.append(Text(visible(pair.now or ""), style="bold" if pair.now != pair.before else ""))
        if aimed:
            row.append(Text(visible(text_head(pair.target or "", _TEXT))))
        if scored:
            score = pair.score_before if pair.now is None else f"{pair.score_before} > {pair.score_now}"
            row.append(Text(score, style=_COLOURS[pair.direction]))
        table.add_row(*row)
    return table


def warning(text: str) -> Panel:
    """A note that should not be overlooked."""
    return Panel(Text(visible(text)), title="warning", title_align="left", border_style="yellow", box=box.SQUARE)


def closing(outcome: Outcome, report: Path, replay_command: str | None) -> Group:
    """The last words of a run: what happened, where to read more, how to get the weights again if they changed."""
    style = {"better": "bold green", "worse": "bold red", "nothing": "bold red"}.get(outcome.verdict, "bold")
    lines = [Text(visible(outcome.headline), style=style)]
    lines += [Text(f"- {visible(note)}") for note in outcome.notes]
    lines += [Text(f"report: {report}", no_wrap=True, overflow="ignore")]
    if replay_command is not None:
        lines += [Text(f"replay: {replay_command}", no_wrap=True, overflow="ignore")]
    return Group(Text(""), *lines)


def visible(text: str) -> str:
    """Text on one line in which control characters are shown instead of obeyed."""
    text = text.replace("\r\n", "\n").replace("\n", " \u23ce ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
