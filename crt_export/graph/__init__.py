"""PyTorch model -> ONNX graphs: wrappers, exporter, passes, contract check, shared weight files."""

from crt_export.graph.contract import check_contract
from crt_export.graph.export import GraphExporter, export_graph, parts_of_graphs
from crt_export.graph.weights import WeightFile, save_graph, write_graph, write_weights

__all__ = [
    "GraphExporter",
    "WeightFile",
    "check_contract",
    "export_graph",
    "parts_of_graphs",
    "save_graph",
    "write_graph",
    "write_weights",
]
