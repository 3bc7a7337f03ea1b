import dataclasses
import pathlib
import re
import warnings

import pytest
from ml_collections import ConfigDict

from shampax.framework.base.errors import UserError
from shampax.framework.config import overrides
from shampax.framework.config.components import build, component
from shampax.optimizers import ShampooOptions
from shampax.optimizers.diagonal import GRAFTS

# The options that the expectations below depend on.
FIXED = {
    "block_size": 1024,
    "view": "matrix",
    "exponent": None,
    "ridge": 1e-6,
    "cut": 0.0,
    "beta2": 0.99,
    "graft": "adam",
    "interval": 20,
}
NAME = "shampax.optimizers.shampoo:ShampooOptions"
GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "optimizer.md"


def message(error):
    """Return the whole text of an error as a pattern for pytest.raises."""
    return f"^{re.escape(error)}$"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shampoo", {"kind": "shampoo"}),
        ("diagonal", {"kind": "diagonal"}),
        ("rows", {"kind": "rows"}),
        ("one_sided side=left", {"kind": "one_sided", "side": "left"}),
        ("one_sided", {"kind": "one_sided", "side": "short"}),
        ("soap side=short", {"kind": "soap", "side": "short"}),
        ("  shampoo   block_size=512  exponent=0.5 ", {"block_size": 512, "exponent": 0.5}),
        ("shampoo view=tensor stack=2", {"view": "tensor", "stack": 2}),
        ("shampoo ridge=1e-4 beta2=0", {"ridge": 1e-4, "beta2": 0.0}),
        ("shampoo cut=0 exponent=0", {"cut": 0.0, "exponent": 0.0}),
    ],
)
def test_parse(text, expected):
    """Fault: a value is dropped or stays text."""
    parsed = ShampooOptions(**FIXED).treatment(text)
    found = {name: getattr(parsed, name) for name in expected}
    assert found == expected
    assert [type(v) for v in found.values()] == [type(v) for v in expected.values()]


KINDS = "must begin with one of shampoo, one_sided, soap, kl_shampoo, muon, diagonal, rows."
KEYS = "Use side, view, block_size, exponent, ridge, cut, beta2, orthogonalize, stack as key=value."


