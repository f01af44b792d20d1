"""Students as pictures, and on their way to other programs.

python -m generators images WEIGHTS --seeds 0-63 --grid OUT.png   pictures
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
from core.file import File
from core.roles import Generator
from generators import _images, _onnx

_path = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Write a student's images, or take it to other programs. WEIGHTS: a file or a run's folder."""


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
@click.option(
    "--g-ema-only",
    is_flag=True,
    help="Leave G as it is, for whoever resumes the GAN's own training: the refined weights are "
    "averaged ones, and a D beside them is not theirs.",
)
def refined(original: str, weights: str, out: Path, g_ema_only: bool) -> None:
    """Write the user's pickle again with the refined weights in it."""
    student = _student(weights)
    written = generators.save_refined(local_file(original), out, student, g_ema_only=g_ema_only)
    click.echo(f"{out}: {' and '.join(written)} refined, all else as in {original}")


@main.command()
@click.argument("weights")
@click.option("--seeds", default="0-63", show_default=True, help="Such as 0-63 or 1,5,9-12.")
@click.option("--out", type=_path, metavar="DIR", help="A PNG for each seed, in this folder.")
@click.option("--grid", type=_path, metavar="FILE.png", help="One PNG of all.")
@click.option("--truncation", default=1.0, show_default=True, help="psi; 1 is none.")
@click.option("--class", "label", type=int, help="Of all images.  [default: as each seed draws it]")
def images(
    weights: str,
    seeds: str,
    out: Path | None,
    grid: Path | None,
    truncation: float,
    label: int | None,
) -> None:
    """Write sample images of a student: those that an evaluation sees at these seeds."""
    if out is None and grid is None:
        raise UserError("give --out DIR for single images, or --grid FILE.png for one picture")
    numbers = _images.parse_seeds(seeds)
    made = _images.sample(_student(weights), numbers, truncation=truncation, label=label)
    if out is not None:
        _images.write(made, numbers, out)
        click.echo(f"wrote {out}: {len(numbers)} images")
    if grid is not None:
        _images.write_grid(made, grid)
        click.echo(f"wrote {grid}")


def _student(weights: str) -> Generator:
    """Return the student of a path, a URL, or a run's folder."""
    return generators.load(File(weights, weights).path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
