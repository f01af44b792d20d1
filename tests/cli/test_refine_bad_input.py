"""Bad input to `refine.py`: one clear sentence, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import generators
from cli_runs import call, contents, tiny_recipe
from generators import stylegan2
from pretrained import networks
from refinement import components
from repository import ROOT


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of reference images are kept in a folder of the test."""
    monkeypatch.setenv("GAN_REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))


def error_of(folder: Path, *arguments: str | Path) -> str:
    """Return what the command says is wrong, after checking how it says it."""
    before = contents(folder)
    outcome = call(*arguments)
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.stderr
    *_, sentence = outcome.stderr.partition("error: ")
    assert sentence and "\nerror: " not in sentence
    assert contents(folder) == before and not (folder / "runs").exists()
    return sentence


def refused(folder: Path, *settings: str | Path) -> str:
    """Return why the tiny recipe with these settings is refused."""
    recipe = tiny_recipe(folder)
    return error_of(folder, "--gan", recipe, "--outdir", folder / "runs", *settings)


# The recipe ---------------------------------------------------------------------------------------

SETTINGS = {
    "unknown key": (["training.batchsize=8"], ["training.batchsize", "'batch_size'"]),
    "wrong type": (["training.batch_size=many"], ["training.batch_size", "'many'", "whole number"]),
    "not positive": (["training.student_lr=-1"], ["training.student_lr", "> 0"]),
    "two at once": (
        ["training.batch_size=many", "evaluation.imags=5"],
        ["training.batch_size", "evaluation.imags", "2 to correct"],
    ),
    "in recipe and network at once": (
        ["training.sed=1", "student.config.z_dimm=3", "teacher.config.components=none"],
        ["training.sed", "student.config.z_dimm", "teacher.config.components", "3 to correct"],
    ),
    "impossible pair": (
        ["training.micro_batch_size=9"],
        ["micro_batch_size 9 exceeds batch_size 8"],
    ),
    "unknown family": (["student.family=stylegan22"], ["'stylegan22'", "'stylegan2'"]),
    "unknown family of weights": (
        ["student={weights: net.pkl, family: stylegan22}"],
        ["'stylegan22'", "'stylegan2'"],
    ),
    "unknown objective": (["objective.name=diff"], ["objective.name", "'diff'", "diff_instruct"]),
    "unknown optimizer": (["training.optimizer.name=Adamm"], ["'Adamm'", "Adam"]),
    "weights and config": (["student.weights=net.pkl"], ["student", "either weights"]),
    "neither": (["teacher.config="], ["teacher", "either weights"]),
    "a name that is no folder": (["name=a/b"], ["'a/b'", "a letter or digit first"]),
    "no such device": (["device=tpu"], ["'tpu'", "cpu"]),
    "no such kernels": (["kernels=cuda"], ["kernels", "native", "reference"]),
    "a key through a number": (
        ["training.batch_size.x=1"],
        ["training.batch_size", "not a section"],
    ),
    "an override without its key": (["=1"], ["key.path=value"]),
    "two recipes": (["other.yaml"], ["two recipes", "other.yaml", "key.path=value"]),
    "an override without =": (["training.seed"], ["training.seed", "key.path=value"]),
}


@pytest.mark.parametrize(("settings", "named"), SETTINGS.values(), ids=SETTINGS.keys())
def test_a_wrong_setting_is_named(tmp_path: Path, settings: list[str], named: list[str]) -> None:
    """The sentence holds the key, what came, and what is expected or near."""
    sentence = refused(tmp_path, *settings)
    for word in named:
        assert word in sentence


def test_a_missing_recipe_is_named_with_one_near(tmp_path: Path) -> None:
    """A wrong recipe name is answered with the right one."""
    near = tiny_recipe(tmp_path)
    sentence = error_of(tmp_path, "--gan", tmp_path / "tony.yaml")
    assert "no such recipe" in sentence and str(near) in sentence


@pytest.mark.parametrize("text", ["student: [", "just words", "student: 1\nstudent: 2"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    """What is not YAML of keys and values is refused by the name of the file."""
    (tmp_path / "broken.yaml").write_text(text)
    assert "broken.yaml" in error_of(tmp_path, "--gan", tmp_path / "broken.yaml")


# What the recipe names ----------------------------------------------------------------------------

MISFITS = {
    "resolution": (["teacher.config.image_shape=[1, 16, 16]"], ["8x8", "16x16"]),
    "channels": (["teacher.config.image_shape=[3, 8, 8]"], ["1 channel,", "3 channels"]),
    "classes": (["teacher.config.num_classes=2"], ["0 classes", "the teacher 2"]),
    "extractor": (["evaluation.extractor=incepton"], ["'incepton'", "inception", "pixels"]),
    "extractor of another size": (["evaluation.extractor=mnist32"], ["mnist32", "(1, 32, 32)"]),
    "too few samples of the teacher": (
        ["evaluation.reference=teacher", "evaluation.metrics=[kid]", "evaluation.images=99"],
        ["kid needs at least 1,000 generated images, got 99", "1,000 real images, got 99"],
    ),
    "no reference": (["evaluation.reference=nowhere.npz"], ["nowhere.npz"]),
}


@pytest.mark.parametrize(("settings", "named"), MISFITS.values(), ids=MISFITS.keys())
def test_parts_that_do_not_fit_are_refused_before_the_run(
    tmp_path: Path, settings: list[str], named: list[str]
) -> None:
    """Student, teacher, extractor and reference must go together; both sides are named."""
    sentence = refused(tmp_path, *settings)
    for word in named:
        assert word in sentence


def test_a_reference_of_other_images_is_refused(tmp_path: Path) -> None:
    """Images of another size than the student's measure nothing."""
    (tmp_path / "real").mkdir()
    for index in range(2):
        Image.new("L", (16, 16), color=index * 99).save(tmp_path / "real" / f"{index}.png")
    sentence = refused(tmp_path, f"evaluation.reference={tmp_path / 'real'}")
    assert "16x16" in sentence and "8x8" in sentence


def whole(path: Path) -> None:
    shape = {"img_resolution": 8, "img_channels": 1, "z_dim": 8, "w_dim": 8, "channel_max": 8}
    networks.save(path, stylegan2.build(stylegan2.Config.model_validate(shape)))


def truncated(path: Path) -> None:
    whole(path)
    path.write_bytes(path.read_bytes()[:-100])


def hostile(path: Path) -> None:
    """Write a pickle that calls os.system as soon as it is unpickled."""
    command = f"touch '{path.parent / 'trace'}'".encode()
    call_of_system = b"c" + b"posix\nsystem\n" + b"X" + struct.pack("<I", len(command)) + command
    path.write_bytes(b"\x80\x04" + call_of_system + b"\x85R.")


WEIGHTS = {
    "truncated": (truncated, ["is truncated"]),
    "hostile": (hostile, ["posix.system"]),
    "text": (lambda path: path.write_text("these are no weights, but words"), ["no network file"]),
    "empty": (lambda path: path.touch(), ["is empty"]),
    "missing": (lambda path: None, ["There is no"]),
    "a folder": (lambda path: path.mkdir(), ["cannot be read"]),
}


@pytest.mark.parametrize(("write", "named"), WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_weights_file_that_is_none_is_named(
    tmp_path: Path, role: str, write: Callable[[Path], None], named: list[str]
) -> None:
    """The sentence holds the path and what is wrong with the file; nothing in it ran."""
    path = tmp_path / "net.pkl"
    write(path)
    sentence = refused(tmp_path, f"{role}={{weights: '{path}'}}")
    assert str(path) in sentence
    for word in named:
        assert word in sentence
    assert not (tmp_path / "trace").exists()


def test_the_whole_weights_file_is_taken(tmp_path: Path) -> None:
    """What the truncated file was before it was cut does open: the test above can fail."""
    whole(tmp_path / "net.pkl")
    assert generators.load(tmp_path / "net.pkl").image_shape == (1, 8, 8)


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    """A student's file given as the teacher is named as what it is."""
    whole(tmp_path / "net.pkl")
    sentence = refused(tmp_path, f"teacher={{weights: '{tmp_path / 'net.pkl'}'}}")
    assert f"{tmp_path / 'net.pkl'} holds stylegan2 weights" in sentence and "edm" in sentence


ABSENT = {
    "teacher": "teacher={weights: nowhere.pkl}",
    "student": "student={weights: nowhere.pkl}",
    "reference": "evaluation.reference=nowhere.pkl",
    "teacher's samples": "evaluation.teacher=nowhere.pkl",
}


@pytest.mark.parametrize("setting", ABSENT.values(), ids=ABSENT.keys())
def test_a_missing_file_is_refused_before_any_network_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Nobody waits for gigabytes to load to learn of a wrong path."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(components, "load_network", load)
    assert "There is no nowhere.pkl. " in refused(tmp_path, setting)


def test_missing_images_are_refused_before_any_network_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of --teach are named like every other file."""
    monkeypatch.setattr(components, "load_network", lambda *_, **__: pytest.fail("loaded"))
    recipe = ROOT / "configs" / "teach" / "small32.yaml"
    sentence = error_of(tmp_path, "--teach", recipe, "objective.images=nowhere.zip")
    assert "There is no nowhere.zip. " in sentence


def test_weights_of_another_checksum_are_refused(tmp_path: Path) -> None:
    """sha256 in the recipe is checked before the file is used."""
    whole(tmp_path / "net.pkl")
    sentence = refused(
        tmp_path, f"student={{weights: '{tmp_path / 'net.pkl'}', sha256: '{'0' * 64}'}}"
    )
    assert "0" * 64 in sentence


# The command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--resume", "--report"])
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, option: str) -> None:
    """Going on needs a run: a folder without one, and no folder at all, are told apart."""
    (tmp_path / "other").mkdir()
    assert "not a run folder" in error_of(tmp_path, option, tmp_path / "other")
    assert "no such run folder" in error_of(tmp_path, option, tmp_path / "nothing")


def test_a_run_keeps_its_recipe(tmp_path: Path) -> None:
    """--report takes no settings; --resume takes those that change nothing of before."""
    assert "keeps its recipe" in error_of(tmp_path, "--report", tmp_path, "device=cpu")
    sentence = error_of(tmp_path, "--resume", tmp_path, "training.seed=1")
    assert "training.seed: a run that has begun keeps this setting" in sentence
    sentence = error_of(tmp_path, "--resume", tmp_path, "evaluation.images=9")
    assert "measure the run's weights with python -m eval" in sentence


def test_one_thing_at_a_time(tmp_path: Path) -> None:
    """--gan and --resume together are refused, as are two modes, or none."""
    assert "give one of" in error_of(tmp_path, "--gan", "--resume", tmp_path)
    assert "give one of" in error_of(tmp_path, "--gan", "--distill")
    assert "give one of" in error_of(tmp_path)


def test_an_outdir_that_is_a_file_is_named(tmp_path: Path) -> None:
    """A place where no folder can be made is refused, and stays as it is."""
    (tmp_path / "file").write_text("mine")
    recipe = tiny_recipe(tmp_path)
    sentence = error_of(tmp_path, "--gan", recipe, "--outdir", tmp_path / "file")
    assert str(tmp_path / "file") in sentence and "--outdir" in sentence
