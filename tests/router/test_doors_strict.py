"""Bad requests on the real pipeline, over JSON, binary extension and gRPC: one sentence names what is wrong."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("requests")

from tests.router.doors_real import GOOD, Doors, Input, http_body, opened

USER, WORDS, PRICE = GOOD
WAYS = ("json", "binary", "grpc")


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    with opened(tmp_path_factory.mktemp("models")) as found:
        yield found


def refused(doors: Doors, answer: tuple[int | str, str], says: str) -> None:
    logged, (status, message) = doors.logged.take(), answer
    assert not logged
    assert status in (400, "INVALID_ARGUMENT"), answer
    assert says in message
    assert "\n" not in message
    assert len(message) <= 500


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "the request has no inputs"),
        ([USER, ("", "BYTES", [2], ["a", "b"]), PRICE], "input 2 of the request has no name"),
        ([USER, WORDS], "input 'price' is missing; the model takes user, words, price"),
        ([*GOOD, ("extra", "INT64", [2], [1, 2])], "input 'extra' is unknown to the model"),
        ([*GOOD, USER], "input 'user' is given twice"),
        ([USER, ("words", "BYTES", [3], ["a", "b", "c"]), PRICE], "'words' has 3 rows where the first input has 2"),
        ([(name, kind, [0], []) for name, kind, _, _ in GOOD], "the request has 0 rows"),
        ([("user", "INT64", [3], [1, 2]), WORDS, PRICE], "its shape [3]"),
        ([("user", "INT64", [1], [1, 2]), WORDS, PRICE], "its shape [1]"),
        ([USER, ("words", "BYTES", [3], ["a", "b"]), PRICE], "input 'words' has"),
        ([USER, ("words", "BYTES", [1], ["a", "b"]), PRICE], "input 'words' has"),
        ([("user", "INT64", [-2], [1, 2]), WORDS, PRICE], "input 'user' has shape [-2]"),
        ([USER, WORDS, ("price", "FP32", [-1, -2], [1.0, 2.0])], "input 'price' has shape [-1, -2]"),
        ([("user", "INT64", [], [1, 2]), WORDS, PRICE], "input 'user' has shape []; an INT64 input has"),
        ([("user", "INT64", [1, 2], [1, 2]), WORDS, PRICE], "input 'user' has shape [1, 2]; an INT64 input has"),
        ([USER, WORDS, ("price", "FP32", [1, 2], [1.0, 2.0])], "input 'price' has 1 rows where the first input has 2"),
        ([USER, WORDS, ("price", "FP32", [2, 2], [1.0] * 4)], "input 'price' has shape [2, 2]; it must be [2, 1]"),
        ([("user", "INT64", [2**62], [1, 2]), WORDS, PRICE], "'user' has shape [4611686018427387904]; 4000 values"),
        ([USER, WORDS, ("price", "FP32", [0, 2**62], [])], "'price' has shape [0, 4611686018427387904]; 4000 values"),
        ([("user", "INT64", [1001], [1] * 1001), WORDS, PRICE], "input 'user' has 1001 rows; 1000 are"),
        ([("user", "INT32", [2], [1, 2]), WORDS, PRICE], "input 'user' has datatype 'INT32'; it must be one of"),
        ([("user", "", [2], [1, 2]), WORDS, PRICE], "input 'user' has datatype none"),
        ([("user", "FP32", [2], [1.0, 2.0]), WORDS, PRICE], "input 'user' has datatype FP32; it must be INT64"),
        ([USER, WORDS, ("price", "FP32", [2], [1.0, float("inf")])], "input 'price' is infinite in row 1"),
        ([*GOOD, ("user.offsets", "INT64", [3], [0, 1, 2])], "input 'user' has one value a row; it takes no offsets"),
        ([*GOOD, ("user.offsets", "INT64", [2], [0, 3])], "input 'user'"),
        ([*GOOD, ("none.offsets", "INT64", [1], [0])], "input 'none' is missing"),
        ([*GOOD, *((f"i{i}", "INT64", [2], [1, 2]) for i in range(14))], "more than 16 inputs"),
        ([*GOOD, ("x" * 30_000, "INT64", [2], [1, 2])], "input 'xxx"),
        ([("\U0001f600" * 3_000, "INT64", [-2], [])], "'\U0001f600"),
    ],
)
def test_a_wrong_input_is_named(doors: Doors, way: str, inputs: list[Input], says: str) -> None:
    refused(doors, doors.ask(way, inputs), says)
    assert doors.ask(way, GOOD) == ("OK" if way == "grpc" else 200, "")


@pytest.mark.parametrize("way", WAYS)
def test_an_output_is_asked_for_once(doors: Doors, way: str) -> None:
    refused(doors, doors.ask(way, GOOD, outputs=2), "output 'scores' is asked for twice")
    assert doors.ask(way, GOOD, outputs=1) == ("OK" if way == "grpc" else 200, "")


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    ("which", "data", "says"),
    [
        (0, [1, None], "input 'user' holds None; INT64 takes whole numbers"),
        (0, [None, None], "input 'user' holds None"),
        (1, ["a", None], "input 'words' holds None; a BYTES input holds strings"),
        (2, [1.5, None], "input 'price' holds None; FP32 takes numbers"),
        (0, None, "'data' of input 'user' is None; it must be a list"),
        (0, {"0": 1}, "'data' of input 'user' is {'0': 1}; it must be a list"),
        (0, [1, 2**63], "input 'user' holds a number beyond the range of INT64"),
        (0, [1, -(10**4000)], "input 'user' holds a number beyond the range of INT64"),
        (2, [1, 10**400], "input 'price' holds a number beyond the range of FP32"),
        (2, [1, 1e300], "input 'price' is infinite in row 1"),
        (0, [1, 2.0], "input 'user' holds 2.0"),
        (0, [1, True], "input 'user' holds True"),
        (0, [1, "2"], "input 'user' holds '2'"),
        (0, [1, "x" * 100_000], "input 'user' holds 'xxx"),
        (1, ["a", 10**4000], "input 'words' holds 1000"),
        (0, [1, [2]], "input 'user' has nested data that its shape [2] does not have"),
        (0, [[1], [2]], "input 'user' has nested data that its shape [2] does not have"),
        (0, [[[1]], [[2]]], "input 'user' has nested data"),
        (0, [1, {"a": 1}], "input 'user' holds {'a': 1}"),
        (0, nested(600), "input 'user' has nested data"),
    ],
)
def test_wrong_json_data_is_shown(doors: Doors, which: int, data: Any, says: str) -> None:
    inputs = list(GOOD)
    inputs[which] = (*GOOD[which][:3], data)
    refused(doors, doors.ask("json", inputs), says)


def test_nested_data_is_that_of_the_shape(doors: Doors) -> None:
    def ask(data: list[Any]) -> tuple[int | str, str]:
        return doors.ask("json", [("user", "INT64", [2, 1], data), WORDS, PRICE])

    assert ask([[1], [2]]) == ask([1, 2]) == (200, "")
    for data in ([[1, 2], []], [[1, 2]], [[1], 2], [[1], [2], []]):
        refused(doors, ask(data), "input 'user' has nested data that its shape [2, 1] does not have")


def changed(**changes: Any) -> bytes:
    return json.dumps({**json.loads(http_body(GOOD)[0]), **changes}).encode()


def first_input(**changes: Any) -> bytes:
    request = json.loads(http_body(GOOD)[0])
    request["inputs"][0].update(changes)
    return json.dumps(request).encode()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (changed(outputs=[{"name": "scores", "parameters": {"binary_data": "yes"}}]), "'binary_data' of an output"),
        (changed(outputs=[{"name": "scores", "parameters": {"binary_data": 1}}]), "is 1; it must be true or false"),
        (changed(parameters={"binary_data_output": None}), "is None; it must be true or false"),
        (changed(outputs=[{}]), "output '' is unknown; the model gives 'scores'"),
        (changed(outputs=None), "'outputs' of the request is None; it must be a list"),
        (changed(inputs=None), "'inputs' of the request is None; it must be a list"),
        (changed(inputs=[None]), "an input is None; it must be an object"),
        (changed(id=5), "'id' of the request is 5; it must be a string"),
        (changed(parameters={"timeout": -1}), "'timeout' is -1"),
        (first_input(parameters={"binary_data_size": 0}), "input 'user' has data beside binary_data_size"),
        (first_input(parameters={"binary_data_size": 10**4000}), "input 'user' has binary_data_size 1000"),
        (first_input(shape=None), "'shape' of input 'user' is None; it must be a list"),
        (first_input(shape=[None]), "input 'user' has shape [None]; it must be a list of whole numbers"),
        (first_input(shape=[10**3000, 10**3000], datatype="FP32"), "4000 values are the most"),
        (first_input(shape=["2"] * 1000), "input 'user' has shape ['2', '2', '2', '2', '2', '2', ...]"),
        (first_input(name=None), "'name' of an input is None; it must be a string"),
        (first_input(name=nested(900)), "it must be a string"),
        (b'{"inputs": [' + b"1" * 5000 + b"]}", "the request's JSON cannot be read"),
    ],
)
def test_a_wrong_field_is_shown(doors: Doors, body: bytes, says: str) -> None:
    refused(doors, doors.http(body), says)


def test_what_is_no_message_is_the_callers_fault(doors: Doors) -> None:
    for sent in (b"\xff", b"\x0a\x05ctr", b"\x0a\x02\xff\xfe"):
        refused(doors, doors.grpc(sent), "the request is no ModelInferRequest")
