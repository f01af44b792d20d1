"""pretrained.files: our files come back exactly, pickles as records, the rest as a sentence."""

import errno
import json
import os
import pickle
import sys
import types

import pytest
import safetensors.torch
import torch

from core.errors import UserError
from pretrained import files

TENSORS = {
    "float32": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "float16": torch.tensor([1.5, float("inf")], dtype=torch.float16),
    "bfloat16": torch.tensor([1e30], dtype=torch.bfloat16),
    "float64": torch.tensor(1 / 3, dtype=torch.float64),
    "int64": torch.tensor([2**40, -1]),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros(0, 5),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "channels_last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}
CONFIG = {"resolution": 32, "lr": 1e-4, "name": "é", "blocks": [1, 2], "none": None}


@pytest.fixture
def saved(tmp_path):
    """Give the path of a file in our format."""
    path = tmp_path / "student.safetensors"
    files.save(path, family="stylegan2", config=CONFIG, tensors=TENSORS, provenance={"kimg": 5})
    return path


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Give the path of a pickle in the published form."""
    persistence = types.ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): raise AssertionError", persistence.__dict__)
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)
    state = {"_init_kwargs": {"z_dim": 8}, "_buffers": {"w_avg": torch.arange(3.0)}}
    meta = {"type": "class", "version": 6, "module_src": "", "class_name": "Generator"}

    class Network:
        def __reduce__(self):
            return persistence._reconstruct_persistent_obj, (meta | {"state": state},)

    path = tmp_path / "network.safetensors"  # a wrong ending on purpose
    content = {"G_ema": Network(), "augment_pipe": None, "training_set_kwargs": {}}
    path.write_bytes(pickle.dumps(content))
    return path


def test_tensors_come_back_exactly(saved):
    """Every dtype, shape and layout has the same values in the same dtype."""
    found = files.read(saved).tensors
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_family_config_and_provenance_come_back(saved):
    """What was said about the network is said again, as JSON data."""
    network = files.read(saved)
    assert not files.is_pickle(saved)
    assert (network.family, network.config) == ("stylegan2", CONFIG)
    assert network.provenance == {"kimg": 5}


def test_the_format_is_the_documented_one(saved):
    """Other programs find format, network and provenance in the safetensors metadata."""
    with safetensors.safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "gan-refinement-toolkit/1"
    assert json.loads(metadata["network"]) == {"family": "stylegan2", "config": CONFIG}
    assert json.loads(metadata["provenance"]) == {"kimg": 5}


def test_equal_networks_make_equal_files(saved, tmp_path):
    """The bytes, and so the SHA-256, depend on nothing but the network."""
    again = tmp_path / "again"
    config, tensors = dict(reversed(CONFIG.items())), dict(reversed(TENSORS.items()))
    for _ in range(8):  # safetensors itself writes its metadata in a random order
        files.save(
            again, family="stylegan2", config=config, tensors=tensors, provenance={"kimg": 5}
        )
        assert again.read_bytes() == saved.read_bytes()


def test_tied_tensors_are_saved_one_by_one(tmp_path):
    """Tensors that share memory come back under each of their names."""
    shared = torch.arange(4.0)
    path = tmp_path / "tied"
    files.save(path, family="edm", config={}, tensors={"a": shared, "b": shared[1:3]})
    found = files.read(path)
    assert found.tensors["b"].tolist() == [1, 2] and found.provenance == {}


def test_a_pickle_is_recognised_by_content(published):
    """A published pickle is one whatever its name says, and gives its networks by name."""
    network = files.read(published)
    assert files.is_pickle(published) and isinstance(network, files.PublishedPickle)
    assert network.beside == ("training_set_kwargs",)
    record = network.record("G_ema")
    assert (record.class_name, record.arguments) == ("Generator", {"z_dim": 8})
    assert record.tensors["w_avg"].tolist() == [0, 1, 2]


def test_a_missing_record_names_those_there(published):
    """Asking for a teacher in a GAN's file says what the file has."""
    with pytest.raises(UserError, match=r"no network ema\. The networks in it: G_ema\."):
        files.read(published).record("ema")


def test_truncated_files_are_named_as_such(saved):
    """Our file cut anywhere is called truncated or, with nothing left, empty."""
    content = saved.read_bytes()
    for length in (1, 7, 8, 9, 20, 500, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(UserError, match="is truncated"):
            files.read(saved)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(100), "is a zip archive, and no checkpoint of torch.save"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is no network file"),
        (b"\x80\x04K\x01.", "is a pickle, but not of networks by name"),
        (b"\x80\x04cos\nsystem\n.", "asks for os.system"),
    ],
)
def test_other_files_are_told_what_they_are(tmp_path, content, complaint):
    """Each file that often lies where weights should gives one sentence with its path."""
    path = tmp_path / "weights.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        files.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_torch_save_of_either_form_is_read(tmp_path):
    """Old checkpoints of other programs begin like a pickle, new ones like a zip."""
    path = tmp_path / "checkpoint.pt"
    for is_zip in (False, True):
        torch.save({"g_ema": TENSORS}, path, _use_new_zipfile_serialization=is_zip)
        assert files.is_torch_checkpoint(path) and not files.is_pickle(path)
        assert files.read(path).record("G_ema").tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        (None, "another origin: expected the format gan-refinement-toolkit/1, found none"),
        ({"format": "pt"}, "another origin: .* found pt"),
        (
            {"format": "gan-refinement-toolkit/2"},
            "another origin: .* found gan-refinement-toolkit/2",
        ),
        ({"format": "gan-refinement-toolkit/1"}, "names no family and config"),
        ({"format": "gan-refinement-toolkit/1", "network": "[]"}, "names no family and config"),
        ({"format": "gan-refinement-toolkit/1", "network": "{"}, "names no family and config"),
    ],
)
def test_foreign_safetensors_are_refused(tmp_path, metadata, complaint):
    """A safetensors file of another program or version is never guessed at."""
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)
    with pytest.raises(UserError, match=complaint):
        files.read(path)


def test_a_missing_file_is_named(tmp_path):
    """A path without a file gives its name and the reason."""
    with pytest.raises(UserError, match="gone cannot be read: No such file"):
        files.read(tmp_path / "gone")


def test_a_full_disk_leaves_the_old_file(saved, monkeypatch):
    """Where the new file does not fit, the old one is whole and nothing else is left."""
    before = saved.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device"):
        files.save(saved, family="edm", config={}, tensors=TENSORS)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]
