"""DFKD-T3-style data-free distillation of language models by text-to-text transfer (arXiv 2311.01689)."""
