"""The id of a model on the hub: ``org/name``, or ``org/name@revision``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from supra_core.errors import SupraError

# The hub allows at most 96 characters.
_PART = r"[A-Za-z0-9]([\w.-]{0,94}\w)?"
_NAME = re.compile(f"{_PART}/{_PART}", re.ASCII)
_LEVEL = r"[A-Za-z0-9][\w.-]*"
# A branch, a tag, a commit or refs/pr/N, as git names them.
_REVISION = re.compile(rf"{_LEVEL}(/{_LEVEL})*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubId:
    """A model's repository and a branch, tag or commit of it; None: the newest state."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, so that the model never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def at(self, revision: str | None) -> HubId:
        """The same repository at ``revision``; SupraError if the id states another one."""
        if revision is None:
            return self
        if not _is_revision(revision):
            raise SupraError(f"'{revision}' is not a revision: name a branch, a tag or a commit")
        if self.revision not in (None, revision):
            raise SupraError(f"{self} states another revision than {revision}: omit one of them")
        return replace(self, revision=revision)


def hub_id(text: str) -> HubId | None:
    """``text`` as an id; None if it is not one, such as the path of a config."""
    name, at, revision = text.partition("@")
    wrong = ".." in text or "--" in name or name.endswith((".json", ".git"))
    if wrong or not _NAME.fullmatch(name) or (at and not _is_revision(revision)):
        return None
    return HubId(name, revision or None)


def _is_revision(text: str) -> bool:
    return _REVISION.fullmatch(text) is not None and ".." not in text