DIAGONAL_SUM = (
    "beta2=1.0: diagonal 'adam' averages second moments. Use a diagonal_beta2 below 1, or diagonal 'adagrad' for sums."
)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", f"treatment '': {KINDS}"),
        ("shampo", f"treatment 'shampo': {KINDS}"),
        ("block_size=8", f"treatment 'block_size=8': {KINDS}"),
        ("shampoo block=3", f"treatment 'shampoo block=3': 'block' is unknown. {KEYS}"),
        ("shampoo kind=diagonal", f"treatment 'shampoo kind=diagonal': 'kind' is unknown. {KEYS}"),
        ("shampoo one_sided", f"treatment 'shampoo one_sided': 'one_sided' is unknown. {KEYS}"),
        ("shampoo ridge=x", "treatment 'shampoo ridge=x': ridge needs a float, not 'x'."),
        ("shampoo ridge", "treatment 'shampoo ridge': ridge needs a float, not ''."),
        ("shampoo exponent=1/4", "treatment 'shampoo exponent=1/4': exponent needs a float, not '1/4'."),
        (
            "one_sided side=top",
            "treatment 'one_sided side=top': side='top': must be one of both, left, right, short.",
        ),
        ("rows side=left", "treatment 'rows side=left': only preconditioners have a side. Leave it out."),
        (
            "one_sided view=tensor",
            "treatment 'one_sided view=tensor': this treatment is for matrices. Leave view=tensor out.",
        ),
        ("soap exponent=0.5", "treatment 'soap exponent=0.5': soap has a fixed exponent. Leave it out."),
        ("rows beta2=1", "treatment 'rows beta2=1': rows take no further words. Write 'rows' alone."),
        ("shampoo stack=-1", "treatment 'shampoo stack=-1': stack=-1: must be at least 0."),
        ("shampoo view=vector", "treatment 'shampoo view=vector': view='vector': must be one of matrix, tensor."),
        ("shampoo block_size=0", "treatment 'shampoo block_size=0': block_size=0: must be at least 1."),
        (
            "shampoo ridge=-1",
            "treatment 'shampoo ridge=-1': ridge=-1.0: must be at least 0.",
        ),
        ("shampoo cut=-1", "treatment 'shampoo cut=-1': cut=-1.0: must be at least 0."),
        (
            "shampoo ridge=0.5 cut=0.1",
            "treatment 'shampoo ridge=0.5 cut=0.1': ridge=0.5 and cut=0.1: only one may be set. Set the other to 0.",
        ),
        ("shampoo beta2=-0.5", "treatment 'shampoo beta2=-0.5': beta2=-0.5: must be at least 0."),
        ("shampoo beta2=1", "beta2=1.0: graft 'adam' averages second moments. Use graft 'adagrad' for sums."),
        ("diagonal beta2=1", DIAGONAL_SUM),
        ("shampoo exponent=0.3", "exponent=0.3: must be 0 or 1/p for a whole p. Use 1/3 = 0.333333."),
        ("shampoo exponent=-0.5", "exponent=-0.5: must be 0 or 1/p for a whole p. Use 1/1 = 1."),
    ],
)
def test_invalid_treatments(text, error):
    """Faults: a treatment is misread; the message lacks the given or the allowed values."""
    with pytest.raises(ValueError, match=message(error)):
        ShampooOptions(**FIXED, treatments=(("never", "shampoo"), (".*", text)))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"beta1": -0.1}, "beta1=-0.1: must be at least 0."),
        ({"beta2": 1.5}, "beta2=1.5: must be at most 1."),
        ({"beta2": float("nan")}, "beta2=nan: must be finite."),
        ({"interval": 2**31 - 1}, "interval=2147483647: must be at most 10,000."),
        ({"host_workers": 100_000, "refresh": "host"}, "host_workers=100000: must be at most 1,024."),
        ({"beta1": 1.0}, "beta1=1.0: must be below 1, or gradients have no effect. Use 0.9."),
        *[({name: 0}, f"{name}=0: must be at least 1.") for name in ("block_size", "interval", "max_failures")],
        *[
            ({name: -1}, f"{name}=-1: must be at least 0.")
            for name in ("ridge", "cut", "epsilon", "weight_decay", "start_step", "merge_dims")
        ],
        ({"epsilon": 0.0}, "epsilon=0: must be positive, or graft 'adam' divides 0 by 0. Use 1e-8."),
        (
            {"epsilon": 0.0, "graft": "adagrad_normalized"},
            "epsilon=0: must be positive, or graft 'adagrad_normalized' divides 0 by 0. Use 1e-8.",
        ),
        ({"beta2": 1.0, "graft": "adagrad"}, DIAGONAL_SUM),
        ({"diagonal_beta2": 1.0}, DIAGONAL_SUM),
        ({"diagonal_beta1": 1.0}, "diagonal_beta1=1.0: must be below 1, or gradients have no effect. Use 0.9."),
        (
            {"diagonal": "none"},
            "diagonal='none': must be one of adam, rmsprop, adagrad, sgd, adam_normalized, rmsprop_normalized, "
            "adagrad_normalized.",
        ),
        (
            {"diagonal": "rmsprop", "graft": "sgd", "epsilon": 0.0},
            "epsilon=0: must be positive, or diagonal 'rmsprop' divides 0 by 0. Use 1e-8.",
        ),
        ({"beta2": 1.0}, DIAGONAL_SUM),
        (
            {"beta2": 1.0, "diagonal_beta2": 0.99, "graft": "rmsprop_normalized"},
            "beta2=1.0: graft 'rmsprop_normalized' averages second moments. Use graft 'adagrad' for sums.",
        ),
        (
            {"ridge": 0.0, "cut": 1e-3},
            "cut=0.001: solver 'newton' needs a ridge. Use solver 'eigh' or set ridge.",
        ),
        ({"ridge": 1e-6, "cut": 1e-3}, "ridge=1e-06 and cut=0.001: only one may be set. Set the other to 0."),
        ({"exponent": 0.3}, "exponent=0.3: must be 0 or 1/p for a whole p. Use 1/3 = 0.333333."),
        ({"exponent": 0.2499}, "exponent=0.2499: must be 0 or 1/p for a whole p. Use 1/4 = 0.25."),
        ({"exponent": 3.0}, "exponent=3.0: must be 0 or 1/p for a whole p. Use 1/1 = 1."),
        ({"early_intervals": ((0, 1),)}, "early_intervals=((0, 1),): last steps must increase and be positive."),
        (
            {"early_intervals": ((9, 1), (9, 2))},
            "early_intervals=((9, 1), (9, 2)): last steps must increase and be positive.",
        ),
        (
            {"early_intervals": ((9, 8),)},
            "early_intervals=((9, 8),): 8 must divide interval=20. Use one of 1, 2, 4, 5, 10, 20.",
        ),
        (
            {"early_intervals": ((9, 0),)},
            "early_intervals=((9, 0),): 0 must divide interval=20. Use one of 1, 2, 4, 5, 10, 20.",
        ),
        (
            {"early_intervals": ((9, 4),), "interval": 2},
            "early_intervals=((9, 4),): 4 must divide interval=2. Use one of 1, 2.",
        ),
        ({"phases": 30}, "phases=30: must be at most interval=20."),
        ({"wider": 0.0}, "wider=0.0: must be positive. Use width / width of the tuned model."),
        ({"view": "vector"}, "view='vector': must be one of matrix, tensor."),
        ({"solver": "host"}, "solver='host': must be one of newton, eigh."),
        ({"refresh": "never"}, "refresh='never': must be one of staggered, host."),
        ({"momentum": "polyak"}, "momentum='polyak': must be one of ema, heavy_ball."),
        ({"decay": "l2"}, "decay='l2': must be one of decoupled, coupled."),
        *[
            ({name: "float16"}, f"{name}='float16': must be one of float32, bfloat16.")
            for name in ("roots_dtype", "momentum_dtype")
        ],
        (
            {"treatments": (("(", "shampoo"),)},
            "'(': invalid regex: missing ), unterminated subpattern at position 0. Escape special characters.",
        ),
        (
            {"decay_rules": (("[", True),)},
            "'[': invalid regex: unterminated character set at position 0. Escape special characters.",
        ),
        (
            {"rate_rules": (("*", 1.0),)},
            "'*': invalid regex: nothing to repeat at position 0. Escape special characters.",
        ),
        (
            {"rate_rules": (("bias", -1.0),)},
            "rate_rules['bias']=-1.0: must be finite and not negative. Use 1 to keep the rate.",
        ),
    ],
)
def test_invalid_options(options, error):
    """Faults: invalid options fail late or never; the message lacks the given value or the fix."""
    with pytest.raises(ValueError, match=message(error)):
        ShampooOptions(**(FIXED | options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ((10, 1),)),
        ({"interval": 1}, ()),
        ({"early_intervals": ()}, ()),
        ({"refresh": "host"}, ((10, 5),)),
        ({"refresh": "host", "delay": 1}, ((10, 2),)),
        ({"refresh": "host", "interval": 9}, ((10, 3),)),
        ({"refresh": "host", "interval": 7}, ()),
    ],
)
def test_default_early_intervals_are_the_shortest_that_the_schedule_allows(options, expected):
    """Faults: roots follow young statistics too late; the default is refused because of the delay."""
    assert ShampooOptions(**({"interval": 10} | options)).early == expected


