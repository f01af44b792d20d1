"""core/config.py: what a text means, all errors at once with their paths, YAML that reads back."""

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, model_validator

from core.config import (
    ConfigError,
    Section,
    merged,
    read_yaml,
    schema,
    to_yaml,
    validate,
    with_overrides,
)
from core.errors import UserError


class LogNormal(Section):
    """Noise levels whose logarithm is normal."""

    law: Literal["lognormal"] = "lognormal"
    mean: float
    std: float = Field(default=1.2, gt=0)


class Karras(Section):
    """Noise levels even in sigma^(1/rho)."""

    law: Literal["karras"] = "karras"
    rho: float = 7.0


class Training(Section):
    """How long, how fast."""

    batch_size: int = Field(default=64, ge=1)
    """Images of one update,
    over all ranks: a line so long that it has to be wrapped, which no reader would mind."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Images of one pass; null: the whole batch."""
    learning_rate: float = 1e-5
    shape: tuple[int, int, int] = (1, 32, 32)
    betas: tuple[float, ...] = (0.0, 0.999)
    bits: Literal[8, 16, True] = 8
    warm: bool = True

    @model_validator(mode="after")
    def _divides(self) -> "Training":
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide {self.batch_size}")
        return self


class Recipe(Section):
    """The whole recipe of a test."""

    name: str
    """What the run is called."""
    weights: Path | None = None
    training: Training = Training()
    """How long, how fast."""
    sigma: Annotated[LogNormal | Karras, Field(discriminator="law")] = Karras()
    extra_sigmas: tuple[Annotated[LogNormal | Karras, Field(discriminator="law")], ...] = ()
    scale: float | Karras = 1.0
    second: Training | None = None
    options: dict[str, float] = Field(default={})
    tags: tuple[str, ...] = ()


def _read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return validate(Recipe, read_yaml(path), source=str(path))


def _lines(**recipe: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as failure:
        validate(Recipe, {"name": "x", **recipe}, source="recipe.yaml")
    return failure.value.lines


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("1.0e-05", 1e-5), ("3", 3.0), ("-.5", -0.5), ("1e6", 1e6)]
)
def test_a_number_field_reads_every_way_to_write_a_number(
    tmp_path: Path, text: str, number: float
) -> None:
    """YAML 1.1 takes 1e-4 for text; a float field does not."""
    assert (
        _read(tmp_path, f"name: x\ntraining: {{learning_rate: {text}}}").training.learning_rate
        == number
    )


@pytest.mark.parametrize(("text", "number"), [("1e6", 10**6), ("50_000", 50_000), ("1.28e3", 1280)])
def test_a_whole_number_field_reads_exponents_and_underscores(
    tmp_path: Path, text: str, number: int
) -> None:
    """1e6 and 50_000 are whole numbers, in a plain field, an optional one and a list."""
    recipe = _read(
        tmp_path,
        f"name: x\ntraining: {{batch_size: {text}, micro_batch: {text}, shape: [{text}, 1, 1]}}",
    )
    assert (
        recipe.training.batch_size
        == recipe.training.micro_batch
        == recipe.training.shape[0]
        == number
    )
    assert type(recipe.training.batch_size) is int


@pytest.mark.parametrize("text", ["no", "on", "1e-4", "007", "12:30", "2020-01-01", "True"])
def test_a_text_field_keeps_what_was_written(tmp_path: Path, text: str) -> None:
    """A name that YAML 1.1 would turn into false, a number or a date stays that name."""
    recipe = _read(tmp_path, f"name: {text}\ntags: [{text}]")
    assert (recipe.name, recipe.tags) == (text, (text,))


def test_words_for_true_false_and_null_are_read_by_type(tmp_path: Path) -> None:
    """yes/no are booleans where one is wanted; null, ~ and nothing are null; 'null' is text."""
    assert _read(tmp_path, "name: x\ntraining: {warm: no}").training.warm is False
    assert _read(tmp_path, "name: x\ntraining: {warm: True, bits: 16}").training.bits == 16
    assert _read(tmp_path, "name: x\nweights: ~\nsecond:\ntraining:") == Recipe(name="x")
    assert _read(tmp_path, "name: 'null'").name == "null"


def test_a_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    """A mistyped recipe is met with the name of the one that exists."""
    (tmp_path / "cifar10.yaml").touch()
    with pytest.raises(UserError, match=r"no such recipe; did you mean .*cifar10.yaml\?"):
        read_yaml(tmp_path / "cifar.yaml")
    with pytest.raises(UserError, match=r"no such recipe; in .* there are: cifar10.yaml"):
        read_yaml(tmp_path / "nowhere" / "zzz.yaml")


