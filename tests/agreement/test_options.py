"""The options of a watch are one set: the function, the checked options and the typed keyword arguments agree."""

from __future__ import annotations

import inspect
from dataclasses import fields

from neuronscope.options import ScanArguments, WatchArguments, WatchOptions
from neuronscope.scope import watch


def test_watch_takes_every_option_with_its_default() -> None:
    parameters = inspect.signature(watch).parameters
    options = {field.name: field.default for field in fields(WatchOptions)}
    own = {"model", "optimizer"}  # callbacks and scans have neither: their steps come from elsewhere
    assert {name: each.default for name, each in parameters.items() if name not in own} == options


def test_the_typed_arguments_of_watch_equal_the_options() -> None:
    assert WatchArguments.__annotations__.keys() == {field.name for field in fields(WatchOptions)}
    assert ScanArguments.__annotations__.keys() < WatchArguments.__annotations__.keys()
