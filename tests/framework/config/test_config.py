import dataclasses
import inspect
import json
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from shampax.configs import base, lm
from shampax.framework.base import values
from shampax.framework.base.errors import UserError, did_you_mean
from shampax.framework.config import check as config_lib
from shampax.framework.config.components import CONTRACTS, build, component, known
from shampax.framework.dataset import Data
from shampax.framework.optimizer import OptimizerOptions
from shampax.framework.task import Task


@dataclasses.dataclass(frozen=True)
class Toy:
    width: int  # has no default
    vocab_size: int = 100
    rate: float = 1
    betas: tuple[float, float] = (0.9, 0.99)
    rules: Sequence[tuple[str, str | None]] = (("a", None),)
    limit: int | None = None
    kind: Literal["plain", "fancy"] = "plain"
    label: str = ""
    fast: bool = False

    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f"width {self.width} is odd; use {self.width + 1}")
        if not self.rate:
            raise OverflowError("too large")


@dataclasses.dataclass(frozen=True)
class Other:
    vocab_size: int = 7
    depth: int = 3


@dataclasses.dataclass(frozen=True)
class Unholdable:
    table: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Named:
    name: str = "x"


TOY, OTHER = f"{__name__}:Toy", f"{__name__}:Other"

FILE = f"""
    from shampax.configs import base

    VARIANTS = {{"small": 2, "large": 64}}

    def get_config(variant="small"):
        config = base.get_config()
        config.task = base.component({TOY!r}, width=VARIANTS[variant], betas=[0, 0.5])
        config.data = base.component({OTHER!r}, vocab_size=config.task.get_ref("vocab_size"))
        config.optimizer = base.component({OTHER!r})
        # more
        return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my config.py"
    path.write_text(textwrap.dedent(FILE))
    return path


def rewritten(file, line):
    file.write_text(file.read_text().replace("# more", line))
    return str(file)


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def test_a_component_has_its_class_defaults_and_the_given_values():
    section = component(TOY, width=4, limit=5)
    assert section.is_locked
    assert section.to_dict() == {
        "name": TOY,
        "width": 4,
        "vocab_size": 100,
        "rate": 1.0,
        "betas": (0.9, 0.99),
        "rules": (("a", None),),
        "limit": 5,
        "kind": "plain",
        "label": "",
        "fast": False,
    }
    assert isinstance(section.rate, float)
    assert build(section) == Toy(width=4, limit=5, rate=1.0)


def test_a_component_with_lists_survives_json():
    section = component(TOY, width=4, rules=[["b", "c"]])
    back = ConfigDict(json.loads(section.to_json()))
    assert build(back) == build(section) == Toy(width=4, rate=1.0, rules=(("b", "c"),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widht": 4}, "Toy has no field 'widht'. Did you mean 'width'?"),
        ({"width": "four"}, "Toy.width='four': expected int."),
        ({"width": True}, "Toy.width=True: expected int."),
        ({"betas": (0.9,)}, "Toy.betas=(0.9,): expected tuple[float, float]."),
        ({"kind": "plane"}, "Toy.kind='plane': expected one of 'plain', 'fancy'."),
        ({"fast": 1}, "Toy.fast=1: expected bool."),
    ],
)
def test_invalid_components(fields, message):
    assert refusal(lambda: component(TOY, **fields)) == f"{__name__}:{message}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Toy", "'Toy' is not an import string. Write 'package.module:Class'."),
        ("no_such_package.x:Toy", "No module named 'no_such_package'"),
        (f"{__name__}:Tov", "has no dataclass 'Tov'. Did you mean 'Toy'?"),
        (f"{__name__}:FILE", "has no dataclass 'FILE'"),
        (f"{__name__}:Named", "Rename the field."),
        (f"{__name__}:Unholdable", "Unholdable.table={}: expected dict."),
    ],
)
def test_invalid_import_strings(name, message):
    assert message in refusal(component, name)


def test_a_module_that_fails_to_import_is_reported(tmp_path, monkeypatch):
    (tmp_path / "broken_module_of_a_user.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal(component, "broken_module_of_a_user:Task")
    assert message == "cannot import 'broken_module_of_a_user:Task': ZeroDivisionError: division by zero"


def test_building_names_the_invalid_component():
    assert refusal(build, component(TOY, width=3)) == f"{TOY}: width 3 is odd; use 4"
    assert refusal(build, component(TOY, width=4, rate=0)) == f"{TOY}: too large"
    assert refusal(build, component(TOY)) == f"{TOY}.width is missing: expected int."
    assert "name is empty" in refusal(build, base.get_config().task)
    stale = ConfigDict({"name": OTHER, "dept": 4})
    assert refusal(build, stale) == f"{OTHER} has no field 'dept'. Did you mean 'depth'?"


def test_a_config_file_and_its_variants(file):
    assert config_lib.load(str(file)).task.width == 2
    assert config_lib.load(f"{file}:large").task.width == 64
    assert refusal(config_lib.load, f"{file}:lage") == f"{file} has no variant 'lage'. Did you mean 'large'?"
    assert refusal(config_lib.load, f"{file}:x") == f"{file} has no variant 'x'. Choose from: small, large."


def test_a_file_written_twice_in_a_second_is_read_twice(file, monkeypatch):
    """Fault: cached bytecode of the first file is used for the second, which has the same length and time."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    rewritten(file, "config.seed = 1")
    for seed in (1, 2):
        file.write_text(file.read_text().replace("config.seed = 1", f"config.seed = {seed}"))
        os.utime(file, (1, 1))
        assert config_lib.load(str(file)).seed == seed


