"""pretrained.patch_pickle: only the values of the tensors change in a copied pickle."""

import errno
import io
import itertools
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import generators
import generators.__main__ as command
import pickle_files
from cli_runs import call, tiny_recipe
from core.errors import UserError
from pickle_files import Layer, Persistent, Reduced, dump, generator, published_modules
from pretrained import networks, nvidia_pickle
from pretrained.patch_pickle import write_refined
from tiny_networks import SMALL_ADA, Generator, inputs, small_stylegan2
from tiny_networks import write as pickled

Write = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Give a function that pickles networks in the published form and returns the path."""

    def written(content: object, protocol: int = 4) -> Path:
        path = tmp_path / "original.pkl"
        path.write_bytes(dump(content, protocol))
        return path

    return written


def state(path: Path, record: str = "G_ema") -> dict[str, Tensor]:
    return nvidia_pickle.networks(path)[record].tensors


def shifted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return other values for each tensor, all of them different from element to element."""
    return {
        name: (tensor.float() + 1 + torch.arange(tensor.numel()).reshape(tensor.shape) / 4)
        .round(decimals=0 if tensor.dtype == torch.int64 else 2)
        .to(tensor.dtype)
        for name, tensor in tensors.items()
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def opened_by_its_tool(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Return what Python's own unpickler makes of a file, each network as its __dict__."""
    monkeypatch.setattr(
        pickle_files, "_reconstruct_persistent_obj", lambda meta: meta["state"] | {"meta": meta}
    )
    with published_modules():
        return pickle.loads(path.read_bytes())


# Written back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("wide", [False, True])
def test_untouched_write_back_is_the_same_file(write, tmp_path, protocol, wide):
    """Writing a network's own tensors gives its bytes, small and in frames or large and outside."""
    network = generator()
    network.wide = nn.Parameter(torch.randn(20_000 if wide else 3))
    path = write({"G": None, "G_ema": network, "augment_pipe": None}, protocol)
    write_refined(path, tmp_path / "out.pkl", {"G_ema": state(path)})
    assert (tmp_path / "out.pkl").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_tensor_can_change(write, tmp_path, protocol):
    """All new values come back, whatever dtype, layout or part of a storage the tensors are."""
    network = generator()
    network.wide = nn.Parameter(torch.randn(20_000))
    path, out = write({"G_ema": network, "D": Layer(3)}, protocol), tmp_path / "out.pkl"
    new = shifted(state(path))
    write_refined(path, out, {"G_ema": new})
    assert_equal(state(out), new)
    assert_equal(state(out, "D"), state(path, "D"))


def test_a_changed_file_differs_only_in_the_values(write, tmp_path):
    """One changed tensor changes that many bytes at most, side by side, and no length."""
    path, out = write({"G_ema": generator(), "D": Layer(2)}), tmp_path / "out.pkl"
    new = state(path)["blocks.b4.weight"].add(1)
    write_refined(path, out, {"G_ema": {"blocks.b4.weight": new}})
    before, after = path.read_bytes(), out.read_bytes()
    assert len(before) == len(after)
    changed = [at for at, pair in enumerate(zip(before, after, strict=True)) if len({*pair}) > 1]
    assert 0 < len(changed) <= new.nbytes and changed[-1] - changed[0] < new.nbytes


def test_the_tools_of_the_original_open_the_copy(write, tmp_path, monkeypatch):
    """Python's own unpickler finds the new values in tensors of the old layout and kind."""
    path, out = write({"G_ema": generator()}), tmp_path / "out.pkl"
    new = shifted(state(path))
    write_refined(path, out, {"G_ema": new})
    opened = opened_by_its_tool(out, monkeypatch)["G_ema"]
    layer = opened["_modules"]["blocks"].b4
    assert torch.equal(layer["_parameters"]["weight"], new["blocks.b4.weight"])
    assert layer["_parameters"]["weight"].is_contiguous(memory_format=torch.channels_last)
    assert isinstance(layer["_parameters"]["weight"], nn.Parameter)
    assert layer["_buffers"]["filter"].stride() == (1, 4)
    assert torch.equal(layer["_buffers"]["filter"], new["blocks.b4.filter"])
    assert opened["_parameters"]["scale"].storage_offset() == 2
    assert opened["meta"]["module_src"] == Persistent.source


def test_values_keep_the_dtype_of_the_file(write, tmp_path):
    """float32 weights go into a float16 network as float16; those that do not fit are refused."""
    path, out = write({"G_ema": generator()}), tmp_path / "out.pkl"
    key = "blocks.b4.filter"
    write_refined(path, out, {"G_ema": {key: torch.full((4, 4), 1 / 3)}})
    assert torch.equal(state(out)[key], torch.full((4, 4), 1 / 3).half())
    with pytest.raises(
        UserError, match=r"blocks\.b4\.filter is torch\.float16 there, which cannot"
    ):
        write_refined(path, out, {"G_ema": {key: torch.full((4, 4), 1e6)}})
    with pytest.raises(UserError, match=r"steps is torch\.int64 there, which cannot"):
        write_refined(path, out, {"G_ema": {"steps": torch.tensor([0.5, 1])}})
    write_refined(path, out, {"G_ema": {"steps": torch.tensor([5.0, 7.0])}})
    assert state(out)["steps"].tolist() == [5, 7]


def test_not_a_number_goes_back_bit_for_bit(write, tmp_path):
    """Equality is of bits: a network that holds NaN and -0 is written back as it was."""
    network = generator()
    network.odd = nn.Parameter(torch.tensor([float("nan"), -0.0, float("inf")]))
    path, out = write({"G_ema": network}), tmp_path / "out.pkl"
    write_refined(path, out, {"G_ema": state(path)})
    assert out.read_bytes() == path.read_bytes()


# Shared values ----------------------------------------------------------------------------------


def test_one_network_under_two_names(write, tmp_path):
    """Where G is G_ema itself, both carry the same new weights or the copy is refused by name."""
    network = generator()
    path, out = write({"G": network, "G_ema": network}), tmp_path / "out.pkl"
    new = shifted(state(path))
    write_refined(path, out, {"G": new, "G_ema": new})
    assert_equal(state(out), new)
    assert_equal(state(out, "G"), new)
    with pytest.raises(UserError, match=r"G_ema\.w_avg and G\.w_avg share values"):
        write_refined(path, out, {"G_ema": {"w_avg": torch.ones([])}})
    with pytest.raises(UserError, match=r"G\.w_avg and G_ema\.w_avg share values"):
        write_refined(path, out, {"G": state(path), "G_ema": {"w_avg": torch.ones([])}})


class Viewer(Persistent):
    """A network whose buffers are parts of storages that are pickled once."""

    def __init__(self, **parts):
        super().__init__()
        self.parts = parts

    def __reduce__(self):
        function, (meta,) = super().__reduce__()
        buffers = {
            name: Reduced(
                torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {})
            )
            for name, (storage, offset, size, stride) in self.parts.items()
        }
        meta["state"] = {"_buffers": buffers}
        return function, (meta,)


def flat_storage(count: int) -> object:
    return torch.arange(float(count)).storage()


def test_views_of_one_storage_change_together(write, tmp_path):
    """Two overlapping views take values that agree; one that would change the other is refused."""
    shared = flat_storage(6)
    views = Viewer(a=(shared, 0, (2, 2), (2, 1)), b=(shared, 2, (4,), (1,)))
    path, out = write({"G_ema": views}), tmp_path / "out.pkl"
    new = {"a": torch.tensor([[9.0, 8], [7, 6]]), "b": torch.tensor([7.0, 6, 5, 4])}
    write_refined(path, out, {"G_ema": new})
    assert_equal(state(out), new)
    for odd in ({"a": new["a"]}, new | {"b": new["b"] + 1}):
        with pytest.raises(UserError, match=r"G_ema\.(a and G_ema\.b|b and G_ema\.a) share values"):
            write_refined(path, out, {"G_ema": odd})
    write_refined(path, out, {"G_ema": {"a": torch.tensor([[9.0, 8], [2, 3]])}})
    assert state(out)["b"].tolist() == [2, 3, 4, 5]


def reads_of(storage: object, *, tail: bytes = b"") -> Iterator[Reduced]:
    """Yield calls that read the same torch.save, each of its own; more bytes may follow it."""
    buffer = io.BytesIO()
    torch.save(storage, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue() + tail
    while True:
        yield Reduced(torch.storage._load_from_bytes, (content,))


@pytest.mark.parametrize("kind", ["storage", "bytes"])
def test_what_another_network_shares_is_refused(write, tmp_path, kind):
    """D keeps its values: where G would change them with its own, nothing is written."""
    one = other = flat_storage(4)
    if kind == "bytes":
        one, other = itertools.islice(reads_of(one), 2)
    both = {name: Viewer(a=(s, 0, (4,), (1,))) for name, s in (("G", one), ("D", other))}
    path, out = write(both), tmp_path / "out.pkl"
    with pytest.raises(UserError, match=r"D\.a and G\.a share values there"):
        write_refined(path, out, {"G": {"a": torch.ones(4)}})
    assert not out.exists()
    write_refined(path, out, {"G": {"a": torch.ones(4)}, "D": {"a": torch.ones(4)}})
    assert state(out, "D")["a"].tolist() == [1] * 4


def test_tensors_outside_of_networks_keep_their_values(write, tmp_path):
    """A tensor that no state dict holds, but shares a storage with one, is not changed with it."""
    shared = flat_storage(4)
    aside = Reduced(torch._utils._rebuild_tensor_v2, (shared, 0, (4,), (1,), False, {}))
    path = write({"aside": aside, "G_ema": Viewer(a=(shared, 1, (2,), (1,)))})
    with pytest.raises(UserError, match=r"a tensor that is in no network and G_ema\.a share"):
        write_refined(path, tmp_path / "out.pkl", {"G_ema": {"a": torch.zeros(2)}})


def test_repeated_elements(write, tmp_path):
    """An expanded tensor takes one value for all that are one element, and no others."""
    path = write({"G_ema": Viewer(a=(flat_storage(4), 1, (2, 2), (1, 0)))})
    out = tmp_path / "out.pkl"
    new = {"a": torch.tensor([[5.0, 5], [6, 6]])}
    write_refined(path, out, {"G_ema": new})
    assert_equal(state(out), new)
    with pytest.raises(UserError, match=r"G_ema\.a and itself share values"):
        write_refined(path, out, {"G_ema": {"a": torch.tensor([[5.0, 6], [6, 6]])}})


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"G": {}}, r"has no network G\. The networks in it: G_ema\."),
        ({"G_ema": {"b16": torch.zeros(1)}}, r"has no tensor G_ema\.b16: .*another network"),
        ({"G_ema": {"w_avg": torch.zeros(2)}}, r"G_ema\.w_avg is \[\] there, got \[2\]"),
    ],
)
def test_weights_of_another_network_are_named(write, tmp_path, weights, complaint):
    """What does not fit the file gives one sentence with its path, and no file."""
    path, out = write({"G_ema": generator()}), tmp_path / "out.pkl"
    with pytest.raises(UserError, match=complaint) as error:
        write_refined(path, out, weights)
    assert str(path) in str(error.value) and not out.exists()


