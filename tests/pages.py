"""A page as a test reads it, and text that tries to act in one."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "input", "br", "hr", "link"}

HOSTILE = [
    "<script>alert(1)</script>",
    "</style></script></div></details><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- --> &lt;b&gt; ]]>",
    "\x1b[31m\x00\x07 \u202eevil\u202c \u2066x",
    "https://evil.example/x.png",
]


class Page(HTMLParser):
    """Reads a page; fails where tags do not match or an attribute stands twice."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {}
        self.scripts: list[str] = []
        self.section = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs), f"{tag} {attrs}"
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = found["id"]
            self.sections[self.section] = ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if self.section:
            self.sections[self.section] += " "  # cells and terms are apart for the eye
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.section:
            self.sections[self.section] += data

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())

    def rollouts(self) -> list[dict[str, str]]:
        return [found for tag, found in self.elements if tag == "details" and found.get("class") == "rollout"]
