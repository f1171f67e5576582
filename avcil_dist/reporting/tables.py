"""Tables and lines of a terminal whose words are shown as they are: rich would read `[...]` in them as markup.

A table that is wider than the terminal wraps its cells between words. Where even that is too wide, its columns follow
below one another, each part with the table's first columns, so that no word is cut at 80 columns.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from avcil_dist.text.visible import visible


def plain(text: str) -> Text:
    """Return words of users as text for `Console.print`: without markup, and without control characters."""
    return Text(visible(text))


LONGEST_WORD = 30  # a longer one, such as a path, may be broken


class WordTable(Table):
    """Table with a title, whose cells are words; none of them is markup.

    `num_keys` columns identify a row; they are in each part of a table that is too wide for the terminal.
    """

    def __init__(self, title: str, *, num_keys: int = 1, **settings: Any) -> None:
        super().__init__(title=plain(title), title_justify="left", **settings)
        self.num_keys = num_keys

    def add_column(self, header: Any = "", *arguments: Any, **settings: Any) -> None:
        """Add a column, as `Table` does."""
        super().add_column(_as_text(header), *arguments, **settings)

    def add_row(self, *cells: Any, **settings: Any) -> None:
        """Add a row, as `Table` does."""
        super().add_row(*(_as_text(cell) for cell in cells), **settings)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table, in parts where it is too wide."""
        measured = [self._measured(console, options, column) for column in self.columns]
        frame, per_column = (1 if self.box and self.show_edge else 0), self._padding_width
        if frame + sum(natural + per_column for _, natural in measured) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        least = [width for width, _ in measured]
        groups = fitting_groups(least, self.num_keys, options.max_width, frame=frame, per_column=per_column)
        for index, group in enumerate(groups):
            room = options.max_width - frame - per_column * len(group)
            widths = shared_widths([measured[number] for number in group], room)
            yield from Table.__rich_console__(self._part(group, widths, with_title=index == 0), console, options)

    @property
    def _padding_width(self) -> int:
        _, right, _, left = self.padding
        return right + left + (1 if self.box else 0)

    def _measured(self, console: Console, options: ConsoleOptions, column: Column) -> tuple[int, int]:
        """The widths of a column without padding: the least one that breaks no word, and that of whole lines."""
        cells = [Measurement.get(console, options, cell) for cell in (column.header, *column._cells)]
        natural = max(cell.maximum for cell in cells)
        words = natural if column.no_wrap else min(max(cell.minimum for cell in cells), LONGEST_WORD)
        return max(words, min(natural, column.min_width or 0)), max(natural, column.min_width or 0)

    def _part(self, numbers: Sequence[int], widths: Sequence[int], *, with_title: bool) -> "WordTable":
        """A table of some of the columns, of these widths."""
        part = WordTable("", box=self.box, padding=self.padding, pad_edge=self.pad_edge)
        part.title = self.title if with_title else None
        part.columns = [replace(self.columns[number], width=widths[at]) for at, number in enumerate(numbers)]
        part.rows = self.rows
        return part


def shared_widths(measured: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Return the widths of columns that share `room`: at least the first of each pair, at most the second.

    Where the least widths are more than the room, the widest column becomes narrower.
    """
    widths = [least for least, _ in measured]
    while sum(widths) < room and any(width < most for width, (_, most) in zip(widths, measured, strict=True)):
        wanting = [number for number, (_, most) in enumerate(measured) if widths[number] < most]
        widths[max(wanting, key=lambda number: measured[number][1] - widths[number])] += 1
    while sum(widths) > room and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    return widths


def fitting_groups(
    widths: Sequence[int], num_keys: int, max_width: int, *, frame: int, per_column: int
) -> list[list[int]]:
    """Distribute columns of these least widths over parts that fit into `max_width`, each with the first `num_keys`.

    `per_column` is added to each column, and `frame` once. A column that does not fit beside the keys has a part of
    its own.
    """
    keys = list(range(min(num_keys, len(widths))))
    groups = [list(keys)]
    used = frame + sum(widths[key] + per_column for key in keys)
    base = used
    for number in range(len(keys), len(widths)):
        width = widths[number] + per_column
        if used + width > max_width and len(groups[-1]) > len(keys):
            groups.append(list(keys))
            used = base
        groups[-1].append(number)
        used += width
    return groups


def _as_text(cell: Any) -> Any:
    # a heading may have line breaks of its own
    return Text("\n".join(visible(line) for line in cell.split("\n"))) if isinstance(cell, str) else cell
