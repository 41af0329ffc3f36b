"""Parsing the command line: common options in any place, and no repeated option in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from starmerge_models.cli.printing import only_results
from starmerge_models.progress import HEARTBEAT

WrongCommandLine: Any = typer.BadParameter.__mro__[1]
"""Click's UsageError; newer releases of typer have a click of their own."""

_SEVERAL = {"--method": "Write a chain as one: -m star+ties."}
"""For options with one value: how to express what a repetition may have meant."""


def _check_once(command: Any, context: Any, args: Sequence[str]) -> None:
    """Refuse a repeated option of one value, of which the parser would drop all but the last."""
    found = Counter(command.make_parser(context).parse_args(args=list(args))[2])
    for option, count in found.items():
        if count > 1 and option.param_type_name == "option" and not _may_repeat(option):
            name = max(option.opts, key=len)
            hint = _SEVERAL.get(name, "Give it once.")
            raise WrongCommandLine(f"{name} is given {count} times. {hint}", ctx=context)


def _may_repeat(option: Any) -> bool:
    return bool(option.multiple or option.is_flag or option.count)


class Command(TyperCommand):
    """A command that refuses a repeated option, unless the option has several values.

    With ``--json``, only its results go to standard output.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line."""
        _check_once(self, ctx, args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with only_results() if ctx.params.get("as_json") else nullcontext():
            return super().invoke(ctx)


class Group(TyperGroup):
    """The group of all commands; their common options are accepted after a command, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Find the common options in any place, and apply them before the command runs."""
        args = self._common_first(args)
        try:
            _check_once(self, ctx, args)
            rest = super().parse_args(ctx, list(args))
        except WrongCommandLine as error:
            ctx.resilient_parsing = True  # skips wrong options: the error is logged as asked for
            super().parse_args(ctx, list(args))
            self._configure(ctx)
            option = getattr(error, "option_name", None)
            if self._is_of_command(option):
                message = f"{option} is an option of a command: write it after the command's name."
                raise WrongCommandLine(message, ctx=ctx) from error
            raise
        self._configure(ctx)
        return rest

    def _configure(self, ctx: Any) -> None:
        if ctx.obj is not None:  # a program that calls the app configures its own log
            options = {name: value for name, value in ctx.params.items() if value is not None}
            ctx.obj.configure(
                options.get("log", "auto"),
                quiet=options.get("quiet", False),
                heartbeat=options.get("heartbeat", HEARTBEAT),
                debug=options.get("debug", False),
            )

    def _is_of_command(self, option: str | None) -> bool:
        return any(
            option in known.opts for command in self.commands.values() for known in command.params
        )

    def _common_first(self, args: Sequence[str]) -> list[str]:
        """Return arguments with the common options at the beginning."""
        takes_value = {
            name: not getattr(option, "is_flag", False)
            for option in self.params
            for name in option.opts
        }
        common, rest = [], []
        words = iter(args)
        for word in words:
            name, equals, _ = word.partition("=")
            if word == "--":
                rest += [word, *words]
            elif name not in takes_value:
                rest.append(word)
            else:
                common.append(word)
                if takes_value[name] and not equals:
                    common += islice(words, 1)
        return common + rest
