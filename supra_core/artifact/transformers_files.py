"""The files that let stock transformers load an artifact.

transformers runs what ``auto_map`` in a folder's config.json names, when its user allows that
(``trust_remote_code=True``). Unlike mlx-lm's, these files are written for that purpose and copied
as they are. ``supra`` itself never runs them.
"""

from __future__ import annotations

from functools import cache

from supra_core.artifact.joined import installed_folder

CONFIGURATION, MODELING = "configuration_supra.py", "modeling_supra.py"
AUTO_MAP = {
    "AutoConfig": "configuration_supra.SupraConfig",
    "AutoModel": "modeling_supra.SupraModel",
    "AutoModelForCausalLM": "modeling_supra.SupraForCausalLM",
}


@cache
def texts() -> dict[str, str]:
    """File name -> content; the same for every model, which config.json describes."""
    folder = installed_folder("supra_torch") / "hf"
    return {name: (folder / name).read_text("utf-8") for name in (CONFIGURATION, MODELING)}