@pytest.mark.parametrize("spec", ["shampax/configs/lm.py:sample_adamw", "configs/lm.py:sample_adamw"])
def test_shipped_configs_load_from_any_directory(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_lib.load(spec).optimizer.name == "shampax.optimizers.baselines:AdamWOptions"


def test_a_file_in_the_current_directory_has_priority_over_a_shipped_one(file, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "lm.py").write_text(file.read_text())
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("configs/lm.py").task.name == TOY
    assert config_lib.load("shampax/configs/lm.py").task.name == "shampax.models.lm:LMTask"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.batchsize = 3", ":11: unknown key 'batchsize'. Did you mean 'batch_size'?"),
        ("config.schedul.warmup = 3", ":11: unknown key 'schedul'. Did you mean 'schedule'?"),
        ("config['batchsize'] = 3", ":11: unknown key 'batchsize'. Did you mean 'batch_size'?"),
        ("config.task.widht = 3", ":11: unknown key 'widht'. Did you mean 'width'?"),
        ("config.batch_size = 'many'", ":11: batch_size='many': expected int."),
        ("config.task.vocab_size = 'many'", ":11: vocab_size='many': expected int."),
        ("base.component('Toy')", ":11: 'Toy' is not an import string. Write 'package.module:Class'."),
        ("config.batch_size = many", ":11: NameError: name 'many' is not defined"),
        ("config.batch_size = = 3", ":11: invalid syntax"),
        ("config = 3", ": get_config returned int. Return base.get_config(), changed."),
    ],
)
def test_an_error_in_a_file_names_file_and_line(file, line, message):
    assert refusal(config_lib.load, rewritten(file, line)) == f"{file}{message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.seed = None", "config.seed=None: expected int."),
        ("config.duration = 'long'", "config.duration: 'long': not a duration"),
        ("config.duration = '10%'", "config.duration: '10%': a percentage cannot set the length of the run"),
        ("config.schedule.warmup = '5 epoks'", "config.schedule.warmup: '5 epoks': unknown unit"),
        ("config.task.width = 3", f"config.task: {TOY}: width 3 is odd; use 4"),
        ("config.unlock(); config.mesh.pipe = 1", "unknown key 'config.mesh.pipe'. Did you mean 'config."),
        ("config.mesh = {'data': 1}", "config.mesh.expert is missing. Let get_config start from base.get_config()"),
        ("config.task.name = None", "config.task: name is empty"),
        ("config.task = {'width': 1}", "config.task is not the section of a component"),
    ],
)
def test_an_invalid_config_is_refused_when_loaded(file, line, message):
    assert message in refusal(config_lib.load, rewritten(file, line))


