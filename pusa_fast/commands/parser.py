"""Typer commands built from the classes of `pusa_fast.options`: one declaration gives the parser
and the help."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pusa_fast.options import Declared, declared


def whole(text: str | int) -> int:
    if not re.fullmatch(r"-?\d{1,18}", str(text).strip()):
        raise typer.BadParameter(f"{text!r} is not a whole number")
    return int(text)


def number(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None


_PARSERS: dict[Any, Callable[[str], Any]] = {int: whole, float: number}


def command(
    app: typer.Typer, options: type, **settings: Any
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Make a function of an `options` instance a command of `app`, with its name and docstring."""

    def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
        def fill(**given: Any) -> None:
            run(options(**given))

        # A real signature, since Typer reads one.
        parameters = [_parameter(option) for option in declared(options).values()]
        fill.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        fill.__doc__ = run.__doc__
        app.command(run.__name__, **settings)(fill)
        return run

    return register


def _parameter(option: Declared) -> inspect.Parameter:
    shown, kind = option.option, option.kind
    # A switch has one form: without the name, Typer would add --no-name.
    names = (option.flag,) if shown.flag or kind is bool else ()
    make: Any = typer.Argument if shown.argument else typer.Option
    about = make(*names, help=shown.help, metavar=shown.metavar, parser=_PARSERS.get(kind), rich_help_panel=shown.panel)
    default = inspect.Parameter.empty if option.default is dataclasses.MISSING else option.default
    annotation = Annotated[kind | None if default is None else kind, about]  # type: ignore[valid-type]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
