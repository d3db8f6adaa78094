"""What leaves the framework: files that other software loads."""

from callbacks.deploy.clip import CLIPExport
from callbacks.deploy.onnx import ONNXExport

__all__ = ["CLIPExport", "ONNXExport"]
