"""The command line as `python -m pyro_bnn`."""

from pyro_bnn.command.cli import app

if __name__ == "__main__":
    app(prog_name="pyro-bnn")
