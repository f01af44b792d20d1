"""`python -m reports`: print the report of a run, or compare several runs on one page."""

from __future__ import annotations

from pathlib import Path

import click

from core.cli import report_user_errors
from core.errors import UserError
from reports import compare, data, text, write


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN…")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Path of the comparison page.  [default: comparison.html]",
)
@report_user_errors(stopped="stopped; nothing was written")
def main(runs: tuple[Path, ...], out: Path | None) -> None:
    """Print a run's report; of several runs, write one page that compares them.

    RUN is a run's folder, or a report.json. Rebuild a report with: python refine.py --report RUN

    \b
    python -m reports runs/00000-first
    python -m reports runs/00000-first runs/00001-second --out comparison.html
    """
    paths = [compare.report_path(run) for run in runs]
    reports = [data.read(path) for path in paths]
    if len(reports) == 1:
        if out is not None:
            raise UserError(
                f"one run has a page already, {paths[0].with_name('report.html')}: give several"
            )
        click.echo(f"{reports[0].name}\n{text.summary(reports[0])}")
        return
    target = out or Path("comparison.html")
    compared = compare.compare(reports, paths, beside=target)
    write.write_comparison(target, compared)
    click.echo(f"{compare.summary(compared)}\n\nwrote {target}")


if __name__ == "__main__":
    main()
