"""Where a text ends by a folder's ``generation_config.json``, as it is read and as it is written.

Many a chat model's config.json states the end of a document alone, and the end of a turn stands in
this file, where the ``generate`` of transformers and mlx-lm looks first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from supra_core.families.shared.fields import Fields
from supra_core.formats.inside import has_file
from supra_core.formats.jsonfile import parse, read_object
from supra_core.model.spec import ModelSpec

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


def with_ends(assets: Mapping[str, bytes], spec: ModelSpec) -> dict[str, bytes]:
    """A folder's files, of which this one names every token that ends a text or turn.

    The ``generate`` of other programs stops at what it says, and nowhere else. Where it says so
    already, or nothing is known, it stays as it is.
    """
    files, ends = dict(assets), list(spec.eos_token_id)
    before = parse(files[NAME]) if NAME in files else {}
    stated = before.get("eos_token_id")
    known = stated if isinstance(stated, list) else [] if stated is None else [stated]
    # A single one without this file is read from config.json.
    if set(ends) <= set(known) or (len(ends) == 1 and NAME not in files):
        return files
    files[NAME] = (json.dumps({**before, "eos_token_id": ends}, indent=2) + "\n").encode()
    return files
