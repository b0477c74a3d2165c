"""The tokens that end a text by a folder's ``generation_config.json``, read and written.

The config.json of many chat models states only the end of a document; the end of a turn is in this
file, which the ``generate`` of transformers and mlx-lm reads first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from supra_core.families.shared.fields import Fields
from supra_core.formats.inside import has_file
from supra_core.formats.jsonfile import json_bytes, parse, read_object
from supra_core.model.spec import ModelSpec

NAME = "generation_config.json"


def further_ends(folder: Path, spec: ModelSpec) -> tuple[int, ...]:
    """The ids that end a text by the folder's file, without those that ``spec`` has already.

    Ids beyond the vocabulary are omitted: no model samples them. FormatError when the file is not
    a JSON object, SpecError when its ``eos_token_id`` is neither an id nor a list of ids.
    """
    if not has_file(folder, NAME):
        return ()
    fields = Fields(read_object(folder / NAME), str(folder / NAME))
    stated = dict.fromkeys(fields.tokens("eos_token_id"))
    return tuple(
        token for token in stated if token < spec.vocab_size and token not in spec.eos_token_id
    )


def with_ends(assets: Mapping[str, bytes], spec: ModelSpec) -> dict[str, bytes]:
    """A folder's files, in which this one names every token that ends a text or turn.

    The ``generate`` of other programs stops at these alone. The file stays as it is if it names
    them already, or if none are known.
    """
    files, ends = dict(assets), list(spec.eos_token_id)
    before = parse(files[NAME]) if NAME in files else {}
    stated = before.get("eos_token_id")
    known = stated if isinstance(stated, list) else [] if stated is None else [stated]
    # Without this file, a single end is read from config.json.
    if set(ends) <= set(known) or (len(ends) == 1 and NAME not in files):
        return files
    files[NAME] = json_bytes({**before, "eos_token_id": ends})
    return files
