"""A client of the server's routes around any engine, in this process."""

from __future__ import annotations

from typing import Any

from starlette.testclient import TestClient

from supra_cli.serving.app import build
from supra_cli.serving.service import Limits, Service
from supra_core.runtime.engine import Engine
from supra_core.runtime.prefixes import Prefixes
from supra_core.runtime.sampling import Sampling
from supra_core.runtime.scheduler import Scheduler

PLACE = "http://localhost:8080"


class Served:
    """``most``: tokens of an answer; ``settings``: those of the service."""

    def __init__(
        self,
        engine: Engine,
        most: int = 100,
        *,
        prompt_tokens: int = 4000,
        waiting: int = 4,
        compete: bool = False,
        **settings: Any,
    ) -> None:
        prefixes = Prefixes(10**6, lambda tokens: 1)
        self._scheduler = Scheduler(
            lambda: (engine, prefixes), parallel=2, waiting=waiting, compete=compete
        )
        self._scheduler.start()
        limits = Limits(prompt_tokens, most)
        service = Service(self._scheduler, engine, "tiny", 256, limits, Sampling(), **settings)
        self.client = TestClient(build(service), PLACE)

    def post(self, path: str, body: Any, **headers: str) -> Any:
        return self.client.post(path, json=body, headers=headers)

    def close(self) -> None:
        self._scheduler.close()
