"""The file that lets stock transformers load an artifact.

transformers runs what ``auto_map`` in a folder's config.json names, when its user allows that
(``trust_remote_code=True``). The file is put together from our own modules. ``supra`` itself never
runs it.
"""

from __future__ import annotations

from functools import cache

from supra_core.artifact.modules import joined

NAME = "modeling_supra.py"
AUTO_MAP = {
    "AutoConfig": "modeling_supra.SupraConfig",
    "AutoModel": "modeling_supra.SupraModel",
    "AutoModelForCausalLM": "modeling_supra.SupraForCausalLM",
}
_ROOT = "supra_torch.hf.stock"
_STAND_INS = {"supra_torch.ops.kernels": "supra_torch.hf.no_kernels"}
_HEAD = '''"""A supra model for transformers; it needs nothing but torch, numpy and transformers::

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Written by supra from its own modules (Apache-2.0); to change it, change those.
"""

from __future__ import annotations

# Operators have the module's own name, since other versions of them may be in the same process.
_OPERATORS = __name__.replace(".", "_")
'''


@cache
def text() -> str:
    """The file's content; the same for every model, which config.json describes."""
    return joined(_HEAD, _ROOT, _STAND_INS).replace('"supra::', '_OPERATORS + "::')