@pytest.mark.parametrize("name", ["ridge", "cut", "epsilon", "weight_decay", "exponent"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(name, value):
    """Fault: NaN, which no comparison refuses, is accepted and reaches every root in the first step."""
    with pytest.raises(ValueError, match=message(f"{name}={value}: must be finite.")):
        ShampooOptions(**{name: value})


@pytest.mark.parametrize("name", ["ridge", "cut", "exponent", "beta2"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_of_treatments_are_finite(name, value):
    """Fault: NaN in a treatment passes the checks of the options."""
    with pytest.raises(ValueError, match=f"{name}=.*{value}|{name}={value}"):
        ShampooOptions(treatments=((".*", f"shampoo {name}={value}"),))


def test_unknown_grafts_are_refused():
    """Fault: an unknown graft fails in a lookup before its message."""
    with pytest.raises(ValueError, match=message(f"graft='lion': must be one of {', '.join(GRAFTS)}.")):
        ShampooOptions(graft="lion")


GOOD = [
    *[{"graft": graft, "diagonal": graft} for graft in GRAFTS if graft != "none"],
    {"graft": "adagrad", "diagonal": "adagrad", "beta2": 1.0},
    {"graft": "adagrad", "beta2": 1.0, "diagonal_beta2": 0.99},
    {"graft": "sgd", "diagonal": "sgd", "epsilon": 0.0},
    {"ridge": 0.0, "cut": 1e-4, "solver": "eigh"},
    {"graft": "none", "interval": 1},
    {"graft": "none", "ridge": 1e-2},
    {"graft": "none", "ridge": 0.0, "cut": 1e-2, "refresh": "host"},
    {"early_intervals": ((5, 1), (50, 10), (60, 20))},
]


def test_recommended_options_give_no_warning():
    """Fault: a default or recommended choice is refused or gives a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ShampooOptions()
        for options in GOOD:
            ShampooOptions(**(FIXED | options))


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "shampoo", {"block_size": 1024, "view": "matrix", "ridge": 1e-6, "cut": 0.0, "beta2": 0.99}),
        ({}, "shampoo ridge=1e-3", {"ridge": 1e-3, "cut": 0.0}),
        ({}, "shampoo cut=1e-3", {"ridge": 0.0, "cut": 1e-3}),
        ({"ridge": 0.0, "cut": 1e-2, "solver": "eigh"}, "shampoo ridge=1e-3", {"ridge": 1e-3, "cut": 0.0}),
        ({"ridge": 0.0, "cut": 1e-2, "solver": "eigh"}, "shampoo", {"ridge": 0.0, "cut": 1e-2}),
        ({}, "shampoo ridge=0", {"ridge": 0.0, "cut": 0.0}),
        ({"exponent": 0.5}, "shampoo", {"exponent": 0.5}),
        ({"exponent": 0.5}, "shampoo exponent=0", {"exponent": 0.0}),
        ({}, "shampoo", {"exponent": None}),
        ({"view": "tensor", "block_size": 64}, "shampoo", {"view": "tensor", "block_size": 64}),
        ({"view": "tensor"}, "shampoo view=matrix block_size=8", {"view": "matrix", "block_size": 8}),
        ({}, "one_sided side=left beta2=0", {"kind": "one_sided", "side": "left", "beta2": 0.0}),
    ],
)
def test_a_treatment_has_priority_over_the_options(options, text, expected):
    """Faults: a rule's cut is combined with the options' ridge; a rule's zero counts as "not set"."""
    resolved = ShampooOptions(**(FIXED | options)).treatment(text)
    assert {name: getattr(resolved, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("exponent", "text", "orders"),
    [
        (None, "shampoo", {1: 2, 2: 4, 3: 6}),
        (0.5, "shampoo", {1: 2, 2: 2, 3: 2}),
        (1.0, "shampoo", {1: 1, 2: 1}),
        (1 / 3, "shampoo", {1: 3, 2: 3}),
        (0.3333333, "shampoo", {2: 3}),
        (0.0, "shampoo", {1: 0, 2: 0, 3: 0}),
        (0.5, "shampoo exponent=0.25", {1: 4, 2: 4}),
        (0.5, "shampoo exponent=0", {1: 0, 2: 0}),
        (0.0, "shampoo exponent=1", {2: 1}),
    ],
)
def test_root_order(exponent, text, orders):
    """Faults: every number of sides gets the inverse fourth root; an exponent is read as its reciprocal."""
    options = ShampooOptions(exponent=exponent)
    rule = options.treatment(text)
    assert {sides: rule.order(sides) for sides in orders} == orders


@pytest.mark.parametrize("p", range(1, 13))
def test_the_suggested_exponent_is_accepted(p):
    """Fault: a user who follows the message and writes 0.333333 gets it again."""
    options = ShampooOptions(exponent=float(f"{1 / p:.6g}"))
    assert options.treatment("shampoo").order(2) == p


# Each field: text on the command line -> value of the option.
TEXTS = {
    "block_size": {"512": 512},
    "view": {"tensor": "tensor", "'tensor'": "tensor"},
    "merge_dims": {"4096": 4096},
    "treatments": {"((r'a/.*', 'diagonal'), ('.*', 'shampoo'))": ((r"a/.*", "diagonal"), (".*", "shampoo"))},
    "stack_axes": {"('layers',)": ("layers",), "()": ()},
    "fold_axes": {"['heads', 'kv']": ("heads", "kv")},
    "beta2": {"0.9": 0.9, "0": 0.0},
    "exponent": {"0.5": 0.5, "1": 1.0, "0": 0.0, "None": None},
    "ridge": {"1e-4": 1e-4},
    "cut": {"0": 0.0},
    "solver": {"eigh": "eigh"},
    "residual_bound": {"0.5": 0.5},
    "max_failures": {"9": 9},
    "orthogonalize": {"3": 3},
    "refresh": {"host": "host"},
    "interval": {"100": 100},
    "phases": {"9": 9},
    "early_intervals": {"((100, 1), (500, 1))": ((100, 1), (500, 1)), "[[10, 1]]": ((10, 1),)},
    "delay": {"9": 9},
    "host_workers": {"3": 3},
    "start_step": {"7": 7},
    "graft": {"rmsprop_normalized": "rmsprop_normalized"},
    "epsilon": {"1e-30": 1e-30},
    "diagonal": {"sgd": "sgd"},
    "diagonal_rate": {"2": 2.0},
    "diagonal_beta1": {"0.5": 0.5, "0": 0.0, "None": None},
    "diagonal_beta2": {"0.9": 0.9},
    "diagonal_nesterov": {"True": True, "False": False, "None": None},
    "beta1": {"0": 0.0},
    "momentum": {"heavy_ball": "heavy_ball"},
    "nesterov": {"true": True, "True": True},
    "weight_decay": {"0.1": 0.1},
    "decay": {"coupled": "coupled"},
    "decay_rules": {"(('.*', False),)": ((".*", False),)},
    "wider": {"8": 8.0},
    "rate_rules": {"(('bias', 2), ('.*', 0.5))": (("bias", 2.0), (".*", 0.5))},
    "precision": {"float32": "float32"},
    "roots_dtype": {"bfloat16": "bfloat16"},
    "momentum_dtype": {"bfloat16": "bfloat16"},
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ShampooOptions)])
def test_fields_from_the_command_line(field):
    """Faults: a config section cannot hold an annotation; a field is missing here."""
    for text, value in TEXTS[field].items():
        config = ConfigDict({"optimizer": component(NAME)}).lock()
        overrides.apply(config, [f"optimizer.{field}={text}"])
        options = build(config.optimizer)
        assert options == dataclasses.replace(ShampooOptions(), **{field: value})
        assert type(getattr(options, field)) is type(value)


def test_a_section_starts_with_given_values():
    """Fault: a section has other values than the options it describes."""
    assert build(component(NAME)) == ShampooOptions()
    section = component(NAME, exponent=0.5, interval=5, treatments=[[".*", "shampoo"]])
    assert build(section) == ShampooOptions(exponent=0.5, interval=5, treatments=((".*", "shampoo"),))


@pytest.mark.parametrize("text", ["exponent=half", "interval=2.5", "nesterov=1", "early_intervals=((1, 2, 3),)"])
def test_wrong_types_are_refused(text):
    """Fault: a value of a wrong type is accepted as text or rounded."""
    config = ConfigDict({"optimizer": component(NAME)}).lock()
    with pytest.raises(UserError):
        overrides.apply(config, [f"optimizer.{text}"])


def test_an_invalid_value_is_a_user_error():
    """Fault: a traceback instead of one line."""
    with pytest.raises(UserError, match="3 must divide interval=20"):
        build(component(NAME, interval=20, early_intervals=((10, 3),)))


def test_the_guide_lists_every_option_with_its_default():
    """Faults: a new option has no row; a default differs between code and guide."""
    table = GUIDE.read_text().partition("## Options")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, flags=re.MULTILINE))
    defaults = {field.name: field.default for field in dataclasses.fields(ShampooOptions)}
    assert list(defaults) == list(rows)[-len(defaults) :]
    for name, default in defaults.items():
        if not isinstance(default, tuple) or default == ():
            assert rows[name] == f"`{default}`"
