"""`python -m eval`: the same numbers from any number of processes; bad input is a sentence."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from eval import edm_sampler, features, reference, samples
from eval.__main__ import main
from eval.feature_stats import FeatureStatistics
from eval.metrics.frechet import frechet_distance
from generators import stylegan2
from pretrained import networks
from repository import ROOT
from teachers import edm
from tiny_networks import songunet_config

TINY = dict(img_resolution=8, img_channels=1, z_dim=8, w_dim=8, channel_base=64, channel_max=8)


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, no kernels to compile in it, and pytest's logging back: the command sets
    up logging for itself.
    """
    monkeypatch.setenv("GAN_REFINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GAN_REFINE_KERNELS", "reference")
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A student of 8x8 grey images, its weights drawn."""
    torch.manual_seed(0)
    networks.save(tmp_path / "student.safetensors", stylegan2.build(stylegan2.Config(**TINY)))
    return tmp_path / "student.safetensors"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A teacher of 8x8 grey images, its weights drawn."""
    torch.manual_seed(0)
    shape = songunet_config(channel_mult=(1,), attn_resolutions=())
    networks.save(tmp_path / "teacher.safetensors", edm.build(shape))
    return tmp_path / "teacher.safetensors"


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A folder of 100 grey images of 8x8."""
    return _folder(tmp_path / "real", count=100)


def _folder(path: Path, *, count: int, seed: int = 1, size: int = 8) -> Path:
    path.mkdir()
    pixels = np.random.RandomState(seed).randint(0, 256, (count, size, size)).astype(np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{index:03d}.png")
    return path


def _call(*arguments: object) -> Result:
    """Run the command; a failure that is no exit of its own comes up."""
    result = CliRunner().invoke(main, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _measured(*arguments: object) -> dict:
    """Run the command with --json, which must go well; return what it printed."""
    result = _call(*arguments, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _refused(*arguments: object) -> str:
    """Run the command, which must print nothing and leave with one sentence and code 2."""
    result = _call(*arguments, "--device", "cpu")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return said.removeprefix("error: ")


SMALL = ("--extractor", "pixels", "--images", 40, "--set", "kid_subset_size=20")


# What is measured


def test_a_student_s_distance_is_that_of_its_seeds(student: Path, real: Path) -> None:
    """Value k is of the images of seeds 5 + 40 k and following, and all of it is in the JSON."""
    found = _measured("fid", student, "--reference", real, *SMALL, "--seeds", 2, "--first-seed", 5)
    images_of = samples.images_of_seeds(
        networks.load("generators", student, records=()), device="cpu"
    )
    pixels = features.load("pixels")
    known = reference.reference_statistics(real, pixels)
    expected = [
        frechet_distance(FeatureStatistics.of(pixels(images_of(range(a, a + 40)))), known)
        for a in (5, 45)
    ]
    assert found["metrics"]["fid"]["values"] == pytest.approx(expected, rel=1e-6)
    assert found["seeds"] == [[5, 45], [45, 85]]
    assert found["subject"]["kind"] == "student"
    assert found["reference"]["images"] == 100 and found["extractor"]["name"] == "pixels"
    assert found["definitions"]["kid_subset_size"] == 20


def test_a_teacher_is_sampled_as_asked(teacher: Path, real: Path) -> None:
    """With --sampler steps=2 its images are those of two steps, and the sampler is named."""
    found = _measured("fid", teacher, "--reference", real, *SMALL, "--sampler", "steps=2")
    network = networks.load("teachers", teacher, records=())
    images = samples.images_of_seeds(
        network,
        lambda net, latents, labels, noise: edm_sampler.heun(net, latents, labels, steps=2),
        device="cpu",
    )(range(40))
    pixels = features.load("pixels")
    known = reference.reference_statistics(real, pixels)
    expected = frechet_distance(FeatureStatistics.of(pixels(images)), known)
    assert found["metrics"]["fid"]["mean"] == pytest.approx(expected, rel=1e-6)
    assert "steps 2," in found["sampler"] and found["subject"]["kind"] == "teacher"


def test_a_folder_is_compared_with_another(tmp_path: Path, real: Path) -> None:
    """All its images count; a set against itself is at distance 0."""
    other = _folder(tmp_path / "other", count=60, seed=2)
    options = ("--extractor", "pixels", "--set", "kid_subset_size=20")
    found = _measured("fid,kid,pr", other, "--reference", real, *options)
    assert (found["images"], found["seeds"], found["subject"]["kind"]) == (60, [[0, 60]], "images")
    assert list(found["metrics"]) == ["fid", "kid", "precision", "recall"]
    assert found["metrics"]["fid"]["mean"] > 1
    same = _measured("fid", real, "--reference", real, *options)
    assert same["metrics"]["fid"]["mean"] == pytest.approx(0, abs=1e-6)


def test_all_names_what_it_leaves_out(teacher: Path, real: Path) -> None:
    """Pixels have no classes, a teacher no latents to walk in: said, and the rest is measured."""
    found = _measured("all", teacher, "--reference", real, *SMALL, "--sampler", "steps=1")
    assert list(found["metrics"]) == ["fid", "kid", "precision", "recall"]
    assert "extractor with classes" in found["left_out"]["is"]
    assert "a teacher, which is sampled" in found["left_out"]["ppl"]
    result = _call("all", teacher, "--reference", real, *SMALL, "--sampler", "steps=1")
    assert "! ppl was left out: ppl walks in the latents of a student" in result.stdout
    assert "FID (pixels features) ↓" in result.stdout and "sampler" in result.stdout


def test_all_goes_without_a_distance_that_is_out_of_reach(student: Path, real: Path) -> None:
    """Path lengths are left out with the reason, and refused where they were asked for by name."""
    options = (student, "--reference", real, *SMALL)
    missing = ("--set", "path_distance=nowhere.safetensors")
    found = _measured("all", *options, *missing)
    assert list(found["metrics"]) == ["fid", "kid", "precision", "recall"]
    assert "nowhere.safetensors" in found["left_out"]["ppl"]
    assert "nowhere.safetensors" in _refused("fid,ppl", *options, *missing)


def test_a_published_name_brings_its_count(student: Path, real: Path) -> None:
    """fid1k_full is of 1,000 images, and no other number may be asked for with it."""
    options = ("--reference", real, "--extractor", "pixels")
    found = _measured("fid1k_full", student, *options)
    assert (found["images"], found["asked"]) == (1000, ["fid1k_full"])
    said = _refused("fid1k_full", student, *options, "--images", 40)
    assert said == "fid1k_full is of 1,000 generated images, these are 40"


def test_a_run_s_folder_stands_for_its_student(tmp_path: Path, student: Path, real: Path) -> None:
    """Not the sample grids that lie in it, but the refined weights are measured."""
    run = _folder(tmp_path / "run", count=3)
    (run / "recipe.yaml").write_text("")
    student.rename(run / "student.safetensors")
    assert _measured("fid", run, "--reference", real, *SMALL)["subject"]["kind"] == "student"


def test_two_processes_measure_what_one_does(student: Path, real: Path) -> None:
    """torchrun with 2 processes and batches of 7 gives the numbers of one with batches of 64."""
    arguments = ["fid,kid,pr", student, "--reference", real, *SMALL, "--seeds", 2]
    alone = _measured(*arguments, "--batch-size", 64)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "eval"]
    command = [sys.executable, *launcher, *arguments, "--batch-size", 7, "--device", "cpu"]
    done = subprocess.run(
        [*map(str, command), "--json"], cwd=ROOT, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    for name, result in alone["metrics"].items():
        assert together["metrics"][name]["values"] == pytest.approx(result["values"], rel=1e-6)


# References


def test_a_reference_is_written_and_taken(
    tmp_path: Path, student: Path, teacher: Path, real: Path
) -> None:
    """Its file gives the numbers of the images; without features it gives a distance alone."""
    written = _call("reference", real, tmp_path / "real.npz", "--extractor", "pixels")
    assert written.exit_code == 0, written.output
    assert "64 features of 100 images by pixels, those of 100 images kept" in written.stdout
    options = ("fid,kid", student, *SMALL, "--reference")
    by_file, by_images = _measured(*options, tmp_path / "real.npz"), _measured(*options, real)
    assert by_file["metrics"] == by_images["metrics"]
    bare = ("reference", real, tmp_path / "bare.npz", "--extractor", "pixels")
    assert _call(*bare, "--no-keep-features").exit_code == 0
    said = _refused(*options, tmp_path / "bare.npz")
    assert "the reference holds only their mean and covariance" in said
    sampled = ("all", teacher, *SMALL, "--sampler", "steps=1")
    found = _measured(*sampled, "--reference", tmp_path / "bare.npz")
    assert list(found["metrics"]) == ["fid"] and {"kid", "pr"} < found["left_out"].keys()


def test_a_reference_is_not_replaced_by_accident(tmp_path: Path, real: Path) -> None:
    """An existing file stays, unless --overwrite; another suffix is refused."""
    out = tmp_path / "real.npz"
    out.write_text("mine")
    assert "real.npz exists" in _refused("reference", real, out, "--extractor", "pixels")
    assert out.read_text() == "mine"
    assert "must be named .npz" in _refused("reference", real, tmp_path / "real.zip")
    assert _call("reference", real, out, "--extractor", "pixels", "--overwrite").exit_code == 0


# Bad input


def test_a_name_that_is_no_metric_is_answered_with_those_that_are() -> None:
    """Also in a list of names."""
    for name in ("fod", "fid,fod"):
        result = _call(name, "x")
        assert result.exit_code == 2 and "no metric 'fod': expected fid, kid" in result.stderr


def test_a_zip_that_is_cut_off_is_named(tmp_path: Path, student: Path, real: Path) -> None:
    """As what is measured and as the reference."""
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for file in sorted(real.iterdir()):
            archive.write(file, file.name)
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole.read_bytes()[:-300])
    for arguments in (("fid", cut, "--reference", real), ("fid", student, "--reference", cut)):
        said = _refused(*arguments, "--extractor", "pixels")
        assert "cut.zip is neither a folder nor a readable zip" in said


def test_images_of_several_sizes_are_named(tmp_path: Path, student: Path, real: Path) -> None:
    """The first image that differs, and what it should be."""
    Image.new("L", (9, 8)).save(real / "050.png")
    other = _folder(tmp_path / "other", count=10)
    for arguments in (("fid", real, "--reference", other), ("fid", student, "--reference", real)):
        said = _refused(*arguments, "--extractor", "pixels")
        assert "050.png is 9x8 with 1 channel, but 000.png is 8x8" in said


def test_labels_for_some_images_alone_are_refused(student: Path, real: Path) -> None:
    """The image without a label is named."""
    labels = [[f"{index:03d}.png", 0] for index in range(100) if index != 7]
    (real / "dataset.json").write_text(json.dumps({"labels": labels}))
    said = _refused("fid", student, "--reference", real, *SMALL)
    assert "gives 007.png the label None" in said


def test_one_image_is_too_few(tmp_path: Path, student: Path, real: Path) -> None:
    """A covariance needs two, of either kind."""
    one = _folder(tmp_path / "one", count=1)
    assert "holds one image" in _refused("fid", student, "--reference", one, *SMALL)
    said = _refused("fid", one, "--reference", real, "--extractor", "pixels")
    assert said == "fid needs at least 2 generated images, got 1"


def test_a_reference_that_does_not_fit_is_refused(
    tmp_path: Path, student: Path, real: Path
) -> None:
    """Of another size, of another extractor, or none at all."""
    large = _folder(tmp_path / "large", count=4, size=16)
    said = _refused("fid", student, "--reference", large, *SMALL)
    assert "holds images of 16x16 with 1 channel, the images to measure are of 8x8" in said
    known = reference.reference_statistics(real, features.load("pixels"))
    other = reference.Reference(
        **{**vars(known), "extractor": "inception", "extractor_sha256": "f" * 64}
    )
    reference.save_npz(tmp_path / "other.npz", other)
    said = _refused("fid", student, "--reference", tmp_path / "other.npz", *SMALL)
    assert "holds features of the extractor inception (weights ffffffffffff)" in said
    said = _refused("fid,kid", student, *SMALL)
    assert said.startswith("fid compares with real images: name them with --reference")
    assert "There is no" in _refused("fid", student, "--reference", tmp_path / "no.zip", *SMALL)


def test_images_that_are_not_finite_name_their_seed(student: Path, real: Path) -> None:
    """A network whose finite weights overflow is told by the seed of its first bad image."""
    network = networks.load("generators", student, records=())
    with torch.no_grad():
        next(network.synthesis.parameters()).fill_(3e38)
    networks.save(student, network)
    said = _refused("fid", student, "--reference", real, *SMALL, "--first-seed", 7)
    assert "the image of seed 7 is not finite" in said


def test_what_is_neither_weights_nor_images_is_refused(tmp_path: Path, real: Path) -> None:
    """A text, a folder without images, a zip of torch's, nothing at all."""
    (tmp_path / "text.txt").write_text("these are not the weights that you look for")
    (tmp_path / "empty").mkdir()
    torch.save({}, tmp_path / "net.pt")
    options = ("--reference", real, *SMALL[:2])
    assert "text.txt is no network file" in _refused("fid", tmp_path / "text.txt", *options)
    assert "holds no image" in _refused("fid", tmp_path / "empty", *options)
    assert "without a generator" in _refused("fid", tmp_path / "net.pt", *options)
    assert "There is no" in _refused("fid", tmp_path / "nothing.pkl", *options)
    assert "none of the published teachers" in _refused("fid", "edm-cifar11", *options)


