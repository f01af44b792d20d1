"""Adding an objective is adding a file: a run of it is trained, resumed and reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cli_runs import tiny_recipe
from core.run_folder import RunFolder
from repository import ROOT

MODULE = '''
"""Pull the student's images to what the teacher sees in them: an objective of a user's own."""

from typing import Literal

from core.config import Section
from core.roles import LossOutput, Phase


class Config(Section):
    """Settings."""

    name: Literal["regression"] = "regression"
    sigma: float = 0.5


class Regression:
    def __init__(self, config):
        self.config = config
        self.phases = (Phase("student", ("student",), self.loss),)

    def loss(self, networks, draws):
        latents = draws.normal("latents", networks.student.latent_shape)
        images = networks.student(latents, None)
        sigma = images.new_full((len(images),), self.config.sigma)
        noisy = images.detach() + self.config.sigma * draws.normal("noise", images.shape[1:])
        loss = (images - networks.teacher(noisy, sigma, None)).square().flatten(1).sum(1)
        return LossOutput(loss, {"student_loss": loss.detach().mean()})


def build(config):
    return Regression(config)
'''

PROGRAM = """
import sys
import objectives
objectives.__path__.append(sys.argv[1])
from cli_runs import call
for arguments in (
    ["--gan", sys.argv[2], "objective={name: regression, sigma: 0.4}", "--outdir", sys.argv[3],
     "training.duration_kimg=0.04"],
    ["--resume", sys.argv[3] + "/00000-tiny", "training.duration_kimg=0.08"],
    ["--report", sys.argv[3] + "/00000-tiny"],
):
    outcome = call(*arguments)
    assert outcome.code == 0, outcome.stderr
"""


def test_an_objective_in_a_file_of_its_own_is_run_resumed_and_reported(tmp_path: Path) -> None:
    """As CONTRIBUTING says: no other file has to know it."""
    place, runs = tmp_path / "mine", tmp_path / "runs"
    place.mkdir()
    (place / "regression.py").write_text(MODULE, encoding="utf-8")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(place), str(tiny_recipe(tmp_path)), str(runs)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = RunFolder(runs / "00000-tiny").report / "report.json"
    document = json.loads(report.read_text())
    assert document["images_seen"] == 80
    assert document["recipe"]["objective"] == {"name": "regression", "sigma": 0.4}
