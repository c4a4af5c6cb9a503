"""The protocol's interface: as others publish it, beside tritonclient, and generated from the proto that is here."""

import subprocess
import sys
from pathlib import Path

import pytest

from router import oip


def fields(message: object) -> set[tuple[object, ...]]:
    """Name, number, type and kind of a message's fields, and of the messages inside it."""
    found = set()
    for one in message.fields:  # type: ignore[attr-defined]
        found.add((message.name, one.name, one.number, one.type, one.is_repeated))  # type: ignore[attr-defined]
    for inner in message.nested_types:  # type: ignore[attr-defined]
        found |= fields(inner)
    return found


def test_every_message_is_as_tritonclient_knows_it() -> None:
    service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
    theirs = service_pb2.DESCRIPTOR
    ours = oip.messages.DESCRIPTOR
    assert ours.package == theirs.package
    assert len(ours.message_types_by_name) >= 13
    for name, message in ours.message_types_by_name.items():
        assert fields(message) == fields(theirs.message_types_by_name[name]), name
    for name, request, reply in oip.methods():
        method = theirs.services_by_name["GRPCInferenceService"].methods_by_name[name]
        assert (request.DESCRIPTOR.full_name, reply.DESCRIPTOR.full_name) == (
            method.input_type.full_name,
            method.output_type.full_name,
        )


@pytest.mark.parametrize("order", ["router.oip, tritonclient.grpc", "tritonclient.grpc, router.oip"])
def test_lives_beside_tritonclient_in_one_process(order: str) -> None:
    pytest.importorskip("tritonclient.grpc")
    code = (
        f"import {order}\nfrom google.protobuf import descriptor_pool\nfrom tritonclient.grpc import service_pb2\n"
        "assert router.oip.messages.ModelInferRequest is not service_pb2.ModelInferRequest\n"
        "assert router.oip.POOL is not descriptor_pool.Default()\n"
        "raw = service_pb2.ModelInferRequest(model_name='ctr', id='7').SerializeToString()\n"
        "assert router.oip.messages.ModelInferRequest.FromString(raw).id == '7'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_the_generated_code_is_of_the_proto_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    from router.oip.generate import PROTO, ROOT, generate

    generate(tmp_path)
    name = PROTO.replace(".proto", "_pb2.py")
    assert (tmp_path / name).read_text() == (ROOT / name).read_text(), "run python -m router.oip.generate"


def test_the_licence_header_stays() -> None:
    folder = Path(oip.__file__).parent
    head = (folder / "open_inference_grpc.proto").read_text()[:600]
    assert "Copyright 2023 The KServe Authors" in head
    assert "Apache License, Version 2.0" in head
