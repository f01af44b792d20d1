"""Kernels are compiled once, whoever starts first and whoever is killed; and what is said where
they cannot be.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch

from core.errors import UserError
from custom_ops import _build, backend
from custom_ops.bias_act import bias_act

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache without kernels, and a process that has asked for none yet."""
    monkeypatch.setenv("GAN_REFINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backend, "_reported", set())
    monkeypatch.setattr(backend, "_chosen", None)
    _build._library.cache_clear()
    yield tmp_path / "cache" / "kernels"
    _build._library.cache_clear()


def compiler(path, script):
    """Return the name of a program at a path that is run in place of the compiler."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def start(target):
    """Return a process of its own session that runs a function."""

    def run():
        os.setsid()
        target()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def build_and_use():
    with backend.using("native"):
        assert (bias_act(torch.ones(2), act="lrelu") > 1).all()


@needs_compiler
def test_eight_processes_with_an_empty_cache_all_come_up(empty_cache):
    """One builds, the others wait for it; one library is left and nothing half-built."""
    processes = [start(build_and_use) for _ in range(8)]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert sorted(path.suffix for path in empty_cache.iterdir()) == [".lock", ".so"]


@needs_compiler
def test_a_builder_that_is_killed_holds_up_nobody(empty_cache, tmp_path, monkeypatch):
    """After kill -9 in the middle of compiling the next start builds, and clears what was left."""
    begun = tmp_path / "begun"
    script = f'case "$*" in *cpu.cpp*) touch {begun}; sleep 60;; *) exec c++ "$@";; esac'
    with monkeypatch.context() as patch:
        patch.setenv("CXX", compiler(tmp_path / "slow-c++", script))
        builder = start(build_and_use)
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert begun.exists()
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    try:
        build_and_use()
        assert sorted(path.suffix for path in empty_cache.iterdir()) == [".lock", ".so"]
    finally:
        os.killpg(builder.pid, signal.SIGKILL)  # its compiler sleeps on


REFUSES = 'case "$*" in *cpu.cpp*) echo \'cpu.cpp:1: error: no such luck\'; exit 1;; esac; c++ "$@"'


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1", "exit status 1"),
        (None, "broken-c++: not found"),
        pytest.param(REFUSES, "cpu.cpp:1: error: no such luck", marks=needs_compiler),
    ],
)
def test_without_a_working_compiler_auto_says_so_once(
    script, reason, empty_cache, tmp_path, monkeypatch, caplog
):
    """One line with the reason, then the reference; native raises with the same reason."""
    broken = tmp_path / "broken-c++"
    monkeypatch.setenv("CXX", compiler(broken, script) if script else str(broken))
    with caplog.at_level(logging.WARNING, logger="custom_ops"):
        assert backend.choose("auto") == "reference"
        assert backend.choose("auto") == "reference"
        assert (bias_act(torch.ones(2), act="relu") > 1).all()
    (line,) = [record.getMessage() for record in caplog.records if "custom_ops" in record.name]
    assert "plain PyTorch on cpu" in line and reason in line
    assert "\n" not in line and len(line) < 400
    with pytest.raises(UserError, match="native was asked for, but compiling"):
        backend.choose("native")
    with pytest.raises(UserError, match="native was asked for"):
        bias_act(torch.ones(2))


def test_a_cache_that_cannot_be_written_is_named(empty_cache, tmp_path, monkeypatch):
    """The reason says which setting moves the cache."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="set GAN_REFINE_CACHE"):
        backend.choose("native")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_kernels_are_refused_by_name(empty_cache):
    """Nothing is compiled for a device that is not there."""
    with pytest.raises(UserError, match="no CUDA device"):
        backend.choose("native", "cuda")
    assert backend.choose("auto", "cuda") == "reference"
    assert not empty_cache.exists()


def test_the_policy_comes_from_the_environment_where_none_is_chosen(empty_cache, monkeypatch):
    """GAN_REFINE_KERNELS is for programs without a recipe; a wrong value is named."""
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert backend.kernels_for(torch.ones(2)) is None
    monkeypatch.setenv(backend.VARIABLE, "fast")
    with pytest.raises(UserError, match="'fast' is none of auto, native, reference"):
        backend.kernels_for(torch.ones(2))
    assert not empty_cache.exists()


def test_a_changed_source_is_another_library(tmp_path, monkeypatch):
    """So are another torch, another instruction set and another GPU architecture."""
    sources = shutil.copytree(_build._SOURCES, tmp_path / "csrc")
    names = {_build.library_path(None).name, _build.library_path("8.0").name}
    names.add(_build.library_path("9.0").name)
    monkeypatch.setattr(_build, "_SOURCES", sources)
    assert _build.library_path("9.0").name in names
    (sources / "cpu.cpp").write_text("// changed")
    names.add(_build.library_path(None).name)
    monkeypatch.setattr(_build, "_instruction_set", lambda: "another CPU")
    names.add(_build.library_path(None).name)
    monkeypatch.setattr(torch, "__version__", "0.0")
    names.add(_build.library_path(None).name)
    assert len(names) == 6


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_every_source_without_warnings(tmp_path):
    """For sm_80, sm_90 and the newest architecture that it knows."""
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True)
    newest = max(known.stdout.split(), key=lambda name: int(name.removeprefix("sm_")))
    code = f"arch=compute_80,code=[{','.join(dict.fromkeys(['sm_80', 'sm_90', newest]))}]"
    flags = ["-std=c++17", *_build._NVCC_FLAGS, "-gencode", code, "--threads", "2"]
    host = ["-Xcompiler", "-fPIC,-Wall,-Wextra", "--shared"]
    sources = sorted(_build._SOURCES.glob("*.cu"))
    assert sources
    for source in sources:
        command = ["nvcc", *flags, *host, str(source), "-o", str(tmp_path / "kernels.so")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout + result.stderr == ""