def test_a_set_against_itself_is_zero(real: Path) -> None:
    """Neither -0.00 nor -4.5e-13."""
    outcome = _call("fid", real, "--reference", real, "--extractor", "pixels").stdout
    assert " 0.00" in outcome and "-0.00" not in outcome


def test_an_npy_is_answered_with_what_statistics_are(tmp_path: Path, student: Path) -> None:
    np.save(tmp_path / "mu.npy", np.zeros(3))
    refused = _refused("fid", student, "--reference", tmp_path / "mu.npy", "--extractor", "pixels")
    assert "statistics are a .npz with mu [D] and sigma [D, D]" in refused


def test_options_that_do_nothing_are_refused(student: Path, real: Path) -> None:
    """Seeds of files, the sampler of a student, a definition that there is not."""
    options = ("--reference", real, "--extractor", "pixels")
    said = _refused("fid", real, *options, "--images", 50, "--seeds", 3)
    assert "all 100 of which are measured: leave out --images and --seeds" in said
    said = _refused("fid", student, *options, "--sampler", "steps=3")
    assert "--sampler is of a teacher" in said and "holds a student" in said
    result = _call("fid", student, *options, "--set", "kid_subset=3")
    assert result.exit_code == 2 and "did you mean 'kid_subsets'" in result.stderr
    said = _refused("fid", student, *options, "--first-seed", 2**32 - 5, "--images", 40)
    assert "there are 4,294,967,296 at most" in said


def test_path_lengths_need_latents(real: Path) -> None:
    """A set of images has none."""
    said = _refused("ppl", real, "--extractor", "pixels")
    assert "ppl walks in the latents of a student" in said and "is a set of images" in said


def test_path_lengths_alone_need_no_features() -> None:
    """Nothing is fetched for them but their distance, and the card names no features."""
    student = ROOT / "assets" / "mnist32" / "student.safetensors"
    card = _measured("ppl", student, "--images", 8, "--set", "path_distance=mnist32")
    assert card["metrics"]["ppl"]["mean"] > 0
    assert card["extractor"] is None and card["distance"]["name"] == "mnist32"


def test_a_run_without_weights_yet_is_named(tmp_path: Path, real: Path) -> None:
    """Its folder stands for a student that is not there before the end."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    said = _refused("fid", tmp_path / "run", "--reference", real, *SMALL)
    assert "no student.safetensors yet" in said and "--resume" in said
