"""What a user sees of the library: the names of the contract, typed, documented, and none that comes later."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import idemq
import idemq.client
import idemq.sync

ERRORS = [
    "IdemqError", "RetriableError", "ConnectionLost", "BrokerBusy", "StoreFull", "QuotaExceeded", "OutcomeUnknown",
    "TransactionAborted", "LeaseLost", "OffsetConflict", "ProducerFenced", "FatalError", "AuthError",
    "PermissionDenied", "InvalidRequest", "UnknownTopic", "UnknownGroup", "UnknownProducer", "TopicExists",
    "MessageTooLarge", "TransactionTooLarge", "SequenceGap", "SequenceConflict", "ChecksumMismatch",
    "OffsetTruncated", "ProtocolMismatch", "StoreReplaced", "CircuitOpen", "HandlerTimeout", "Unsupported",
    "ClientClosed",
]  # fmt: skip
VALUES = [
    "Record", "Message", "Receipt", "SendSummary", "TopicInfo", "PartitionInfo", "ProducerInfo", "Batch",
    "GroupInfo", "MemberInfo", "GroupOffset", "RetryPolicy",
]  # fmt: skip
OBJECTS = [
    "Client", "Producer", "Transaction", "Subscription", "connect",
]  # fmt: skip
LATER = [
    "Inbox", "Outbox", "AsyncInbox", "AsyncOutbox",
]  # fmt: skip

FIELDS = {
    "Record": "value key headers partition seq message_id",
    "Receipt": "topic partition offset seq timestamp duplicate",
    "SendSummary": "stored duplicates last_seq",
    "TopicInfo": "name id partitions retention retention_bytes dedup_window cleanup",
    "PartitionInfo": "index earliest next bytes",
    "ProducerInfo": "name id epoch last_seq token holder last_seen",
    "GroupInfo": "name members offsets",
    "MemberInfo": "id client address assigned",
    "GroupOffset": "topic partition next lag attempts metadata",
}
MEMBERS = {
    "Client": "send producer subscribe create_topic delete_topic topics describe_topic groups describe_group "
    "seek_group delete_group producers describe_producer delete_producer ping close",
    "Producer": "name id epoch last_seq token send send_many flush transaction close",
    "Transaction": "send commit_offsets set_token",
    "Subscription": "batches commit run process reject pause resume stop seek assigned lag close",
    "Message": "topic partition offset key value headers timestamp attempt lease uid",
}


def test_the_names_of_the_contract() -> None:
    assert sorted(idemq.client.__all__) == sorted({*ERRORS, *VALUES, *OBJECTS})
    for name in (*ERRORS, *VALUES, *OBJECTS, "sync", "__version__"):
        assert hasattr(idemq, name), name
        assert name in idemq.__all__, "help(idemq) shows it"
    assert "idemq.connect(" in inspect.getdoc(idemq)
    for name in LATER:
        assert not hasattr(idemq, name), f"{name} comes with its issue"


@pytest.mark.parametrize("name", FIELDS)
def test_the_fields_of_a_value(name: str) -> None:
    assert list(getattr(idemq, name)._fields) == FIELDS[name].split()


@pytest.mark.parametrize("module", [idemq, idemq.sync])
@pytest.mark.parametrize("name", MEMBERS)
def test_the_members_of_a_class(module: types.ModuleType, name: str) -> None:
    for member in MEMBERS[name].split():
        assert hasattr(getattr(module, name), member), member


def functions() -> Iterator[Any]:
    for module in (idemq, idemq.sync):
        for name in idemq.client.__all__:
            owner = getattr(module, name)
            if not inspect.isclass(owner):
                yield pytest.param(owner, id=f"{module.__name__}.{name}")
                continue
            for member, value in inspect.getmembers_static(owner):
                if isinstance(value, property):
                    value = value.fget
                elif isinstance(value, (staticmethod, classmethod)):
                    value = value.__func__
                own = inspect.isfunction(value) and value.__module__.startswith("idemq")
                public = not member.startswith("_") or member in ("__init__", "__aenter__", "__aexit__", "__aiter__")
                if own and public and value.__qualname__.startswith(tuple(one.__name__ for one in owner.__mro__)):
                    yield pytest.param(value, id=f"{module.__name__}.{name}.{member}")


@pytest.mark.parametrize("function", list(functions()))
def test_public_functions_are_typed_documented_and_take_no_kwargs(function: Any) -> None:
    signature = inspect.signature(function)
    hints = typing.get_type_hints(inspect.unwrap(function), vars(idemq) | vars(inspect.getmodule(function)))
    for parameter in signature.parameters.values():
        assert parameter.kind is not inspect.Parameter.VAR_KEYWORD, parameter
        assert parameter.name == "self" or parameter.name in hints, parameter
    assert signature.return_annotation is not inspect.Signature.empty
    if not function.__name__.startswith("_"):
        assert inspect.getdoc(function)


@pytest.mark.parametrize("name", [*ERRORS, *VALUES, *OBJECTS])
def test_public_classes_are_documented(name: str) -> None:
    assert inspect.getdoc(getattr(idemq, name))
    assert inspect.getdoc(getattr(idemq.sync, name))