def test_files_that_are_not_config_files(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("")
    assert refusal(config_lib.load, str(path)).endswith("has no attribute 'get_config'")
    path.write_text("def get_config(): pass")
    assert "get_config() takes 0 positional arguments but 1 was given" in refusal(config_lib.load, f"{path}:x")
    path.write_text("VARIANTS = ('a', 'b')\ndef get_config(variant): pass")
    assert "get_config() missing 1 required positional argument: 'variant'" in refusal(config_lib.load, str(path))
    assert "Did you mean 'lm.py'?" in refusal(config_lib.load, "configs/ln.py")
    assert "no shipped config 'sample'; a file of yours ends in .py" in refusal(config_lib.load, "sample")
    assert "--config=a b: must be FILE.py" in refusal(config_lib.load, "a b")
    assert "cannot read config file" in refusal(config_lib.load, "x" * 5_000 + ".py")


def test_overrides_have_the_types_of_their_knobs(file):
    config = config_lib.load(
        str(file),
        [
            "batch_size=64",
            "duration=90",
            "schedule.learning_rate=3",
            "schedule.warmup=2 epochs",
            "task.betas=0.5, 1",
            "task.rules=[('x', 'y'), ('z', None)]",
            "task.limit=4",
            "task.limit=None",
            "task.kind=fancy",
            "task.label='3'",
            "task.fast=true",
            "task.width = 8".replace(" ", ""),
            'resume_from=a "b"',
        ],
    )
    assert config.batch_size == 64
    assert config.duration == "90"
    assert config.schedule.to_dict() == {
        "learning_rate": 3.0,
        "begin": "auto",
        "warmup": "2 epochs",
        "decay": "cosine",
        "final_fraction": 0.0,
    }
    assert config.resume_from == 'a "b"'
    rules = (("x", "y"), ("z", None))
    toy = Toy(width=8, rate=1.0, betas=(0.5, 1.0), rules=rules, kind="fancy", label="3", fast=True)
    assert build(config.task) == toy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batchsize=3", "unknown key 'config.batchsize'. Did you mean 'config.batch_size'?"),
        ("learning_rate=3", "unknown key 'config.learning_rate'. Did you mean 'config.schedule.learning_rate'?"),
        ("task.widht=3", "unknown key 'config.task.widht'. Did you mean 'config.task.width'?"),
        ("seed.x=3", "unknown key 'config.seed.x'. Did you mean 'config.seed'?"),
        ("qqqq=3", "unknown key 'config.qqqq'. --help lists all."),
        ("seed", "missing value for --config.seed. Write --config.seed=VALUE."),
        ("seed=", "config.seed='': expected int."),
        ("seed=0x" + 5_000 * "f", "config.seed='0x" + 75 * "f" + "...': expected int."),
        ("seed=1.5", "config.seed='1.5': expected int."),
        ("task.width=3", f"config.task: {TOY}: width 3 is odd; use 4"),
        ("task.kind=plane", "config.task.kind='plane': expected one of 'plain', 'fancy'."),
        ("mesh=3", "config.mesh='3': is a section. Set one of its keys: data, expert, fsdp, sequence, tensor."),
        ("task=x:Y", "config.task='x:Y': is a section. Set config.task.name."),
        ("task.name=x:", "config.task.name: 'x:' is not an import string. Write 'package.module:Class'."),
    ],
)
def test_invalid_overrides(file, change, message):
    assert refusal(config_lib.load, str(file), [change]) == message