def test_the_original_is_not_overwritten(write, tmp_path):
    """The original under any of its names is no place for the copy."""
    path = write({"G_ema": generator()})
    before = path.read_bytes()
    alias = tmp_path / "alias.pkl"
    alias.symlink_to(path)
    for out in (path, alias):
        with pytest.raises(UserError, match="is the original itself"):
            write_refined(path, out, {"G_ema": shifted(state(path))})
    assert path.read_bytes() == before


def test_values_that_do_not_stand_in_the_file_are_refused(write, tmp_path):
    """Protocol 2 keeps bytes as text: reading works, writing says why not."""
    path = write({"G_ema": generator()}, protocol=2)
    with pytest.raises(UserError, match=r"values of G_ema\.\S+ do not stand there .*protocol 2"):
        write_refined(path, tmp_path / "out.pkl", {"G_ema": shifted(state(path))})


def test_values_that_are_not_last_are_refused(write, tmp_path):
    """Bytes after a storage's values, which torch ignores, would be taken for values."""
    (storage,) = itertools.islice(reads_of(flat_storage(4), tail=b"1234"), 1)
    path = write({"G_ema": Viewer(a=(storage, 0, (4,), (1,)))})
    assert state(path)["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"values of G_ema\.a do not stand there"):
        write_refined(path, tmp_path / "out.pkl", {"G_ema": {"a": torch.ones(4)}})


def test_a_copy_that_reads_otherwise_does_not_appear(write, tmp_path, monkeypatch):
    """The copy is read again: where D came out other than it went in, there is no copy."""
    path, out = write({"G_ema": generator(), "D": Layer(2)}), tmp_path / "out.pkl"
    content = bytearray(path.read_bytes())
    at = content.index(
        state(path, "D")["weight"].permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    )
    content[at] ^= 1
    monkeypatch.setattr(shutil, "copyfile", lambda _, to: Path(to).write_bytes(content))
    with pytest.raises(AssertionError):
        write_refined(path, out, {"G_ema": shifted(state(path))})
    assert sorted(os.listdir(tmp_path)) == ["original.pkl"]


def test_hostile_originals_are_refused(tmp_path):
    """What is not read is not copied either."""
    path = tmp_path / "hostile.pkl"
    path.write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UserError, match=r"asks for os\.system"):
        write_refined(path, tmp_path / "out.pkl", {})
    assert sorted(os.listdir(tmp_path)) == ["hostile.pkl"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_damage_never_escapes(write, tmp_path):
    """A damaged original is copied with the new value or gives a UserError, and then no file."""
    path, out = write({"G_ema": generator()}), tmp_path / "out.pkl"
    content, random = path.read_bytes(), np.random.default_rng(0)
    copied = 0
    for _ in range(100):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), 2):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        try:
            write_refined(path, out, {"G_ema": {"scale": torch.ones(5)}})
        except UserError:
            assert not out.exists()
        else:
            assert state(out)["scale"].tolist() == [1] * 5
            out.unlink()
            copied += 1
    assert 0 < copied < 100


