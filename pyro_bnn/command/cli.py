"""The command line `pyro-bnn`: the names of its commands, which are imported when one of them is to run.

torch and Pyro take seconds to import, and `pyro-bnn --help` needs neither.
"""

from typing import Any

import typer
from typer.core import TyperGroup

#: what `pyro-bnn --help` says of each command
COMMANDS = {
    "fit": "Trains a Bayesian network and its deterministic twin on the same data.",
    "evaluate": "Computes the metrics of a saved run again, on its test data or others.",
    "predict": "Predicts rows without a target, as comma-separated values.",
    "report": "Writes one self-contained page about a saved run.",
    "compare": "Trains several methods with the same budget, and compares them.",
}


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        from pyro_bnn.command.commands import app  # late, see above

        return typer.main.get_command(app).commands[cmd_name]  # type: ignore[attr-defined]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def program() -> None:
    """Bayesian neural networks as Pyro programs."""


if __name__ == "__main__":
    app(prog_name="pyro-bnn")
