"""The file that lets stock mlx-lm build the model of an artifact.

mlx-lm runs the ``model_file`` that a folder's config.json names, when its user allows that. It is
the MLX backend's own model, joined into one file. ``supra`` itself never runs it.
"""

from __future__ import annotations

from functools import cache

from supra_core.artifact.joined import joined, modules_of

NAME = "supra_model.py"
_HEAD = '''"""The model of this folder, for mlx-lm: mlx_lm.generate --model . --trust-remote-code

Written by supra from its own modules (Apache-2.0); to change it, change those.
"""

from __future__ import annotations

import os
import sys

# An M5 would multiply float32 as TF32; MLX reads this at its first product and never again.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# mlx-lm runs this file without entering it among the modules, where dataclasses look for types.
_module = type("Module", (), {})()
_module.__dict__ = globals()
sys.modules[__name__] = _module
'''


@cache
def text() -> str:
    """The file's content; the same for every model, which config.json describes."""
    return joined(_HEAD, modules_of("supra_mlx.model"))
