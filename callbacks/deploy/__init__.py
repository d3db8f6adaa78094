"""What leaves the framework: files that other software loads."""

from callbacks.deploy.clip import CLIPExport
from callbacks.deploy.onnx import ONNXExport
from callbacks.deploy.runtime import RuntimeTest

__all__ = ["CLIPExport", "ONNXExport", "RuntimeTest"]
