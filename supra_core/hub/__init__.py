"""Models on the Hugging Face hub: what names them, how they come here, and how they go there."""

from __future__ import annotations

from supra_core.hub.downloads import Snapshot, cached_folder, download, download_config
from supra_core.hub.identity import HubId, hub_id
from supra_core.hub.uploads import Upload, check_folder, check_upload, upload

__all__ = [
    "HubId",
    "Snapshot",
    "Upload",
    "cached_folder",
    "check_folder",
    "check_upload",
    "download",
    "download_config",
    "hub_id",
    "upload",
]