def test_a_full_disk_leaves_the_old_file(write, tmp_path, monkeypatch):
    """Where the copy does not fit, an earlier one is whole and nothing else is left."""
    path, out = write({"G_ema": generator()}), tmp_path / "out.pkl"
    out.write_bytes(b"earlier")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_refined(path, out, {"G_ema": state(path)})
    assert out.read_bytes() == b"earlier"
    assert sorted(os.listdir(tmp_path)) == ["original.pkl", "out.pkl"]


def test_state_is_ordered_as_before(write, tmp_path):
    """An OrderedDict of new tensors, as state_dict() gives, needs no order of its own."""
    path, out = write({"G_ema": generator()}), tmp_path / "out.pkl"
    new = shifted(state(path))
    write_refined(path, out, {"G_ema": OrderedDict(reversed(new.items()))})
    assert_equal(state(out), new)


# A student's own pickle -------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """Give a published network-snapshot of a student."""
    content = {
        "G": Generator(small_stylegan2(c_dim=3).state_dict(), **SMALL_ADA),
        "D": Layer(2),
        "G_ema": Generator(small_stylegan2(c_dim=3).state_dict(), **SMALL_ADA),
        "augment_pipe": None,
        "training_set_kwargs": {"path": "x.zip"},
    }
    return pickled(tmp_path / "network-snapshot.pkl", **content)


