"""Errors that carry what they are about as fields, so that no caller has to parse their text."""

from __future__ import annotations


class ArgumentError(ValueError):
    """A bad value of one argument.

    `argument` is its Python name. The message is that name followed by `problem`, such as "=40 is
    not a multiple of 16 pixels: use 32 or 48"; the command line puts its option's name in front
    instead.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument + problem)
        self.argument, self.problem = argument, problem
