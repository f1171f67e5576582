"""Tables and lines of a terminal whose words are shown as they are: rich would read `[...]` in them as markup."""

from typing import Any

from rich.table import Table
from rich.text import Text

from avcil_dist.text.visible import visible


def plain(text: str) -> Text:
    """Return words of users as text for `Console.print`: without markup, and without control characters."""
    return Text(visible(text))


class WordTable(Table):
    """Table with a title, whose cells are words; none of them is markup."""

    def __init__(self, title: str, **settings: Any) -> None:
        super().__init__(title=plain(title), title_justify="left", **settings)

    def add_column(self, header: Any = "", *arguments: Any, **settings: Any) -> None:
        """Add a column, as `Table` does."""
        super().add_column(_as_text(header), *arguments, **settings)

    def add_row(self, *cells: Any, **settings: Any) -> None:
        """Add a row, as `Table` does."""
        super().add_row(*(_as_text(cell) for cell in cells), **settings)


def _as_text(cell: Any) -> Any:
    # a heading may have line breaks of its own
    return Text("\n".join(visible(line) for line in cell.split("\n"))) if isinstance(cell, str) else cell
