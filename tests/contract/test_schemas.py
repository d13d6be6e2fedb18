"""One name, one signature in every layer."""

import inspect

import pytest
import torch

from fishkern import _dispatch, _ops, functional
from fishkern.backends import reference
from tests.support import op_inputs


@pytest.mark.parametrize("op", _ops.SCHEMAS)
def test_native_schema_is_the_same_text(op):
    if reason := _dispatch.why_not("native"):
        pytest.skip(reason)
    ours = str(getattr(torch.ops.fishkern, op).default._schema)
    native = str(getattr(torch.ops.fishkern_native, op).default._schema)
    assert native == ours.replace("fishkern::", "fishkern_native::")


@pytest.mark.parametrize("op", _ops.SCHEMAS)
def test_reference_takes_what_the_schema_says(op):
    schema = getattr(torch.ops.fishkern, op).default._schema
    signature = inspect.signature(getattr(reference, op))
    assert list(signature.parameters) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        default = signature.parameters[argument.name].default
        expected = (
            argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        )
        assert default == expected, argument.name


# Another form of masked_adamw_, for the optimizer, which keeps its state that way.
INTERNAL = {"masked_adamw_packed_"}


@pytest.mark.parametrize("op", _ops.SCHEMAS)
def test_every_op_has_a_door_and_sample_inputs(op):
    assert (op in functional.__all__) == (op not in INTERNAL)
    assert op in INTERNAL or getattr(functional, op).__doc__
    assert op in op_inputs.OPS


@pytest.mark.parametrize("op", _ops.SCHEMAS)
def test_underscore_says_whether_an_op_mutates(op):
    schema = getattr(torch.ops.fishkern, op).default._schema
    assert op.endswith("_") == schema.is_mutable