def test_loading_says_what_was_taken_and_what_else_is_there(snapshot, tmp_path, caplog):
    """The log names the file, the record, its family and all that was left; ours names itself."""
    network, source = networks.open_file("generators", snapshot, records=("G_ema", "G"))
    assert (source.record, source.family) == ("G_ema", "stylegan2")
    assert source.beside == ("G", "D", "training_set_kwargs")
    caplog.set_level("INFO")
    generators.load(snapshot)
    networks.save(tmp_path / "ours", network)
    generators.load(tmp_path / "ours")
    assert [record.getMessage() for record in caplog.records] == [
        f"{snapshot}: its G_ema, stylegan2 network; also in it: G, D, training_set_kwargs",
        f"{tmp_path / 'ours'}: stylegan2 network in our format",
    ]


def test_a_refined_student_goes_back_into_its_pickle(snapshot, tmp_path):
    """G_ema and G of the copy make the refined student's images; D is as it was."""
    student, out = generators.load(snapshot), tmp_path / "refined.pkl"
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
        student.mapping.w_avg.add_(1)
    expected = student(*inputs(student))
    student = student.to(memory_format=torch.channels_last)
    assert networks.save_refined(snapshot, out, student, records=("G_ema", "G")) == ("G_ema", "G")
    for name in ("G_ema", "G"):
        loaded, _ = networks.open_file("generators", out, records=(name,))
        assert torch.equal(loaded(*inputs(student)), expected)
        assert torch.equal(loaded.mapping.w_avg, student.mapping.w_avg)
    assert_equal(state(out, "D"), state(snapshot, "D"))


