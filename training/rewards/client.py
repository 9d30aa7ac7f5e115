"""A reward behind `nextstate rewards serve`, asked as if it were here."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from model.errors import UserError
from training.rewards.base import Answer, fault_of
from training.rewards.calls import CallError, CallPolicy, json_reply, new_client, tried
from training.rewards.wire import encoded

if TYPE_CHECKING:
    import httpx

REPLY_SHARE = 0.9  # of a try's time that the service may take, so that what it knows by then still arrives


@dataclass(frozen=True)
class ServiceAddress:
    """Where a service listens, and the token that opens it."""

    url: str
    token: str = ""

    @classmethod
    def read(cls, place: str) -> ServiceAddress:
        """`place`: a URL, or the file that a service writes (`address=FILE`). Raises `CallError` while there is none."""
        if place.startswith(("http://", "https://")):
            return cls(place.rstrip("/"))
        try:
            content = json.loads(Path(place).read_text(encoding="utf-8"))
            return cls(str(content["url"]).rstrip("/"), str(content["token"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CallError(f"no address file: {type(error).__name__}", answered=False) from error


@dataclass
class RemoteReward:
    """The reward `reward` of a service at `address` (a URL, or the file that the service writes).

    It never hangs: each request has a deadline over all its tries. What cannot be had is missing, never 0, and counted
    in `faults`. The address file is read again at every try, so a service that died may return on another port. The
    version is that of the first contact; scores of another version are not taken.
    """

    reward: str
    address: str
    token_file: str | None = None  # with a URL
    batch_size: int = 8  # answers in a request
    start_seconds: float = 60.0  # how long the service may take to be there at first
    limits: dict[str, Any] = field(default_factory=dict)  # of `CallPolicy`
    name: ClassVar[str] = "remote"

    def __post_init__(self) -> None:
        self.policy = CallPolicy(**self.limits)
        self.faults: Counter[str] = Counter()  # of tries, since the start: most were mended by the next one
        self.version = asyncio.run(self._first_contact())

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return asyncio.run(self._score([encoded(answer) for answer in answers]))

    async def _score(self, records: list[dict[str, Any]]) -> list[float | None]:
        found: dict[str, float] = {}
        places = asyncio.Semaphore(self.policy.parallel)
        async with new_client(self.policy) as client:
            batches = [records[first : first + self.batch_size] for first in range(0, len(records), self.batch_size)]
            await asyncio.gather(*(self._score_batch(client, places, batch, found) for batch in batches))
        return [found.get(record["id"]) for record in records]

    async def _score_batch(
        self, client: httpx.AsyncClient, places: asyncio.Semaphore, batch: list[dict[str, Any]], found: dict[str, float]
    ) -> None:
        """Until every answer of the batch has a score; a further try asks for those that have none."""

        async def once(seconds: float) -> None:
            missing = [record for record in batch if record["id"] not in found]
            body = {"reward": self.reward, "deadline_seconds": REPLY_SHARE * seconds, "answers": missing}
            found.update(self._believed(await self._ask(client, "/score", body), {record["id"] for record in missing}))
            if any(record["id"] not in found for record in missing):
                raise CallError("partial reply")

        async with places:
            await tried(self.policy, once, self.faults)

    async def _ask(self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        address = ServiceAddress.read(self.address)
        token = Path(self.token_file).read_text(encoding="utf-8").strip() if self.token_file else address.token
        return await json_reply(
            client, address.url + path, token=token, max_bytes=self.policy.max_reply_bytes, body=body
        )

    def _believed(self, reply: Mapping[str, Any], asked: set[str]) -> dict[str, float]:
        """What of a reply can be taken: finite scores of answers that were asked about, by the version that we know."""
        if reply.get("version") != self.version:
            raise CallError(f"version {reply.get('version')!r} instead of {self.version!r}", again=False)
        scores = reply.get("scores")
        if not isinstance(scores, list):
            raise CallError("reply without scores")
        believed = {}
        for one in scores:
            known = isinstance(one, dict) and one.get("id") in asked
            fault = fault_of(one.get("score")) if known else "score of another answer"
            if fault:
                self.faults[fault] += 1
            else:
                believed[one["id"]] = float(one["score"])
        return believed

    async def _first_contact(self) -> str:
        """The version of the reward there. Raises `UserError` when nobody answers, or the reward is not served."""
        faults: Counter[str] = Counter()
        served: dict[str, str] = {}
        patient = CallPolicy(self.start_seconds, min(10.0, self.start_seconds), backoff_seconds=0.05)

        async def once(_: float) -> None:
            rewards = (await self._ask(client, "/rewards", None)).get("rewards")
            if not isinstance(rewards, dict):
                raise CallError("reply without rewards")
            served.update(rewards)

        async with new_client(self.policy) as client:
            answered = await tried(patient, once, faults)
        if not answered or self.reward not in served:
            raise UserError(
                f"the reward service {'does not serve ' + repr(self.reward) if answered else 'does not answer'}",
                where=self.address,
                expected=f"`nextstate rewards serve` with the reward {self.reward!r}",
                got=", ".join(served) if answered else ", ".join(f"{reason} ({n})" for reason, n in faults.items()),
                fix="start it, or correct the address",
            )
        return str(served[self.reward])
