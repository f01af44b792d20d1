"""pretrained.nvidia_pickle on pickles of StyleGAN2 for TensorFlow, by the names of PyTorch."""

import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import generators
from core.errors import UserError
from pretrained import networks, nvidia_pickle
from pretrained.patch_pickle import write_refined
from tiny_networks import inputs, small_stylegan2

# Writing pickles in TensorFlow's form -----------------------------------------------------------


class Network:
    """Pickles like dnnlib.tflib.network.Network: state as a dict, which sets nothing when read."""

    def __init__(self, function: str, arguments: dict, variables: dict, components: dict):
        self.state = {
            "version": 4,
            "name": function,
            "static_kwargs": arguments,
            "components": components,
            "build_module_src": "raise SystemExit('embedded source ran')",
            "build_func_name": function,
            "variables": list(variables.items()),
        }

    def __getstate__(self) -> dict:
        return self.state

    def __setstate__(self, state: dict) -> None:
        raise AssertionError("the published class must not be filled")


@pytest.fixture(autouse=True)
def published_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the published class importable while a pickle is written, under its published name."""
    module = types.ModuleType("dnnlib.tflib.network")
    module.Network = Network
    monkeypatch.setattr(Network, "__module__", module.__name__)
    for name in ("dnnlib", "dnnlib.tflib"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield


SCOPES = {"conv0": "Conv0_up", "conv1": "Conv1", "torgb": "ToRGB", "skip": "Skip"}


def tensorflow_name(key: str) -> str:
    """Return what TensorFlow calls a tensor of the state dict."""
    if key == "mapping.w_avg":
        return "dlatent_avg"
    if key.startswith("mapping."):
        return key.replace("embed", "LabelEmbed").replace("fc", "Dense").replace(".", "/")
    _, block, layer, *rest = key.split(".")
    resolution = int(block[1:])
    scope = f"synthesis/{resolution}x{resolution}"
    if layer == "const":
        return f"{scope}/Const/const"
    if rest == ["noise_const"]:
        return f"synthesis/noise{2 * int(np.log2(resolution)) - 4 - (layer == 'conv0')}"
    layer = "Conv" if (block, layer) == ("b4", "conv1") else SCOPES[layer]
    return f"{scope}/{layer}/{'_'.join(rest).replace('affine', 'mod')}"


def in_tensorflow_layout(key: str, value: np.ndarray) -> np.ndarray:
    """Return a tensor of the state dict as TensorFlow keeps it."""
    if key.endswith("affine.bias"):
        return value - 1
    if key.endswith("noise_const"):
        return value[None, None]
    if key.endswith(".const"):
        return value[None]
    if key.endswith(".weight") and value.ndim == 2:
        return value.T  # [in, out]
    if key.endswith(".weight"):
        kernel = value.transpose(2, 3, 1, 0)  # [height, width, in, out]
        return np.rot90(kernel, 2) if "conv0" in key or "skip" in key else kernel
    return np.float32(value) if value.ndim == 0 else value


SMALL = {
    "z_dim": 8,
    "w_dim": 6,
    "img_resolution": 16,
    "channel_max": 8,
    "mapping": {"num_layers": 2},
}
ARGUMENTS = {
    "latent_size": 8,
    "dlatent_size": 6,
    "resolution": 16,
    "num_channels": 3,
    "fmap_max": 8,
    "mapping_layers": 2,
    "truncation_psi": 0.5,
}


def student(**settings: object) -> torch.nn.Module:
    """Return a student none of whose tensors is zero, the averages and noise strengths included."""
    network = small_stylegan2(**SMALL | settings)
    draws = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in (*network.parameters(), network.mapping.w_avg):
            tensor.add_(torch.randn(tensor.shape, generator=draws) / 8)
    return network


def generator_of(
    network: torch.nn.Module, *, version: int = 4, extra: dict | None = None, **arguments: object
) -> Network:
    """Return a student as the TensorFlow network that has its weights."""
    variables = {"lod": np.float32(0), **(extra or {})}
    for key, tensor in network.state_dict().items():
        if not key.endswith("resample_filter"):
            new = in_tensorflow_layout(key, tensor.numpy().copy())
            variables.setdefault(tensorflow_name(key), new.copy())  # TensorFlow has no views
    parts: dict[str, dict] = {"synthesis": {}, "mapping": {}, "": {}}
    for name, value in variables.items():
        part, slash, below = name.partition("/")
        parts[part if slash else ""][below if slash else name] = value
    components = {
        part: Network(f"G_{part}", ARGUMENTS, parts[part], {}) for part in ("synthesis", "mapping")
    }
    whole = Network("G_main", ARGUMENTS | arguments, parts[""], components)
    whole.state["version"] = version
    return whole


DISCRIMINATOR = {"16x16/FromRGB/weight": np.ones((1, 1, 3, 8), np.float32)}


def write(path: Path, trained: Network, average: Network, protocol: int = 4) -> Path:
    networks = (trained, Network("D_stylegan2", {}, DISCRIMINATOR, {}), average)
    path.write_bytes(pickle.dumps(networks, protocol=protocol))
    return path


# Reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, {}),
        ({"architecture": "resnet"}, {"architecture": "resnet"}),
        ({"c_dim": 3, "conv_clamp": 256.0}, {"label_size": 3, "conv_clamp": 256}),
        ({"channel_base": 128, "channel_max": 512}, {"fmap_base": 64, "fmap_max": 512}),
    ],
)
def test_weights_come_back_as_the_student_that_has_them(tmp_path, settings, arguments):
    """Gs gives the student whose variables it holds: the same tensors, the same images."""
    trained, average = student(**settings), student(**settings)
    average.synthesis.b4.const.data.add_(1)
    nets = [generator_of(network, **arguments) for network in (trained, average)]
    path = write(tmp_path / "stylegan2.pkl", *nets)
    expected, found = average.state_dict(), nvidia_pickle.networks(path)["G_ema"].tensors
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-7, rtol=0, msg=name)
    loaded = generators.load(path)
    torch.testing.assert_close(
        loaded(*inputs(average)), average(*inputs(average)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_networks_have_the_names_of_today(tmp_path, protocol):
    """(G, D, Gs) are G, D and G_ema; the source that came along is text."""
    one = generator_of(student())
    path = write(tmp_path / "stylegan2.pkl", one, one, protocol)
    found = nvidia_pickle.networks(path)
    assert list(found) == ["G", "D", "G_ema"]
    assert [record.class_name for record in found.values()] == [
        "Generator",
        "D_stylegan2",
        "Generator",
    ]
    assert "embedded source ran" in found["G_ema"].module_source
    _, source = networks.open_file("generators", path, records=("G_ema",))
    assert (source.record, source.beside) == ("G_ema", ("G", "D"))


def test_filters_are_those_of_the_published_networks(tmp_path):
    """Where something is upsampled the given taps, elsewhere the usual ones; each with sum 1."""
    one = generator_of(student(architecture="resnet"), resample_kernel=[1, 2, 1])
    tensors = nvidia_pickle.networks(write(tmp_path / "stylegan2.pkl", one, one))["G_ema"].tensors
    given = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    for owner in ("b4", "b8", "b8.conv0", "b8.skip", "b16.conv0"):
        assert torch.equal(tensors[f"synthesis.{owner}.resample_filter"], given)
    for owner in ("b4.conv1", "b8.conv1"):
        unused = tensors[f"synthesis.{owner}.resample_filter"]
        assert unused.shape == (4, 4) and unused.sum() == 1
    assert "synthesis.b16.torgb.resample_filter" not in tensors


def test_a_generator_without_noise_has_none(tmp_path):
    """use_noise=False leaves the constants out that TensorFlow may have kept."""
    network = student(use_noise=False)
    extra = {"synthesis/noise0": np.ones((1, 1, 4, 4), np.float32)}
    one = generator_of(network, extra=extra, use_noise=False)
    loaded = generators.load(write(tmp_path / "stylegan2.pkl", one, one))
    torch.testing.assert_close(
        loaded(*inputs(network)), network(*inputs(network)), atol=1e-4, rtol=0
    )


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"version": 3}, "TensorFlow networks are of version 3, from before StyleGAN2"),
        ({"normalize_latents": False}, "has the argument 'normalize_latents', unknown here"),
        ({"extra": {"synthesis/ToRGB_lod0/weight": np.ones(1)}}, "variable 'synthesis/ToRGB_lod0"),
        ({"extra": {"mapping/LabelConcat/weight": np.ones(1)}}, "variable 'mapping/LabelConcat/"),
        ({"extra": {"synthesis/8x4/Conv1/bias": np.ones(1)}}, "variable 'synthesis/8x4/Conv1/"),
        ({"extra": {"synthesis/8x8/Conv1/bias": np.ones(9)}}, "not those of a stylegan2 network"),
        ({"extra": {"synthesis/8x8/Conv1/weight": np.ones(9)}}, "truncated or damaged"),
        ({"resolution": 32}, "not those of a stylegan2 network.*b32"),
    ],
)
def test_what_is_no_stylegan2_is_named(tmp_path, changed, complaint):
    """What has no counterpart among the PyTorch networks gives one sentence with the path."""
    one = generator_of(student(), **changed)
    path = write(tmp_path / "stylegan2.pkl", one, one)
    with pytest.raises(UserError, match=complaint) as error:
        generators.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_components_nest_once(tmp_path):
    """Components of components, which could double for ever, are refused."""
    one = generator_of(student())
    nested = Network("G_main", ARGUMENTS, {}, {"a": one})
    with pytest.raises(UserError, match="its TensorFlow network a is made of others"):
        nvidia_pickle.read(write(tmp_path / "nested.pkl", nested, nested))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (Network("LPIPS", {}, {}, {}), r"one TensorFlow network: expected three, \(G, D, Gs\)"),
        ((1, 2, 3), "not of networks by name.*found tuple"),
        ({"G_ema": 1, "a": Network("a", {}, {}, {})}, "no network G_ema"),
    ],
)
def test_other_contents_are_told_apart(tmp_path, content, complaint):
    """A single network, other tuples, and dicts of such networks are called what they are."""
    path = tmp_path / "other.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=complaint):
        generators.load(path)


@pytest.mark.parametrize("name", ["dnnlib.tflib.network\nimport_handler", "dnnlib.tflib\nNetwork"])
def test_nothing_else_of_tensorflow_is_allowed(tmp_path, name):
    """Only the class itself has a stand-in."""
    path = tmp_path / "other.pkl"
    path.write_bytes(b"\x80\x02c" + name.encode() + b"\n)R.")
    with pytest.raises(UserError, match="TensorFlow objects other than StyleGAN2's"):
        nvidia_pickle.read(path)


def test_damage_never_escapes(tmp_path):
    """A file cut anywhere, or without a part of its state, is called damaged."""
    one = generator_of(student())
    path = write(tmp_path / "stylegan2.pkl", one, one)
    content = path.read_bytes()
    for length in range(2, len(content), len(content) // 20):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="truncated or damaged"):
            nvidia_pickle.read(path)
    del one.state["variables"]
    with pytest.raises(UserError, match="truncated or damaged"):
        nvidia_pickle.read(write(path, one, one))


def test_values_are_not_written_back(tmp_path):
    """The copy of such a pickle is refused by the name of its first tensor."""
    one = generator_of(student())
    path = write(tmp_path / "stylegan2.pkl", one, one)
    weights = {"mapping.w_avg": torch.zeros(6)}
    with pytest.raises(UserError, match=r"G_ema\.mapping\.w_avg is not kept as a torch storage"):
        write_refined(path, tmp_path / "out.pkl", {"G_ema": weights})