@pytest.mark.parametrize(("key", "protocol"), [("task", Task), ("data", Data), ("optimizer", OptimizerOptions)])
def test_classes_are_checked_for_the_methods_of_their_contract(key, protocol):
    """Faults: a method that the trainer calls is missing, and is missed after the data are prepared; a shipped class is
    not among those that an error proposes."""
    methods = {name: method for name, method in vars(protocol).items() if inspect.isfunction(method) and name[0] != "_"}
    assert CONTRACTS[key] == {
        name: tuple(
            each.name + "=" * (each.kind is each.KEYWORD_ONLY)
            for each in list(inspect.signature(method).parameters.values())[1:]
        )
        for name, method in methods.items()
    }
    assert lm.get_config()[key].name.rpartition(":")[2] in [name.rpartition(":")[2] for name in known(key)]


def test_a_component_override_is_applied_before_overrides_of_its_fields(file):
    changes = ["task.depth=5", f"task.name={OTHER}"]
    assert config_lib.load(str(file), changes).task.to_dict() == {"name": OTHER, "vocab_size": 7, "depth": 5}
    gone = refusal(config_lib.load, str(file), ["task.width=4", f"task.name={OTHER}"])
    assert gone.startswith("unknown key 'config.task.width'. ")


def test_the_last_component_override_wins(file):
    config = config_lib.load(str(file), [f"task.name={OTHER}", "task.width=6", f"task.name='{TOY}'"])
    assert build(config.task) == Toy(width=6, rate=1.0)


def test_a_file_that_names_another_component_but_keeps_the_fields_is_refused(file):
    spec = rewritten(file, f"config.task.name = {OTHER!r}")
    expected = f"{OTHER} has no field '"
    assert expected in refusal(config_lib.load, spec)
    assert expected in refusal(config_lib.load, spec, ["task.width=4"])


def test_naming_the_current_component_changes_nothing(file):
    assert config_lib.load(f"{file}:large", [f"task.name={TOY}"]).task.width == 64


def test_an_override_changes_all_references_to_it(file):
    for change in ("task.vocab_size=50", "data.vocab_size=50"):
        config = config_lib.load(str(file), [change])
        assert config.task.vocab_size == config.data.vocab_size == 50
        assert build(config.data) == Other(vocab_size=50)
        stored = json.loads(config_lib.to_json(config))
        assert stored["task"]["vocab_size"] == stored["data"]["vocab_size"] == 50


def test_a_config_equals_its_own_json(file):
    config = config_lib.load(str(file))
    assert config_lib.differences(json.loads(config_lib.to_json(config)), config, ()) == []


def test_differences_leave_out_keys_that_may_change(file):
    old = json.loads(config_lib.to_json(config_lib.load(str(file))))
    new = config_lib.load(str(file), ["batch_size=64", "mesh.data=2", "log.every=1 step", "schedule.warmup=1%"])
    assert config_lib.differences(old, new, ("mesh", "log")) == [
        "batch_size: 32 -> 64",
        'schedule.warmup: "10%" -> "1%"',
    ]
    assert len(config_lib.differences(old, new, ("mesh.dat", "lo"))) == 4


@pytest.mark.parametrize(
    "given", ["duration,batch_size", "duration,batch_size,", "('duration', 'batch_size')", "batch_size, duration"]
)
def test_keys_that_may_change_are_added_to_the_built_in_ones(file, given):
    """Faults: the list replaces the built-in one; the list itself is a difference."""
    old = json.loads(config_lib.to_json(config_lib.load(str(file))))
    new = config_lib.load(
        str(file), [f"may_change={given}", "duration=9 steps", "batch_size=64", "mesh.data=2", "seed=1"]
    )
    assert config_lib.differences(old, new, config_lib.may_change(new)) == ["seed: 0 -> 1"]
    again = config_lib.load(str(file), ["duration=9 steps", "batch_size=64", "seed=1"])
    assert config_lib.differences(json.loads(config_lib.to_json(new)), again, config_lib.may_change(again)) == []


def test_another_component_is_one_difference(file):
    old = json.loads(config_lib.to_json(config_lib.load(str(file))))
    new = config_lib.load(str(file), [f"task.name={OTHER}"])
    assert config_lib.differences(old, new, ()) == [f'task.name: "{TOY}" -> "{OTHER}"']


