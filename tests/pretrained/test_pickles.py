"""pretrained.nvidia_pickle: published networks are read as data; all else is refused by name."""

import collections
import copyreg
import io
import os
import pickle
import struct
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

from core.errors import UserError
from pickle_files import (
    Layer,
    Loss,
    Persistent,
    Reduced,
    _reconstruct_persistent_obj,
    dump,
    generator,
)
from pretrained import nvidia_pickle


@pytest.fixture
def write(tmp_path):
    """Give a function that writes bytes and returns their path."""

    def written(content: bytes):
        path = tmp_path / "network.pkl"
        path.write_bytes(content)
        return path

    return written


# Published networks -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_the_state_dict(write, protocol):
    """Names, their order, values and dtypes are those of state_dict(), in every binary protocol."""
    network = generator()
    record = nvidia_pickle.networks(write(dump({"G_ema": network}, protocol)))["G_ema"]
    expected = network.state_dict()
    assert list(record.tensors) == list(expected)
    for name, tensor in record.tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_tensors_are_contiguous_and_carry_no_graph(write):
    """Transposed, channels-last and sliced tensors come back contiguous, sharing no storage."""
    record = nvidia_pickle.networks(write(dump({"G_ema": generator()})))["G_ema"]
    for tensor in record.tensors.values():
        assert tensor.is_contiguous() and not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_constructor_arguments_are_plain_data(write):
    """Positional and named constructor arguments are kept, EasyDict as dict."""
    record = nvidia_pickle.networks(write(dump({"G_ema": generator()})))["G_ema"]
    assert (record.class_name, record.positional) == ("Generator", (8,))
    assert record.arguments == {"c_dim": 3, "mapping_kwargs": {"num_layers": 2}}
    assert type(record.arguments["mapping_kwargs"]) is dict


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_attributes_are_plain_numbers(write, protocol):
    """NumPy scalars become Python numbers, NumPy arrays keep values and dtype."""
    attributes = nvidia_pickle.networks(write(dump({"ema": Layer(4)}, protocol)))["ema"].attributes
    assert type(attributes["weight_gain"]) is float and attributes["weight_gain"] == 0.5
    assert attributes["size"].tolist() == [16, 16] and attributes["size"].dtype == np.int64


def test_both_numpy_names_are_read(write):
    """NumPy 1 wrote numpy.core, NumPy 2 writes numpy._core: both give the same."""
    new = dump({"ema": Layer(4)}, protocol=3)
    assert b"cnumpy._core.multiarray\n" in new
    old = new.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    attributes = nvidia_pickle.networks(write(old))["ema"].attributes
    assert attributes["weight_gain"] == 0.5 and attributes["size"].tolist() == [16, 16]


def test_read_gives_everything_and_networks_only_networks(write):
    """Losses are records without tensors; options are plain; networks() leaves both out."""
    content = {"loss_fn": Loss(), "dataset_kwargs": {"path": "x"}, "ema": generator()}
    path = write(dump(content))
    top = nvidia_pickle.read(path).top
    assert top["loss_fn"].attributes == {"P_mean": -1.2}
    assert top["dataset_kwargs"] == {"path": "x"}
    assert list(nvidia_pickle.networks(path)) == ["ema"]


def test_embedded_source_never_runs(write, tmp_path, monkeypatch):
    """Source that would leave a trace leaves none when read, and the record holds it as text."""
    trace = tmp_path / "trace"
    source = f"open({str(trace)!r}, 'w').close()\nclass Generator: pass\n"
    monkeypatch.setattr(Persistent, "source", source)
    record = nvidia_pickle.networks(write(dump({"G_ema": generator()})))["G_ema"]
    assert record.module_source == source and not trace.exists()
    exec(record.module_source, {})
    assert trace.exists(), "the trap itself must work"


# Hostile pickles --------------------------------------------------------------------------------


def calling(function, *args: object) -> bytes:
    return dump({"G_ema": Reduced(function, args)})


def naming(module: str, name: str, *args: str) -> bytes:
    """Return a pickle that calls a global by name, which need not exist here."""
    pushed = [b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name, *args)]
    return b"\x80\x04" + pushed[0] + pushed[1] + b"\x93(" + b"".join(pushed[2:]) + b"tR."


