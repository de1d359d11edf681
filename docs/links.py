"""Does every link within a built site lead somewhere? Ends with 1, and a line for each that does not.

    python docs/links.py docs/_build

Sphinx checks the links of the pages' sources; this is about what came out, with the theme's own.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.add(value)


def broken(site):
    """A line for each link that leads nowhere."""
    # the theme keeps a template beside its scripts
    paths = [path.resolve() for path in site.rglob("*.html") if "_static" not in path.parts]
    pages = {path: Page(path) for path in paths}
    if not pages:
        raise SystemExit(f"{site}: no pages")
    for path, page in sorted(pages.items()):
        for link in sorted(page.links):
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            if not file.exists():
                yield f"{path.name}: {link}: no such file"
            elif target.fragment and file in pages and unquote(target.fragment) not in pages[file].ids:
                yield f"{path.name}: {link}: no such place"


if __name__ == "__main__":
    lines = list(broken(Path(sys.argv[1])))
    print(*lines, sep="\n", end="\n" if lines else "")
    sys.exit(bool(lines))
