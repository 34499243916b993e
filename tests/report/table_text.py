"""Reading a table that was written."""


def cells_of(markdown: str, *words: str) -> list[str]:
    """The cells of the first line of a Markdown table that begins with these words."""
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if tuple(cells[: len(words)]) == words:
            return cells[len(words) :]
    raise AssertionError(f"no line {words} in\n{markdown}")