def test_yaml_that_is_nested_too_deeply_is_said(tmp_path: Path) -> None:
    """In plain words, not those of the interpreter."""
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep\.yaml: nested too deeply for a recipe"):
        read_yaml(tmp_path / "deep.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1,\n", "line 3, column 1: not valid YAML"),
        ("a: 1\n b: 2\n", "line 2, column 3: not valid YAML: mapping values"),
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: not valid YAML: the key 'a' occurs twice"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 4: not valid YAML"),
        ("? [1]\n: 2", "a key must be a name"),
        ("- 1\n- 2", "expected lines of the form 'key: value'"),
        ("a: \x07", "not valid YAML"),
    ],
)
def test_yaml_that_cannot_be_read_says_where(tmp_path: Path, text: str, message: str) -> None:
    """Bad YAML is a sentence with line and column."""
    with pytest.raises(UserError, match=message):
        _read(tmp_path, text)


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """A weights file or a folder given as a recipe is a sentence too."""
    (tmp_path / "weights.yaml").write_bytes(b"\x80\x02\xff")
    for path in (tmp_path / "weights.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot be read as a recipe"):
            read_yaml(path)


def test_an_empty_recipe_is_an_empty_mapping(tmp_path: Path) -> None:
    """Only comments: every default."""
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "a.yaml") == {}


def test_overrides_reach_into_sections_without_touching_the_original() -> None:
    """a.b=value sets, creates sections on the way, and reads the value as YAML."""
    recipe = {"name": "x", "training": {"shape": ["1", "2", "3"]}, "second": None}
    changed = with_overrides(
        recipe,
        ["training.batch_size=1e2", "second.warm=no", "tags=[a, b]", "weights=", "name=a=b"],
    )
    result = validate(Recipe, changed, source="test")
    assert result.training == Training(batch_size=100, shape=(1, 2, 3))
    assert result.second == Training(warm=False)
    assert (result.tags, result.weights, result.name) == (("a", "b"), None, "a=b")
    assert recipe == {"name": "x", "training": {"shape": ["1", "2", "3"]}, "second": None}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("a..b=3", "expected key.path=value"),
        ("name.first=3", "name is 'x', not a section"),
        ("tags=[1", "not valid YAML"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    """An override that cannot be applied is quoted with what was expected."""
    with pytest.raises(UserError, match=message):
        with_overrides({"name": "x"}, [override])


def test_merging_lays_one_recipe_over_another() -> None:
    """Sections merge, lists and scalars are replaced, and nothing is shared with the arguments."""
    base: dict[str, object] = {"a": {"b": 1, "c": [1]}, "d": 2}
    top: dict[str, object] = {"a": {"b": 3, "e": {"f": 4}}, "d": {"g": 5}}
    result = merged(base, top)
    assert result == {"a": {"b": 3, "c": [1], "e": {"f": 4}}, "d": {"g": 5}}
    assert isinstance(result["a"], dict)
    result["a"]["c"].append(2)
    result["a"]["e"]["f"] = 0
    assert base["a"] == {"b": 1, "c": [1]} and top["a"] == {"b": 3, "e": {"f": 4}}


def test_all_errors_come_at_once_with_path_value_and_fix() -> None:
    """One line for each: wrong type, out of range, unknown key, missing key."""
    recipe = {
        "training": {
            "batch_size": "abc",
            "micro_batch": "0",
            "warn": "no",
            "shape": ["1", "x", "2"],
        },
        "trainig": {},
    }
    with pytest.raises(ConfigError) as failure:
        validate(Recipe, recipe, source="my.yaml")
    assert str(failure.value).splitlines() == [
        "my.yaml has 6 to correct:",
        "  name: missing; expected text",
        "  training.batch_size: got 'abc', expected a whole number >= 1",
        "  training.micro_batch: got '0', expected a whole number >= 1 or null",
        "  training.shape[1]: got 'x', expected a whole number",
        "  training.warn: unknown key; did you mean 'warm'?",
        "  trainig: unknown key; did you mean 'training'?",
    ]


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ({"zzz": "1"}, "zzz: unknown key; the keys here are name, weights, training, sigma, "),
        ({"training": "5"}, "training: got '5', expected a section with the keys batch_size, "),
        ({"name": None}, "name: got null, expected text"),
        ({"name": {"a": "b"}}, "name: got a section, expected text"),
        ({"training": {"warm": "maybe"}}, "training.warm: got 'maybe', expected true or false"),
        ({"training": {"bits": "9"}}, "training.bits: got '9', expected 8, 16 or True"),
        (
            {"training": {"shape": ["1", "2"]}},
            "training.shape[2]: missing; expected a whole number",
        ),
        ({"training": {"batch_size": "1.5e0"}}, "training.batch_size: got '1.5e0', expected"),
        ({"training": {"betas": "x"}}, "training.betas: got 'x', expected a list, each a number"),
        ({"training": {"learning_rate": "nan"}}, "training.learning_rate: got 'nan', expected a"),
        (
            {"second": {"batchsize": "1"}},
            "second.batchsize: unknown key; did you mean 'batch_size'",
        ),
        (
            {"sigma": {"law": "karas"}},
            "sigma.law: got 'karas', expected 'lognormal' or 'karras'; did",
        ),
        ({"sigma": {"mean": "1"}}, "sigma.law: missing; expected 'lognormal' or 'karras'"),
        ({"sigma": "3"}, "sigma: got '3', expected a section whose law is 'lognormal' or 'karras'"),
        ({"sigma": {"law": "lognormal"}}, "sigma.mean: missing; expected a number"),
        (
            {"sigma": {"law": "lognormal", "mean": "0", "std": "-1"}},
            "sigma.std: got '-1', expected a number > 0",
        ),
        ({"sigma": {"law": "karras", "roh": "1"}}, "sigma.roh: unknown key; did you mean 'rho'?"),
        (
            {"extra_sigmas": [{"law": "karras"}, {"law": "karras", "rho": "x"}]},
            "extra_sigmas[1].rho: got 'x', expected a number",
        ),
        ({"scale": {"rho": "x"}}, "scale.rho: got 'x', expected a number"),
        ({"scale": "x"}, "scale: got 'x', expected a number or a section with the keys law, rho"),
        ({"options": {"eps": "x"}}, "options.eps: got 'x', expected a number"),
        (
            {"training": {"batch_size": "8", "micro_batch": "3"}},
            "training: micro_batch 3 does not divide 8",
        ),
    ],
)
def test_each_error_is_told_in_the_words_of_the_recipe(recipe: dict, line: str) -> None:
    """Paths are the user's, through optional sections, unions and lists; choices are named."""
    (told,) = _lines(**recipe)
    assert told.startswith(line)


