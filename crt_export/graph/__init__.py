"""PyTorch model -> ONNX graphs: wrappers, exporter, passes, contract check, shared weight files."""
