"""What leaves the framework: files that other software loads."""

from callbacks.deploy.onnx import ONNXExport

__all__ = ["ONNXExport"]
