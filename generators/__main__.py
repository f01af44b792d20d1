"""Students on their way to other programs.

python -m generators onnx WEIGHTS OUT.onnx --truncation 0.7      for programs without PyTorch
python -m generators refined ORIGINAL.pkl WEIGHTS OUT.pkl        for the tools of the original
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

import generators
from core.downloads import local_file
from core.errors import UserError
from core.roles import Generator
from generators import _onnx

_path = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Take a student to other programs."""


@main.command()
@click.argument("weights")
@click.argument("out", type=_path)
@click.option("--truncation", default=1.0, show_default=True, help="psi, fixed in the file.")
def onnx(weights: str, out: Path, truncation: float) -> None:
    """Write the student of a weights file as ONNX, checked against PyTorch."""
    difference = _onnx.export_onnx(_student(weights), out, truncation=truncation)
    click.echo(f"{out}: its images differ from PyTorch's by {difference:.1e} of the largest value")


@main.command()
@click.argument("original")
@click.argument("weights")
@click.argument("out", type=_path)
def refined(original: str, weights: str, out: Path) -> None:
    """Write the user's pickle again with the refined weights in it."""
    written = generators.save_refined(local_file(original), out, _student(weights))
    click.echo(f"{out}: {' and '.join(written)} refined, all else as in {original}")


def _student(weights: str) -> Generator:
    return generators.load(weights)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
