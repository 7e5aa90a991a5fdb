"""Builds the documentation site: `make docs`, or `python docs/build.py --out=DIR`.

The pages are those of docs/ and the pages that docs/README.md, the map of the site, links outside of docs/ (PAPERS.md, the
papers' README files). They are written to DIR/pages with their links changed, then Sphinx reads them, without a network:

- docs/README.md becomes the first page. A list under one of its headings is a chapter: the order of its links is the order in the
  sidebar. Sphinx refuses a page that is in no list.
- Links to other files of the repository lead to `--repository`, or become plain text without one.
- The comment `<!-- page: NAME -->` becomes a link to a page that is generated from the code (docs/generated_pages.py).
"""

import argparse
import os
import pathlib
import re
import shutil
import sys

import generated_pages

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"(^```.*?^```[ \t]*$)", re.MULTILINE | re.DOTALL)
# The name of a page as the words of a link to it: the site shows the title instead.
NAMED = re.compile(r"\[[\w/]+\.md\](?=\([^()\s]+\.md)")
GENERATED = re.compile(r"<!-- page: (\S+) -->")
TOCTREE = "```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```"


class DocumentationError(Exception):
    """A page or a link of the documentation that is wrong."""


def chapters(text: str) -> dict[str, list[str]]:
    """Returns the link targets, and names of generated pages, of each list of docs/README.md by its heading."""
    result: dict[str, list[str]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        items = re.findall(r"^ *- .*(?:\n +[^- ].*)*", body, re.MULTILINE)
        pages = [page for item in items for page in (*LINK.findall(item), *GENERATED.findall(item))]
        if pages:
            result[title] = pages
    return result


def page_names(text: str) -> dict[pathlib.Path, str]:
    """Returns the name on the site of each page of the repository by its path."""
    pages = sorted([*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")])
    names = {path: str(path.relative_to(DOCS)) for path in pages}
    names[DOCS / "README.md"] = "index.md"
    for title, targets in chapters(text).items():
        for target in targets:
            path = (DOCS / target).resolve()
            if target.startswith("../") and path.suffix == ".md":
                stem = path.parent.name if path.name == "README.md" else path.stem
                names[path] = f"{title.lower()}/{stem.lower()}.md"
    return names


def relinked(path: pathlib.Path, names: dict[pathlib.Path, str], repository: str) -> str:
    """Returns the text of a page with the links that it has on the site.

    Raises:
      DocumentationError: for a link to a file that does not exist.
    """
    here = pathlib.Path(names[path]).parent

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[1].partition("#")
        if not target or re.match("[a-z]+:", target):
            return match[0]
        file = pathlib.Path(os.path.normpath(path.parent / target))
        if not file.exists():
            raise DocumentationError(
                f"{path.relative_to(ROOT)} links {target}, which does not exist"
            )
        if file in names:
            target = os.path.relpath(names[file], here)
        elif file.is_relative_to(DOCS) and file.is_file():
            target = os.path.relpath(file.relative_to(DOCS), here)
        else:  # without an address, the end of the file is reached by `plain`
            target = f"{repository}/{file.relative_to(ROOT)}" if repository else "source:"
        return f"]({target}{'#' * bool(anchor)}{anchor})"

    parts = FENCE.split(path.read_text(encoding="utf-8"))
    parts[::2] = [NAMED.sub("[]", plain(LINK.sub(link, part))) for part in parts[::2]]
    return "".join(parts)


def plain(text: str) -> str:
    """Returns text in which links to files that are on no page are their own words."""
    return re.sub(r"\[([^\[\]]*)\]\(source:[^)]*\)", r"\1", text)


def first_page(text: str, names: dict[pathlib.Path, str]) -> str:
    """Returns docs/README.md, whose links are changed, as the first page: with the chapters in the sidebar."""
    original = chapters((DOCS / "README.md").read_text(encoding="utf-8"))
    trees = []
    for title, targets in original.items():
        paths = [(DOCS / target).resolve() for target in targets]
        pages = [names.get(p, t) for p, t in zip(paths, targets, strict=True)]
        trees.append(TOCTREE.format(caption=title, pages="\n".join(dict.fromkeys(pages))))
    text = GENERATED.sub(r"([page](\1))", text)
    return "\n\n".join([text, *trees, ""])


def write(path: pathlib.Path, text: str) -> None:
    """Writes a page if its text has changed, so that Sphinx reads only what is new."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def prepare(out: pathlib.Path, repository: str) -> str:
    """Writes the pages that Sphinx reads, and removes those of an earlier call that are gone. Returns llms.txt."""
    front = DOCS / "README.md"
    names = page_names(front.read_text(encoding="utf-8"))
    texts = generated_pages.pages()
    for path, name in names.items():
        text = relinked(path, names, repository) if path.suffix == ".md" else None
        if path == front and text is not None:
            text = first_page(text, names)
        texts[name] = path.read_text(encoding="utf-8") if text is None else text
    for name, text in texts.items():
        write(out / name, text)
    written = set(texts)
    for path in DOCS.rglob("*"):
        name = str(path.relative_to(DOCS))
        if path.is_file() and path.suffix in (".png", ".svg", ".json", ".csv"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, out / name)
            written.add(name)
    for path in out.rglob("*"):
        if path.is_file() and str(path.relative_to(out)) not in written:
            path.unlink()
    trees = re.findall(r":caption: .*\n\n((?:\S+\n)+)", texts["index.md"])
    return generated_pages.llms(texts, [name for tree in trees for name in tree.split()])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "docs", metavar="DIR")
    parser.add_argument("--repository", default="", metavar="URL", help="of files at a commit")
    flags = parser.parse_args(argv)
    from sphinx.cmd import build

    sys.path.insert(0, str(ROOT))
    pages = flags.out / "pages"
    try:
        summary = prepare(pages, flags.repository.rstrip("/"))
    except DocumentationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(flags.out / "html", ignore_errors=True)  # with pages of an earlier call
    write(flags.out / "html" / "llms.txt", summary)
    return build.main(
        ["-W", "--keep-going", "-q", "-j", "2", "-b", "html", "-c", str(DOCS)]
        + ["-d", str(flags.out / "doctrees"), str(pages), str(flags.out / "html")]
    )


if __name__ == "__main__":
    raise SystemExit(main())
