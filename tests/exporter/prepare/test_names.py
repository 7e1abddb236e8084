from __future__ import annotations

import onnx_ir as ir

from exporter.prepare import names
from tests.exporter import graphs


def test_every_node_gets_a_name_of_its_own_and_keeps_the_one_it_has() -> None:
    model = graphs.model(
        """(float[N,4] x) => (float[N,4] y) {
            [same] a = Relu(x)
            [same] b = Tanh(a)
            c = Abs(b)
            [c] d = Neg(c)
            y = Relu(d)
        }"""
    )
    assert names.rewrite(model) == 1
    found = [node.name for node in model.graph]
    assert found[0] == "same" and len(set(found)) == 5 and all(found)
    assert names.rewrite(model) == 0


def test_traces_of_the_machine_that_exported_are_taken_out() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { [r] y = Relu(x) }")
    node = model.graph[0]
    node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/someone/model.py", line 7'
    node.doc_string = "/home/someone"
    model.graph.doc_string = "/home/someone"
    model.producer_name, model.producer_version = "pytorch", "2.13.0"
    names.rewrite(model)
    content = ir.serde.serialize_model(model).SerializeToString()
    assert b"someone" not in content and b"pytorch" not in content
    assert model.producer_name == "packlight"
