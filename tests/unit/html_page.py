"""Reads a page: is every element closed, what does it load."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "rect", "line", "path", "circle", "link"}


class Page(HTMLParser):
    """Checks nesting and collects attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loads, self.images = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.loads += [attributes[name] for name in ("src", "href", "srcset", "data") if name in attributes]
        self.images += [attributes] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
