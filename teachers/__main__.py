"""Teachers on their way to other programs.

python -m teachers edm WEIGHTS OUT.pkl      for EDM's own programs
"""

from __future__ import annotations

import logging
from pathlib import Path

import click

import teachers
from core.cli import report_user_errors
from teachers import _edm_pickle


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Take a diffusion model to other programs."""


@main.command()
@click.argument("weights")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.pkl")
@report_user_errors(stopped="stopped; nothing was written")
def edm(weights: str, out: Path) -> None:
    """Write a model as a pickle that EDM's generate.py, fid.py and train.py --transfer open.

    WEIGHTS: a file, a short name, or the folder of a run of refine.py --teach.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _edm_pickle.write(teachers.load(weights), out)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
