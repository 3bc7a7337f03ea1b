"""The order in which the functions of a run are compiled."""

import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from shampax.framework.hooks import Compile
from shampax.framework.step.compilation import Steps


class Function:
    """A lowered function whose compilation waits for an event."""

    def __init__(self, name, compiled, event=None, error=None):
        self._name, self._compiled, self._event, self._error = name, compiled, event, error

    def lower(self):
        return self

    def compile(self, compiler_options):
        assert self._event is None or self._event.wait(60)
        if self._error:
            raise self._error
        self._compiled.append(self._name)
        return self._name


def _steps(compiled, event=None, **errors):
    def function(name):
        return Function(name, compiled, event if name == "train" else None, errors.get(name))

    names = ("train", "diagnose", "evaluate", "predict")
    program = types.SimpleNamespace(compiler_options={}, lower=lambda: ((name, function(name)) for name in names))
    return Steps(function("initial"), program, ThreadPoolExecutor(2))


def test_evaluation_does_not_delay_the_first_step():
    """Fault: evaluation is compiled beside the train step, which takes longer on few processor cores."""
    compiled, event = [], threading.Event()
    steps = _steps(compiled, event)
    assert steps["diagnose"] == "diagnose"
    assert compiled == ["initial", "diagnose"]
    event.set()
    assert steps["train"] == "train"
    steps.wait()
    assert compiled[:3] == ["initial", "diagnose", "train"]
    assert sorted(compiled[3:]) == ["evaluate", "predict"]


def test_an_error_of_the_compiler_is_raised_after_the_first_step():
    """Fault: evaluation cannot be compiled, which the run notices many steps later."""
    steps = _steps([], predict=RuntimeError("RESOURCE_EXHAUSTED"))
    run = types.SimpleNamespace(step=4, stopped=None, steps=steps, watch=types.SimpleNamespace(at=lambda *where: None))
    hook = Compile(4)
    assert not hook.due(run)
    run.step = hook.next(4)
    assert run.step == 5
    assert hook.due(run)
    assert hook.next(5) > 2**31
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        hook(run)