def test_a_knob_of_a_later_version_counts_as_its_default(file):
    """Fault: a workdir cannot be resumed after an update, although the run has always used the default."""
    config = config_lib.load(str(file))
    stored = json.loads(config_lib.to_json(config))
    stored["old_knob"] = stored.pop("gradient_clip")
    del stored["task"]["label"], stored["sharding_rules"], stored["optimizer"]["depth"]
    assert config_lib.differences(stored, config, ()) == ["old_knob: 0.0 -> absent"]
    config = config_lib.load(
        str(file), ["gradient_clip=2", "task.label=x", f"optimizer.name={TOY}", "optimizer.width=4"]
    )
    assert config_lib.differences(stored, config, ("old_knob",)) == [
        "gradient_clip: 0.0 -> 2.0",
        f'optimizer.name: "{OTHER}" -> "{TOY}"',
        'task.label: "" -> "x"',
    ]


def test_the_advice_for_a_foreign_workdir_works(file):
    """Fault: the flag that the error names is itself a difference, or replaces the built-in keys."""
    old = json.loads(config_lib.to_json(config_lib.load(str(file))))
    changes = ["duration=80 steps", "seed=3", "mesh.data=2"]
    changed = config_lib.differences(old, config := config_lib.load(str(file), changes), config_lib.may_change(config))
    advice = config_lib.foreign("runs/a", changed).rpartition(": add ")[2]
    assert advice == "--change duration --change seed"
    config = config_lib.load(str(file), changes, advice.replace("--change ", "").split())
    assert config_lib.differences(old, config, config_lib.may_change(config)) == []
    other = config_lib.load(str(file), ["may_change=batch_size"], ["duration=80 steps", "task"])
    assert (other.duration, other.may_change) == ("80 steps", ("batch_size", "duration", "task"))
    assert "Did you mean 'config.duration'?" in refusal(config_lib.load, str(file), (), ["duratoin"])


def test_the_message_for_a_foreign_workdir_is_short():
    message = config_lib.foreign("runs/a", [f"key{i}: {i} -> {i + 1}" for i in range(7)])
    assert "runs/a belongs to another config (key0: 0 -> 1, " in message
    assert "key4: 4 -> 5 and 2 more)" in message
    assert "Use another --workdir" in message
    assert message.endswith("add " + " ".join(f"--change key{i}" for i in range(7)))


def test_every_key_that_may_change_is_a_knob():
    config = config_lib.load("configs/lm.py:sample")
    for key in base.MAY_CHANGE:
        section, _, last = key.rpartition(".")
        assert last in (config[section] if section else config)


@pytest.mark.parametrize("variant", lm.VARIANTS)
def test_shipped_configs_can_be_built(variant):
    config = config_lib.load(f"configs/lm.py:{variant}", ["task.vocab_size=300"])
    assert build(config.data).vocab_size == build(config.task).vocab_size == 300
    assert {type(build(config.optimizer)).__name__} <= {"ShampooOptions", "AdamWOptions"}


KEYS = st.sampled_from(["seed", "duration", "mesh", "sharding_rules", "task.name", "task.rules", "task.limit", "data"])
LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
).map(repr)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(changes=st.lists(st.text() | st.tuples(KEYS, st.text() | LITERALS).map("=".join), max_size=3))
def test_any_override_gives_a_config_or_a_user_error(file, changes):
    try:
        config = config_lib.load(str(file), changes)
    except UserError:
        return
    assert config_lib.differences(json.loads(config_lib.to_json(config)), config, ()) == []


@settings(deadline=None)
@given(text=st.text() | LITERALS, hint=st.sampled_from([int, float, str, bool, tuple, Any, int | None, list[int]]))
def test_a_parsed_value_has_its_type_and_parses_again(text, hint):
    try:
        value = values.parse(text, hint)
    except TypeError:
        return
    assert values.convert(value, hint) == value or value != value or "nan" in repr(value)
    if hint in (int, float, str, bool, tuple):
        assert type(value) is hint


