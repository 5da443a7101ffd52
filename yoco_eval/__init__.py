"""yoco-eval: long-context evaluation of YOCO language models with lm-evaluation-harness.

Importing it makes its backend and tasks known to lm-eval, and imports nothing else.
"""

from yoco_eval import registration

__version__ = "0.1.0"

registration.install()
