"""Short names of published teachers."""

from __future__ import annotations

from pathlib import Path

import pytest

import teachers
from cli_runs import call, tiny_recipe
from core.errors import UserError
from teachers import CATALOGUE, LICENCE, check_name, resolve


def test_a_short_name_is_the_url_of_its_file() -> None:
    """Every name is that of its file; baselines stand in a folder of their own."""
    for name, url in CATALOGUE.items():
        file = resolve(name)
        assert (file.shown, file.location, file.licence) == (name, url, LICENCE)
        check_name(name)
        assert url.startswith("https://") and url.endswith(f"/{name}.pkl")
        assert ("/baseline/" in url) == name.startswith("baseline-")


def test_paths_and_urls_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a file whose name has no dot."""
    monkeypatch.chdir(tmp_path)
    Path("mine").touch()
    for source in ("mine", "mine.pkl", "folder/mine", "https://example.org/x"):
        check_name(source)
        assert (resolve(source).location, resolve(source).licence) == (source, None)


def test_an_unknown_name_lists_near_ones() -> None:
    """One sentence, before anything is looked for."""
    with pytest.raises(UserError, match="edm-cifar10-32x32-uncond-vp"):
        teachers.load("edm-cifar10-32x32-unkond-vp")


def test_a_recipe_takes_a_short_name(tmp_path: Path) -> None:
    """--dry-run shows where the file comes from; a misspelling is one sentence."""
    recipe = tiny_recipe(tmp_path)
    shown = call("--gan", recipe, "--dry-run", "teacher={weights: edm-ffhq-64x64-uncond-vp}")
    assert f"teacher: {CATALOGUE['edm-ffhq-64x64-uncond-vp']}" in shown.stdout
    wrong = call("--gan", recipe, "--outdir", tmp_path, "teacher={weights: edm-fhq-64x64-uncond}")
    assert wrong.code == 2 and "edm-ffhq-64x64-uncond-vp" in wrong.stderr
