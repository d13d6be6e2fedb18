"""Every public name has a docstring, and the examples in docstrings run."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import fishkern

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fishkern.__path__, "fishkern.")
    if ".backends.triton" not in module.name and not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", fishkern.__all__)
def test_public_names_are_documented(name):
    thing = getattr(fishkern, name)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, Exception)):
        assert ">>>" in thing.__doc__, f"{name} has no example"


@pytest.mark.parametrize("name", ["fishkern", *MODULES])
def test_examples_run(name):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
