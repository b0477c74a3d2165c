"""Markdown while it is generated: complete blocks stay, the growing block is redrawn."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from supra_core.visible import visible

_FENCES = ("```", "~~~")
# What a terminal prints when Ctrl-C is pressed.
_INTERRUPTED = "^C"
# rich's parser without HTML: a model that writes vector<int> means it.
_PARSER = MarkdownIt().enable(["strikethrough", "table"]).disable(["html_block", "html_inline"])


def drawn(text: str) -> Markdown:
    """The text as markdown, with controls as escapes and links with their targets."""
    shown = visible(text, lines=True)
    markdown = Markdown(shown, hyperlinks=False)
    markdown.parsed = _PARSER.parse(shown)
    _clean(markdown.parsed)
    return markdown


def _clean(tokens: list[Token]) -> None:
    """Escape what the parser decoded: entities, and percent signs of addresses."""
    for token in tokens:
        token.content = visible(token.content, lines=True)
        token.info = visible(token.info)
        token.attrs = {
            name: visible(value) if isinstance(value, str) else value
            for name, value in token.attrs.items()
        }
        _clean(token.children or [])


class MarkdownStream:
    """Text in pieces on a terminal, as a context manager; leaving it prints the rest."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text = ""
        # Only the growing block is redrawn, so that an answer longer than the screen scrolls.
        # Progress on stderr draws and erases a line of its own: rich would print what it erases.
        self._live = Live(
            console=console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> MarkdownStream:
        self._live.start()
        return self

    def write(self, piece: str) -> None:
        """Show one more piece."""
        self._text += piece
        done, self._text = split_blocks(self._text)
        if done.strip():
            self._live.update("", refresh=True)
            self._console.print(drawn(done))
            self._console.print()
        self._live.update(_Tail(drawn(self._text)), refresh=True)

    def __exit__(self, *_: object) -> None:
        self._live.update("", refresh=True)
        self._live.stop()
        if self._text.strip():
            self._console.print(drawn(self._text))


class _Tail:
    """The last lines that fit on the screen; rich would show the first."""

    def __init__(self, whole: RenderableType) -> None:
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # On a full line, ^C would start another one, which is not erased later.
        narrower = options.update_width(max(1, options.max_width - len(_INTERRUPTED)))
        lines = console.render_lines(self._whole, narrower, pad=False)
        for line in lines[-max(1, options.size.height - 1) :]:
            yield from line
            yield Segment.line()


def split_blocks(text: str) -> tuple[str, str]:
    """Complete blocks, and the block that may still grow, after the last blank line outside code.

    A list is one block, because its numbering continues over blank lines.
    """
    lines = text.split("\n")
    cut, fence = 0, ""
    for number, line in enumerate(lines):
        mark = line.strip()[:3]
        if fence:
            fence = "" if mark == fence and line.strip() == fence else fence
        elif mark in _FENCES:
            fence = mark
        elif not line.strip() and number + 1 < len(lines) and not _continues(lines[number + 1 :]):
            cut = number + 1
    return "\n".join(lines[:cut]), "\n".join(lines[cut:])


def _continues(following: list[str]) -> bool:
    """Whether the text after a blank line may belong to the list before it."""
    first = next((line for line in following if line.strip()), None)
    if first is None:
        return True
    word = first.split(maxsplit=1)[0]
    item = word in ("-", "*", "+") or (word[:-1].isdigit() and word[-1] in ".)")
    return item or first.startswith((" ", "\t"))
