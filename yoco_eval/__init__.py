"""yoco-eval: long-context evaluation of YOCO language models with lm-evaluation-harness."""

__version__ = "0.1.0"