def test_g_keeps_its_weights_where_that_is_asked(snapshot, tmp_path):
    """Whoever resumes the GAN's own training needs the G that its D knows."""
    student, out = generators.load(snapshot), tmp_path / "refined.pkl"
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    assert generators.save_refined(snapshot, out, student, g_ema_only=True) == ("G_ema",)
    assert_equal(state(out, "G"), state(snapshot, "G"))
    assert not torch.equal(
        state(out, "G_ema")["synthesis.b4.const"], state(snapshot, "G_ema")["synthesis.b4.const"]
    )


def test_a_student_that_did_not_learn_gives_the_same_file(snapshot, tmp_path):
    """Loading and writing back changes no byte."""
    out = tmp_path / "same.pkl"
    networks.save_refined(snapshot, out, generators.load(snapshot), records=("G_ema",))
    assert out.read_bytes() == snapshot.read_bytes()


def test_students_go_back_only_where_they_fit(snapshot, tmp_path):
    """Another network, our own format, a file without a generator: each named, and no copy made."""
    student, out = generators.load(snapshot), tmp_path / "refined.pkl"
    larger = small_stylegan2(c_dim=3, img_resolution=32)
    networks.save(tmp_path / "ours", student)
    with pytest.raises(UserError, match=r"has no tensor G_ema\.synthesis\.b32"):
        networks.save_refined(snapshot, out, larger, records=("G_ema",))
    with pytest.raises(UserError, match=r"its G_ema has .*, which the refined network has not"):
        networks.save_refined(snapshot, out, student.synthesis, records=("G_ema",))
    with pytest.raises(UserError, match=r"no network ema\. The networks in it: G, D, G_ema"):
        networks.save_refined(snapshot, out, student, records=("ema",))
    with pytest.raises(UserError, match="is in our own format"):
        networks.save_refined(tmp_path / "ours", out, student, records=("G_ema",))
    assert not out.exists()


def test_a_run_on_a_pickle_ends_with_that_pickle_refined(snapshot, tmp_path):
    """RUN/refined.pkl holds the weights of RUN/student.safetensors; the original is as it was."""
    original = snapshot.read_bytes()
    shape = list(generators.load(snapshot).image_shape)
    outcome = call(
        *("--gan", tiny_recipe(tmp_path), "--outdir", tmp_path / "runs"),
        f"student={{weights: {snapshot}}}",
        f"teacher.config={{image_shape: {shape}, components: 3, num_classes: 3}}",
    )
    assert outcome.code == 0, outcome.stderr
    run = tmp_path / "runs" / "00000-tiny"
    refined, ours = (
        generators.load(run / "refined.pkl"),
        generators.load(run / "student.safetensors"),
    )
    assert torch.equal(refined(*inputs(refined)), ours(*inputs(ours)))
    assert not torch.equal(ours(*inputs(ours)), generators.load(snapshot)(*inputs(ours)))
    assert snapshot.read_bytes() == original
    assert "refined.pkl: G_ema and G refined" in outcome.stderr


def test_the_command_takes_weights_back_into_a_pickle(snapshot, tmp_path):
    """`python -m generators refined` says what it wrote, and refuses what is no pickle."""
    student, ours, out = generators.load(snapshot), tmp_path / "ours", tmp_path / "out.pkl"
    with torch.no_grad():
        student.mapping.w_avg.add_(1)
    networks.save(ours, student)
    run = partial(CliRunner().invoke, command.main)
    assert "G_ema and G refined" in run(["refined", str(snapshot), str(ours), str(out)]).output
    assert torch.equal(generators.load(out).mapping.w_avg, student.mapping.w_avg)
    refused = run(["refined", str(ours), str(ours), str(tmp_path / "none.pkl")]).exception
    assert isinstance(refused, UserError) and "only a published pickle" in str(refused)
    assert not (tmp_path / "none.pkl").exists()
