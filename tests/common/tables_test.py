"""Tables in Markdown."""

from markdown_it import MarkdownIt

from espalier.common import tables


def test_a_table_is_one_for_markdown_too():
    lines = tables.markdown(["a", "b"], [["1", tables.escaped("x|y")], ["2", ""]])
    assert lines == ["| a | b |", "|---|---|", "| 1 | x\\|y |", "| 2 |  |"]
    page = MarkdownIt("commonmark").enable("table").render("\n".join(lines))
    assert page.count("<tr>") == 3 and "<td>x|y</td>" in page
