"""Text of users and files as it may be shown in a terminal: nothing in it moves the cursor, changes colours or hides.

Names of classes, files and jobs come from outside. A control character among them would be run by the terminal.
"""

import unicodedata

LINES = "\n\t"


def visible(text: str, *, keep_lines: bool = False) -> str:
    """Return the text with control characters, lone surrogates and marks of direction as escapes.

    `keep_lines` keeps line breaks and tabs.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if _is_shown(letter) or (keep_lines and letter in LINES) else _escape(letter) for letter in text
    )


def _is_shown(letter: str) -> bool:
    # other letters that are not printable, such as unassigned ones and spaces of other widths, do nothing
    return letter.isprintable() or (
        unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp")
        and not unicodedata.bidirectional(letter).startswith(("LR", "RL", "PD", "FS"))
    )


def _escape(letter: str) -> str:
    number = ord(letter)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