def storing(content: bytes) -> bytes:
    """Return a pickle that has these bytes read as a storage."""
    return calling(torch.storage._load_from_bytes, content)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def persistent(**changes: object) -> bytes:
    good = {"type": "class", "version": 6, "module_src": "", "class_name": "A", "state": {}}
    return calling(_reconstruct_persistent_obj, good | changes)


def with_state(function, args: tuple, state: object) -> bytes:
    return dump({"G_ema": Reduced(function, args, state)})


def hostile(trace: str) -> dict[str, tuple[bytes, str]]:
    """Return hostile pickles, each with what its refusal must name. Some leave a trace if run."""
    shell, python = f"touch {trace}", f"open({trace!r}, 'w')"
    state = {"__setstate__": 1}
    return {
        "os": (naming("os", "system", shell), "os.system"),
        "posix": (calling(os.system, shell), "posix.system"),
        "eval": (calling(eval, python), "builtins.eval"),
        "exec": (calling(exec, python), "builtins.exec"),
        "getattr": (calling(getattr, Reduced(__import__, ("os",)), "system"), "builtins.getattr"),
        "import": (naming("builtins", "__import__", "os"), "builtins.__import__"),
        "subprocess": (naming("subprocess", "Popen", shell), "subprocess.Popen"),
        "runpy": (naming("runpy", "run_path", trace), "runpy.run_path"),
        "torch.load": (naming("torch", "load", trace), "torch.load"),
        "torch.hub": (naming("torch.hub", "load", trace), "torch.hub.load"),
        "numpy.load": (naming("numpy", "load", trace), "numpy.load"),
        "numpy inner": (naming("numpy.core.multiarray", "fromfile", trace), "multiarray.fromfile"),
        "TensorFlow": (naming("dnnlib.tflib.network", "Network"), "TensorFlow"),
        "dotted": (naming("torch", "serialization.os.system", shell), "serialization.os.system"),
        "dotted twin": (naming("torch", "storage._load_from_bytes"), "storage._load_from_bytes"),
        "beside an allowed one": (naming("torch._utils", "sys.exit"), "torch._utils.sys.exit"),
        "INST": (b"(S'" + shell.encode() + b"'\nios\nsystem\n.", "os.system"),
        "OBJ": (b"(cos\nsystem\nS'" + shell.encode() + b"'\no.", "os.system"),
        "NEWOBJ_EX": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
        "extension": (b"\x80\x02\x82\xf0.", "extension code 240"),
        "persistent id": (b"\x80\x02X\x03\0\0\0abcQ.", "persistent id 'abc'"),
        "copyreg": (calling(copyreg._reconstructor, dict, dict, {}), "copyreg._reconstructor"),
        "control characters": (naming("os", "sys\x1b\n"), "os.sys??"),
        "registry": (naming("copyreg", "add_extension"), "copyreg.add_extension"),
        "state, global": (b"\x80\x02ccollections\nOrderedDict\n}b.", "collections.OrderedDict"),
        "state, dict": (with_state(collections.OrderedDict, (), state), "a new state for a dict"),
        "state, set": (with_state(set, ([1],), state), "a new state for a set"),
        "call of a result": (b"\x80\x02ctorch\nSize\n)\x81)R.", "a call of a tuple"),
        "call of a dtype": (b"\x80\x02ctorch\nfloat32\n)R.", "a call of a dtype"),
        "object array": (dump({"G_ema": np.array([os], dtype=object)[:0]}), "numpy.dtype 'O8'"),
        "raw in a storage": (storing(dump(Reduced(os.system, (shell,)), 2)), "posix.system"),
        "saved in a storage": (storing(saved(Reduced(eval, (python,)))), "eval inside a storage"),
        "dict in a storage": (storing(saved({"a": 1})), "a dict inside a storage"),
        "zip in a storage": (storing(b"PK\x03\x04"), "a zip archive inside a storage"),
        "meta type": (persistent(type="module"), "type 'module'"),
        "meta version": (persistent(version=7), "version 7"),
        "meta name": (persistent(class_name=["os", "system"]), "_reconstruct_persistent_obj"),
    }


