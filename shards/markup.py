"""HTML to plain text: what a reader would see, a line for each block."""

import re
from html.parser import HTMLParser

DROPPED = frozenset("head script style template noscript".split())
IN_HEAD = frozenset("title meta link base script style template noscript".split())
BLOCKS = frozenset(
    "address article aside blockquote body br center dd details dialog div dl dt fieldset figcaption figure footer "
    "form h1 h2 h3 h4 h5 h6 header hgroup hr html legend li main menu nav ol option p pre search section select "
    "summary table tbody tfoot thead tr ul".split()
)
CELLS = frozenset(("td", "th"))
SPACE = re.compile("[ \t\n\r\f]+")  # HTML's own white space: a no-break space stays


def html_text(html: str) -> str:
    """The text of a page: no scripts, styles or head, entities decoded, a line break at the edges of each block."""
    parser = Text()
    parser.feed(html)
    parser.close()
    parser.end_line()
    return "\n".join(parser.lines).strip("\n")


class Text(HTMLParser):
    """Collects lines. White space shrinks to one space, but not inside <pre>."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self.line: list[str] = []
        self.dropping: list[str] = []  # open elements whose content is left out, outermost first
        self.pre = 0

    def end_line(self) -> None:
        """A line break, unless the line is empty."""
        text = "".join(self.line)
        text = text.rstrip() if self.pre else SPACE.sub(" ", text).strip(" ")
        if text:
            self.lines.append(text)
        self.line = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if self.dropping == ["head"] and tag not in IN_HEAD:  # </head> may be left out
            self.dropping.pop()
        if tag in DROPPED:
            self.dropping.append(tag)
        if tag in BLOCKS:
            self.end_line()
            self.pre += tag == "pre"
        elif tag in CELLS:
            self.line.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.dropping:
            while self.dropping.pop() != tag:
                pass
        if tag in BLOCKS:
            self.end_line()
            self.pre = max(0, self.pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self.dropping:
            return
        if not self.pre:
            self.line.append(SPACE.sub(" ", data))
            return
        first, *rest = data.replace("\r\n", "\n").split("\n")
        self.line.append(first)
        for line in rest:
            self.lines.append("".join(self.line).rstrip())
            self.line = [line]

    def unknown_decl(self, data: str) -> None:
        """Nothing: <![CDATA[ ... ]]> is no text."""

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        """<![CDATA[ to its end; any other <![ is a comment to the next >, as in a browser.

        HTMLParser's own raises AssertionError where no word, or one that it doesn't know, follows (CPython 3.11).
        """
        if self.rawdata[i : i + 9].lower() == "<![cdata[":
            return super().parse_marked_section(i, report)
        return self.parse_bogus_comment(i, report)