@pytest.mark.parametrize(
    "text", ["(" * 3_000, "1" * 10_000, "'\\d'", "1 is 1", "\0", "{" * 200, "9e999", "-" * 10_000 + "1"]
)
def test_hostile_text_is_a_value_or_a_type_error(text, recwarn):
    for hint in (int, str, tuple):
        try:
            values.parse(text, hint)
        except TypeError:
            continue
    assert not recwarn.list


def test_did_you_mean_lists_all_keys_if_none_is_similar():
    assert did_you_mean("zzz", ["alpha", "beta"]) == ". Choose from: alpha, beta."
    assert did_you_mean("zzz", []) == "."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("gradient_clip=-1", "gradient_clip=-1.0: must be at least 0."),
        ("gradient_clip=1e999", "gradient_clip=inf: must be at least -3.4e+38 and at most 3.4e+38."),
        ("gradient_clip=1e-46", "gradient_clip=1e-46: is 0 in float32. Use 0, or at least 1.18e-38."),
        ("schedule.learning_rate=1e39", "schedule.learning_rate=1e+39: must be at least -3.4e+38 and at most 3.4e+38."),
        ("schedule.learning_rate=-1e39", "schedule.learning_rate=-1e+39: must be at least 0."),
        (
            "schedule.final_fraction=-1e39",
            "schedule.final_fraction=-1e+39: must be at least -3.4e+38 and at most 3.4e+38.",
        ),
        ("optimizer.epsilon=1e-46", "optimizer.epsilon=1e-46: is 0 in float32. Use 0, or at least 1.18e-38."),
        ("optimizer.epsilon=nan", "optimizer.epsilon='nan': expected float."),
        ("optimizer.interval=2**62", "optimizer.interval='2**62': expected int."),
        (
            f"optimizer.interval={2**62}",
            f"optimizer.interval={2**62}: must be at least -2,147,483,647 and at most 2,147,483,647.",
        ),
        (
            f"optimizer.early_intervals=(({2**40}, 5),)",
            f"early_intervals={2**40}: must be at least -2,147,483,647 and at most 2,147,483,647.",
        ),
        (f"task.vocab_size={2**31}", f"vocab_size={2**31}: must be at least -2,147,483,647 and at most 2,147,483,647."),
        (f"mesh.data=-{2**31}", f"mesh.data=-{2**31}: must be at least -2,147,483,647 and at most 2,147,483,647."),
        (f"batch_size={2**40}", f"batch_size={2**40}: must be at least 1 and at most 16,777,216."),
        ("simulated_devices=100_000", "simulated_devices=100000: must be at least 0 and at most 1,024."),
        ("watchdog.end_after=1e30", "watchdog.end_after=1e+30: must be at least 0 and at most 1,000,000.0."),
        ("sharding_rules=('embed','fsdp')", "expected Sequence[tuple[str, str | Sequence[str] | None]]."),
        ("renamed=(1e400,)", "config.renamed='(1e400,)': expected Sequence[tuple[str, str]]."),
        ("seed=-1", "seed=-1: must be at least 0 and at most 4,294,967,295."),
        (f"seed={2**32}", f"seed={2**32}: must be at least 0 and at most 4,294,967,295."),
        ("evaluation.batches=0", "evaluation.batches=0: no batch to evaluate. Use -1 for all batches, or at least 1."),
        ("checkpoint.keep_last=0", "keep_last=0: must be at least 1."),
        ("guard.max_consecutive_skips=0", "must be at least 1."),
        ("duration=1e30 steps", "config.duration: '1e30 steps': too many steps. Use at most 2147483647 steps."),
        ("schedule.warmup=9e18 steps", "config.schedule.warmup: '9e18 steps': too many steps."),
    ],
)
def test_numbers_out_of_range_are_refused(change, words):
    """Faults: a knob reverses the gradient, keeps no checkpoint, becomes 0 or infinite, or fills the memory."""
    with pytest.raises(UserError, match=re.escape(words)):
        config_lib.load("shampax/configs/lm.py:sample", [change])