@pytest.mark.parametrize("name", hostile("trace"))
def test_hostile_pickles_are_refused_by_name(write, tmp_path, name):
    """Each usual kind of attack gives one sentence with file and offender, and does nothing."""
    trace = tmp_path / "trace"
    content, offender = hostile(str(trace))[name]
    path = write(content)
    with pytest.raises(UserError) as refusal:
        nvidia_pickle.read(path)
    assert str(path) in str(refusal.value) and offender in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["os", "posix", "eval", "exec", "INST", "OBJ"])
def test_hostile_pickles_would_leave_their_trace(tmp_path, name):
    """Python's own reader falls for them: the traps of the test above are real."""
    trace = tmp_path / "trace"
    pickle.loads(hostile(str(trace))[name][0])
    assert trace.exists()


def test_registered_extensions_are_refused(write, monkeypatch):
    """An extension code that this process knows, and even has in its cache, gives nothing."""
    monkeypatch.setitem(copyreg._inverted_registry, 240, ("os", "system"))
    monkeypatch.setitem(copyreg._extension_cache, 240, os.system)
    with pytest.raises(UserError, match="extension code 240"):
        nvidia_pickle.read(write(b"\x80\x02\x82\xf0."))


def test_stand_ins_keep_nothing_between_files(write):
    """A state set on the class of a published container does not reach the next file."""
    poisoned = b"\x80\x02ctorch.nn.modules.container\nModuleDict\n}X\1\0\0\0aK\1sb."
    with pytest.raises(UserError, match="ModuleDict"):
        nvidia_pickle.read(write(poisoned))
    assert nvidia_pickle.networks(write(dump({"G_ema": generator()})))["G_ema"].tensors


# Damage and bombs -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1])
def test_truncated_files_are_named_as_such(write, part):
    """A file that ends early, wherever it does, is called truncated; the last byte counts."""
    content = dump({"G_ema": generator()})
    path = write(content[: min(int(part * len(content)), len(content) - 1)])
    with pytest.raises(UserError, match="truncated or damaged"):
        nvidia_pickle.read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_damage_never_escapes(write):
    """Files with overwritten bytes either read or give a UserError, never another exception."""
    content = dump({"G_ema": generator()})
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), 4):
            damaged[position] = random.integers(256)
        with suppress(UserError):
            nvidia_pickle.networks(write(bytes(damaged)))


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x8d", b"\x96", b"\x95"])
def test_claimed_lengths_allocate_nothing(write, opcode):
    """A few bytes that claim to be an exabyte are called damaged, not allocated."""
    with pytest.raises(UserError, match="truncated or damaged"):
        nvidia_pickle.read(write(b"\x80\x04" + opcode + struct.pack("<Q", 1 << 60) + b"abc."))


@pytest.mark.parametrize(
    ("size", "stride", "complaint"),
    [((1 << 40,), (0,), "larger than its storage"), ((2, 3), (4, 1), "damaged")],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_stay_inside_their_storage(write, size, stride, complaint):
    """A tensor that repeats its storage endlessly or reaches beyond it is refused."""
    storage = torch.zeros(6).storage()
    content = calling(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, {})
    with pytest.raises(UserError, match=complaint):
        nvidia_pickle.read(write(content))


def test_modules_nested_to_explode_are_refused(write):
    """Sixty levels of twice the same child would have 2^60 tensors; the limit stops them."""
    module: nn.Module = Layer(2)
    for _ in range(60):
        parent = nn.Module.__new__(nn.Sequential)
        parent.__dict__ = {
            "_parameters": {},
            "_buffers": {},
            "_modules": {"a": module, "b": module},
        }
        module = parent
    with pytest.raises(UserError, match="more tensor names"):
        nvidia_pickle.read(write(dump({"G_ema": module})))


@pytest.mark.parametrize(
    ("content", "found"), [([1], "list"), (7, "int"), ({1: 2}, "dict"), (Loss(), "NetworkRecord")]
)
def test_other_pickles_are_told_apart(write, content, found):
    """A harmless pickle of something else is called that, with what it holds."""
    with pytest.raises(UserError, match=f"not of networks by name.*found {found}"):
        nvidia_pickle.read(write(dump(content)))


def test_missing_files_are_named(tmp_path):
    """A path without a file gives its name and the reason."""
    with pytest.raises(UserError, match=r"gone\.pkl cannot be read: No such file"):
        nvidia_pickle.read(tmp_path / "gone.pkl")