FULL = Recipe(
    name="no",
    weights=Path("a b/c: #d.pkl"),
    training=Training(batch_size=7, learning_rate=1e-7, bits=16, warm=False),
    sigma=LogNormal(mean=-1.2),
    extra_sigmas=(Karras(rho=5), LogNormal(mean=0)),
    scale=Karras(),
    second=Training(micro_batch=8),
    options={"eps": 1e-8, "a.b": 2.0},
    tags=(
        "null",
        "",
        "1",
        "~",
        "- x",
        "ä\n\t\x07 😀",
        "'\"\\",
        "...",
        "---",
        "<<",
        "!x",
        "&a",
        "x:",
    ),
)


@pytest.mark.parametrize("instance", [FULL, Recipe(name="x")], ids=["full", "defaults"])
def test_written_yaml_reads_back_to_an_equal_instance(tmp_path: Path, instance: Recipe) -> None:
    """Writing and reading is the identity, on awkward texts too."""
    assert _read(tmp_path, to_yaml(instance)) == instance


def test_written_yaml_means_the_same_to_any_yaml_1_1_reader() -> None:
    """Other tools that read a run's recipe see the same numbers, texts and nulls."""
    assert yaml.safe_load(to_yaml(FULL)) == json.loads(FULL.model_dump_json())


def test_written_yaml_explains_each_key() -> None:
    """A field's docstring stands above it as a comment, in at most 100 columns."""
    lines = to_yaml(Recipe(name="x")).splitlines()
    assert lines[:2] == ["# What the run is called.", "name: x"]
    assert (
        lines[lines.index("  # Images of one pass; null: the whole batch.") + 1]
        == "  micro_batch: null"
    )
    assert max(map(len, lines)) <= 100


def test_the_schema_describes_every_documented_field_and_closes_sections() -> None:
    """Editors see the docstrings and refuse unknown keys; the schema is plain JSON."""
    described = json.loads(json.dumps(schema(Recipe)))
    assert described["description"] == "The whole recipe of a test."
    assert described["properties"]["name"]["description"] == "What the run is called."
    training = described["$defs"]["Training"]
    assert training["properties"]["batch_size"]["minimum"] == 1
    assert described["additionalProperties"] is training["additionalProperties"] is False
