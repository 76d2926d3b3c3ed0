"""Every attribute and every input of every version of an operator that has a rule is read by it, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import AttributeProto, NodeProto, defs, helper

from helpers.onnx_cases import one_node, run
from thresher.errors import CaptureError
from thresher.frontend.onnx.graph import defaults_of
from thresher.frontend.onnx.operators import RULES, find_rule

SCHEMAS = [s for s in defs.get_all_schemas_with_history() if find_rule(s.domain, s.name, s.since_version)]
#: Attributes of versions before opset 7 whose rules do not read them, and of constants that are no tensors of numbers.
UNREAD = {"consumed_inputs", "max", "min", "value_string", "value_strings"}
VALUES = {
    AttributeProto.FLOAT: 0.5,
    AttributeProto.INT: 1,
    AttributeProto.INTS: [1],
    AttributeProto.STRING: "x",
    AttributeProto.STRINGS: ["x"],
    AttributeProto.FLOATS: [0.5],
}


def name_of(schema: defs.OpSchema) -> str:
    return f"{schema.domain or 'onnx'}.{schema.name}-{schema.since_version}"


def test_there_are_rules() -> None:
    assert len(RULES) > 150 and len(SCHEMAS) > 400


@pytest.mark.parametrize("schema", SCHEMAS, ids=name_of)
def test_every_attribute_and_input_is_read(schema: defs.OpSchema) -> None:
    rule = find_rule(schema.domain, schema.name, schema.since_version)
    assert rule is not None
    unread = schema.attributes.keys() - rule.attributes - ({"value"} if schema.name == "Constant" else set())
    assert unread <= UNREAD and (schema.since_version < 7 or schema.name == "Constant" or not unread)
    optional = schema.attributes.keys() - defaults_of(schema.domain, schema.name, schema.since_version).keys()
    assert not rule.required - {n for n, a in schema.attributes.items() if a.required or n not in optional}
    variadic = schema.max_input > 1000
    assert len(rule.inputs(len(schema.inputs) + 3 if variadic else schema.max_input)) >= len(schema.inputs)


def test_no_rule_names_what_no_version_has() -> None:
    named: dict[tuple[str, str], set[str]] = {}
    for schema in SCHEMAS:
        named.setdefault((schema.domain, schema.name), set()).update(schema.attributes)
    for (domain, op), versions in RULES.items():
        for rule in versions.values():
            assert rule.attributes - named[domain, op] <= {"consumed_inputs"}, op


OLD = [(s, a) for s in SCHEMAS for a in sorted(s.attributes.keys() & UNREAD)]


@pytest.mark.parametrize(("schema", "attribute"), OLD, ids=lambda v: v if isinstance(v, str) else name_of(v))
def test_an_attribute_without_a_parameter_is_refused(schema: defs.OpSchema, attribute: str) -> None:
    rule = find_rule(schema.domain, schema.name, schema.since_version)
    assert rule is not None
    value = VALUES[schema.attributes[attribute].type.value]
    node = helper.make_node(schema.name, ["x0"], ["y0"], name="n", **{attribute: value})
    if attribute not in rule.attributes:
        refused(node, schema.since_version, attribute)


@pytest.mark.parametrize("op", sorted(o for d, o in RULES if not d and o not in ("If", "Loop", "Scan", "Constant")))
def test_an_attribute_that_no_version_has_is_refused(op: str) -> None:
    refused(helper.make_node(op, ["x0"], ["y0"], name="n", unheard_of=1), defs.onnx_opset_version(), "unheard_of")


def refused(node: NodeProto, opset: int, attribute: str) -> None:
    model = one_node(node.op_type, [np.zeros((2, 2), np.float32)], {}, 1, opset)
    del model.graph.node[:]
    model.graph.node.append(node)
    with pytest.raises(CaptureError, match=f"attribute '{attribute}' is not known"):
        run(model, torch.zeros(2, 2))
