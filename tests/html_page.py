"""Reads a page of HTML as a browser would, for what has to hold of every page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Reads a page: its tags with their attributes, its text, and whether every tag is closed by its own."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def numbers(self, of_shift: bool = False) -> dict[tuple[str, str], float]:
        """What the cells of tables hold, to the last digit, by metric and network: those about shift, or all others."""
        cells = [td for td in self.all("td") if "data-value" in td]
        values = {(td["data-metric"], td["data-network"]): float(td["data-value"]) for td in cells}
        assert len(values) == len(cells), "a number stands there twice"
        return {at: value for at, value in values.items() if at[0].startswith("shift_") == of_shift}

    @property
    def text(self) -> str:
        return "".join(self.texts)


def require_self_contained(html: str) -> Reader:
    """Nothing but data is referred to, no script runs, and the policy forbids both; headings are in order."""
    reader = Reader(html)
    for _, attributes in reader.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert not reader.all("script") and not reader.all("link") and not reader.all("iframe")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    (policy,) = (meta["content"] for meta in reader.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in zip(levels, levels[1:], strict=False))
    assert all(image["alt"].strip() for image in reader.all("img"))
    return reader
