"""The exceptions a user sees, and how a refusal becomes one: the broker's, and ours by the wire's own checks.

    IdemqError
    ├── RetriableError        certainly not stored, nothing wrong with the request
    │   ├── ConnectionLost
    │   ├── BrokerBusy
    │   ├── StoreFull
    │   └── QuotaExceeded
    ├── OutcomeUnknown        (also TimeoutError) the client is still finding out: do not send it again
    ├── TransactionAborted    nothing stored, go on with the next batch
    │   ├── LeaseLost
    │   └── OffsetConflict
    ├── ProducerFenced        another holder opened this name: stop
    └── FatalError            sending it again changes nothing
        ├── AuthError, PermissionDenied, InvalidRequest, ProtocolMismatch, Unsupported, ClientClosed
        ├── UnknownTopic, UnknownGroup, UnknownProducer, TopicExists
        ├── MessageTooLarge, TransactionTooLarge
        ├── SequenceGap, SequenceConflict, ChecksumMismatch, StoreReplaced
        └── OffsetTruncated, CircuitOpen, HandlerTimeout

Each has `.code` (stable text), `.remedy` (one sentence: what to do next) and `.details` (for programs). Pure.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from .wire import REMEDIES, Code, Failed, check

Details = Mapping[str, int | str | None]


class IdemqError(Exception):
    """Anything idemq raises on purpose."""

    code = "ERROR"
    remedy = ""

    def __init__(
        self, text: str = "", *, code: str | None = None, details: Details | None = None, remedy: str | None = None
    ) -> None:
        self.text = text
        self.code = code or type(self).code
        self.details: dict[str, int | str | None] = dict(details or {})
        if remedy is None:
            general = REMEDIES[Code(self.code)].remedy if self.code in Code.__members__ else type(self).remedy
            # What this very class says of errors that the client finds comes first, and its family's word last.
            remedy = str(vars(type(self)).get("remedy", general))
        self.remedy = remedy
        super().__init__(text)

    def __str__(self) -> str:
        said = f"{self.code}: {self.text}".rstrip(": ")
        if not self.remedy:
            return said
        return f"{said} {self.remedy}" if said.endswith((".", "!", "?")) else f"{said}. {self.remedy}"


class RetriableError(IdemqError):
    """Certainly not stored, and nothing was wrong with the request."""

    code = "NOT_STORED"
    remedy = "Send it again."


class ConnectionLost(RetriableError):
    """The broker cannot be reached."""

    code = "CONNECTION_LOST"
    remedy = "Check that the broker runs and that the URL names it (idemq ping)."


class BrokerBusy(RetriableError):
    """The broker is overloaded."""

    code = "BUSY"


class StoreFull(RetriableError):
    """The broker has no room for appends."""

    code = "STORE_FULL"


class QuotaExceeded(RetriableError):
    """A limit on how many things there may be."""

    code = "QUOTA_EXCEEDED"


class OutcomeUnknown(IdemqError, TimeoutError):
    """The wait ended before the answer came. The message keeps its number and place and is still being delivered.

    `seq` is its number; `await error.outcome(timeout)` waits on: it returns what the call would have returned, or
    raises what it would have raised.
    """

    code = "OUTCOME_UNKNOWN"
    remedy = "Do not send it again; `await error.outcome()` or open the producer again and look at last_seq."

    def __init__(self, text: str = "", *, seq: int | None = None, code: str | None = None) -> None:
        super().__init__(text, code=code, remedy=type(self).remedy)
        self.seq = seq
        self.pending: Any = None
        """Where the session will put the outcome, for its shell, which makes `await_outcome` of it."""
        self.await_outcome: Callable[[float | None], Awaitable[Any]] | None = None
        """Set by the client while it still finds out; None when the producer has ended and nobody will."""

    async def outcome(self, timeout: float | None = None) -> Any:
        """Wait for the answer (`timeout` seconds, the client's default when None).

        Returns what the call would have returned; raises its error when it was refused, or OutcomeUnknown again.
        """
        if self.await_outcome is None:
            raise self
        return await self.await_outcome(timeout)


class TransactionAborted(IdemqError):
    """Nothing was stored; go on with the next batch."""

    code = "TRANSACTION_ABORTED"
    remedy = "Nothing was stored: run the block again."


class LeaseLost(TransactionAborted):
    """The partition is another member's now. `partitions`: [(topic id, partition)]."""

    code = "LEASE_LOST"

    @property
    def partitions(self) -> list[tuple[int, int]]:
        """Where the lease was lost: [(topic id, partition)]."""
        topic_id, partition = self.details.get("topic_id"), self.details.get("partition")
        return [(topic_id, partition)] if isinstance(topic_id, int) and isinstance(partition, int) else []


class OffsetConflict(TransactionAborted):
    """The group's position had already moved. `expected`: where it is."""

    code = "OFFSET_CONFLICT"

    @property
    def expected(self) -> int | None:
        """The position that is stored."""
        value = self.details.get("next")
        return value if isinstance(value, int) else None


class ProducerFenced(IdemqError):
    """Another holder opened this producer's name; the text says who, from where and when."""

    code = "PRODUCER_FENCED"


class FatalError(IdemqError):
    """Sending it again changes nothing."""

    code = "FATAL"
    remedy = "Use a newer client: it does not know what its broker refused."


class AuthError(FatalError):
    """The broker's token is missing or wrong."""

    code = "AUTH_FAILED"


class PermissionDenied(FatalError):
    """The token does not allow this."""

    code = "PERMISSION_DENIED"
    remedy = "Use a token that allows it."


class InvalidRequest(FatalError):
    """The call's arguments are wrong, or contradict what was done before."""

    code = "BAD_REQUEST"
    remedy = "Correct the call."


class UnknownTopic(FatalError):
    """There is no such topic."""

    code = "UNKNOWN_TOPIC"


class UnknownGroup(FatalError):
    """There is no such group."""

    code = "UNKNOWN_GROUP"
    remedy = "Check the group's name (idemq group ls)."


class UnknownProducer(FatalError):
    """There is no such producer, or no longer: then what it had in flight is unknown."""

    code = "UNKNOWN_PRODUCER"
    remedy = "See the names: idemq producer ls."


class TopicExists(FatalError):
    """The topic is there, perhaps with other settings, which the text names."""

    code = "TOPIC_EXISTS"


class MessageTooLarge(FatalError):
    """The message is larger than the limit that the text names."""

    code = "TOO_LARGE"
    remedy = "Split it, or store it elsewhere and send where: no setting changes the limit."


class TransactionTooLarge(FatalError):
    """The transaction is larger than the limit that the text names."""

    code = "TRANSACTION_TOO_LARGE"
    remedy = "Split it: nothing was stored."


class SequenceGap(FatalError):
    """A number before this one is missing in the broker."""

    code = "SEQUENCE_GAP"


class SequenceConflict(FatalError):
    """Other content is stored under this number."""

    code = "SEQUENCE_CONFLICT"


class ChecksumMismatch(FatalError):
    """Stored or received bytes do not match their checksum."""

    code = "STORE_DAMAGED"


class OffsetTruncated(FatalError):
    """Retention removed messages before they were read. `missed`: how many."""

    code = "OFFSET_TRUNCATED"

    @property
    def missed(self) -> int:
        """How many offsets are gone."""
        value = self.details.get("missed")
        return value if isinstance(value, int) else 0


class ProtocolMismatch(FatalError):
    """Client and broker speak different protocol versions, or the other side is no idemq broker."""

    code = "PROTOCOL_MISMATCH"


class StoreReplaced(FatalError):
    """The broker runs on another store than before: restored from a copy, or new."""

    code = "STORE_REPLACED"


class CircuitOpen(FatalError):
    """Too many failures in a row: processing stopped."""

    code = "CIRCUIT_OPEN"
    remedy = "Mend what the handler depends on, then start again."


class HandlerTimeout(FatalError):
    """A handler took too long. Raised by `run` and `process` when its thread, which cannot be stopped, still works on
    the message: this member has left the group."""

    code = "HANDLER_TIMEOUT"
    remedy = "Raise handler_timeout, or mend the handler; end this process, so that the thread ends, too."


class Unsupported(FatalError):
    """This version, or this engine, does not offer that."""

    code = "UNSUPPORTED"


class ClientClosed(FatalError):
    """The client, producer or subscription was closed."""

    code = "CLIENT_CLOSED"
    remedy = "Connect again."


_BY_CODE: dict[str, type[IdemqError]] = {
    Code.BAD_REQUEST: InvalidRequest,
    Code.PROTOCOL_MISMATCH: ProtocolMismatch,
    Code.AUTH_FAILED: AuthError,
    Code.UNKNOWN_PRODUCER: UnknownProducer,
    Code.PRODUCER_FENCED: ProducerFenced,
    Code.STORE_REPLACED: StoreReplaced,
    Code.STALE_CONNECTION: RetriableError,
    Code.SEQUENCE_CONFLICT: SequenceConflict,
    Code.SEQUENCE_GAP: SequenceGap,
    Code.LEASE_LOST: LeaseLost,
    Code.OFFSET_CONFLICT: OffsetConflict,
    Code.UNKNOWN_TOPIC: UnknownTopic,
    Code.TOPIC_EXISTS: TopicExists,
    Code.TOO_LARGE: MessageTooLarge,
    Code.CHECKSUM_MISMATCH: ChecksumMismatch,
    Code.STORE_DAMAGED: ChecksumMismatch,
    Code.OFFSET_TRUNCATED: OffsetTruncated,
    Code.STORE_FULL: StoreFull,
    Code.BUSY: BrokerBusy,
    Code.QUOTA_EXCEEDED: QuotaExceeded,
    Code.OPEN_RACE: ProducerFenced,
    Code.UNSUPPORTED: Unsupported,
}
assert _BY_CODE.keys() == set(Code), "every code has its exception"


def from_refusal(failed: Failed) -> IdemqError:
    """The exception of a broker's refusal. A code that this version does not know is a FatalError that names it."""
    known = _BY_CODE.get(failed.code, FatalError)
    remedy = REMEDIES[Code(failed.code)].remedy if failed.code in Code.__members__ else None
    return known(failed.text, code=failed.code, details=failed.details, remedy=remedy)


def checked(request: Any, about: str = "") -> Any:
    """The request, unless the broker would refuse what stands in it: then InvalidRequest, `about` in front of why."""
    try:
        check(request)
    except ValueError as error:
        raise InvalidRequest(f"{about}{error}") from None
    return request
