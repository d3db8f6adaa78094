"""A local page on which a person tries a promptable segmenter."""

from callbacks.deploy.demo.server import Demo, application, serve

__all__ = ["Demo", "application", "serve"]
