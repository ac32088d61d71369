"""Foreign text on a terminal."""

from __future__ import annotations


def plain(text: str) -> str:
    """Returns text without the control characters that a terminal obeys; they become a visible replacement character.

    Rollouts, logs and tasks are foreign text: an escape sequence in them could repaint the screen or set its title.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
