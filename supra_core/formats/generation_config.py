"""What a folder's ``generation_config.json`` says of where a text ends.

Many a chat model's config.json states the end of a document alone, and the end of a turn stands in
this file, where the ``generate`` of transformers and mlx-lm looks first.
"""

from __future__ import annotations

from pathlib import Path

from supra_core.families.fields import Fields
from supra_core.formats.inside import has_file
from supra_core.formats.jsonfile import read_object
from supra_core.spec import ModelSpec

NAME = "generation_config.json"


def further_ends(folder: Path, spec: ModelSpec) -> tuple[int, ...]:
    """The ids that end a text by the folder's file, without those that ``spec`` has already.

    Ids that the vocabulary has no row for are left out: no model says them. Raises FormatError
    when the file is no JSON object, SpecError when its ``eos_token_id`` is no id and no list of
    them.
    """
    if not has_file(folder, NAME):
        return ()
    fields = Fields(read_object(folder / NAME), str(folder / NAME))
    stated = dict.fromkeys(fields.tokens("eos_token_id"))
    return tuple(
        token for token in stated if token < spec.vocab_size and token not in spec.eos_token_id
    )
