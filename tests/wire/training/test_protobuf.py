"""The Tinker protobuf dialect: against the official converters, and against broken input."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tinker import Datum, EncodedTextChunk, ForwardBackwardOutput, ModelInput, TensorData
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from fireworks_training._wire.training import protobuf, schema
from fireworks_training._wire.training.compression import compress, decompress
from fireworks_training._wire.training.datums import PassResult
from fireworks_training.errors import (
    InvalidArgument,
    InvalidDatum,
    MissingExtra,
    NotSupported,
    ProtocolError,
)

DESCRIPTOR_SHA256 = "23aa2b4fe4f2aa0d94fd3cec1d3c145a302412b7f54bff606ae31e065f86386c"


def datum(*tokens: int, **inputs: Any) -> Datum:
    return Datum(model_input=ModelInput.from_ints(list(tokens)), loss_fn_inputs=inputs)


def official(*data: Datum, config: dict[str, Any] | None = None) -> bytes:
    """A request as tinker's own client writes it."""
    given_input = ForwardBackwardInput(
        data=list(data), loss_fn="cross_entropy", loss_fn_config=config
    )
    request = ForwardBackwardRequest(
        forward_backward_input=given_input, model_id="run:train:0", seq_id=7
    )
    return forward_backward_request_to_proto(request).SerializeToString()


# -- the schema ------------------------------------------------------------------------------------


def test_the_schema_is_the_one_this_was_written_for() -> None:
    digest = hashlib.sha256(schema.DESCRIPTOR.serialized_pb).hexdigest()
    assert digest == DESCRIPTOR_SHA256, "tinker's schema changed: check every field used here"


def test_loading_the_schema_loads_no_tinker_and_a_later_import_gives_the_same_classes() -> None:
    script = (
        "import sys; from fireworks_training._wire.training import schema\n"
        "assert not {'tinker', 'torch', 'transformers'} & set(sys.modules)\n"
        "from tinker.proto import tinker_public_pb2 as real\n"
        "assert real.Datum is schema.Datum and real.SampleResponse is schema.SampleResponse\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_package_without_the_schema_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tinkerless").mkdir()
    (tmp_path / "tinkerless" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for package in ("tinkerless", "no_such_package"):
        with pytest.raises(MissingExtra, match=package):
            schema.load(package)


# -- requests --------------------------------------------------------------------------------------


def test_our_request_is_the_official_one() -> None:
    weights = np.array([0.5, 1.0], np.float32)
    one = datum(1, 2, target_tokens=np.array([2, 3]), weights=weights)
    two = datum(*range(300), target_tokens=np.arange(600).reshape(300, 2))
    config = {"clip_low_threshold": 0.8, "weighting": "tis"}
    ours = protobuf.encode_request(
        "forward_backward",
        protobuf.join(
            protobuf.encode_datum(
                d.model_input.to_ints(),
                {name: t.to_numpy() for name, t in d.loss_fn_inputs.items()},
                0,
            )
            for d in (one, two)
        ),
        loss_fn="cross_entropy",
        loss_fn_config=config,
        model_id="run:train:0",
        seq_id=7,
    )
    parse = schema.ForwardBackwardRequest.FromString
    assert parse(b"".join(ours)) == parse(official(one, two, config=config))


def test_the_official_request_is_understood() -> None:
    sparse = TensorData(
        data=[5.0, 6.0],
        dtype="float32",
        shape=[3, 4],
        sparse_crow_indices=[0, 1, 1, 2],
        sparse_col_indices=[2, 0],
    )
    chunks = [EncodedTextChunk(tokens=[1]), EncodedTextChunk(tokens=[2, 3])]
    two_chunks = Datum(
        model_input=ModelInput(chunks=chunks),
        loss_fn_inputs={"target_tokens": np.array([2, 3, 4]), "weights": sparse},
    )
    request = protobuf.decode_request(official(two_chunks, config={"a": 1, "b": "text"}))
    assert (request.model_id, request.seq_id, request.kind) == (
        "run:train:0",
        7,
        "forward_backward",
    )
    assert (request.loss_fn, request.loss_fn_config) == ("cross_entropy", {"a": 1.0, "b": "text"})
    (only,) = request.data
    assert only.tokens.dtype == np.int32
    assert only.tokens.tolist() == [1, 2, 3]
    assert only.inputs["target_tokens"].dtype == np.int64
    assert only.inputs["target_tokens"].tolist() == [2, 3, 4]
    assert only.inputs["weights"].tolist() == [[0, 0, 5, 0], [0, 0, 0, 0], [6, 0, 0, 0]]


def test_forward_is_the_same_message_with_a_flag() -> None:
    body = protobuf.encode_request(
        "forward", b"", loss_fn="cross_entropy", loss_fn_config=None, model_id="m", seq_id=1
    )
    assert protobuf.decode_request(b"".join(body)).kind == "forward"


@pytest.mark.parametrize("value", [[1], None, {"a": 1}])
def test_a_config_value_that_the_dialect_has_no_place_for(value: object) -> None:
    with pytest.raises(InvalidArgument, match=r"loss_fn_config\['x'\]"):
        protobuf.encode_request(
            "forward", b"", loss_fn="ppo", loss_fn_config={"x": value}, model_id="m", seq_id=1
        )


@pytest.mark.parametrize("tokens", [[2**31], [-(2**31) - 1], ["a"], [1.5]])
def test_token_ids_that_are_no_int32(tokens: list[Any]) -> None:
    with pytest.raises(InvalidDatum, match="datum 3: token ids"):
        protobuf.encode_datum(tokens, {}, 3)


_SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
_ARRAYS = _SHAPES.flatmap(
    lambda shape: st.sampled_from(["<f4", "<i8", ">i4", "<f8", "<u2"]).map(
        lambda dtype: np.arange(np.prod(shape), dtype=np.int64).reshape(shape).astype(dtype)
    )
)


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=300),
    st.dictionaries(st.text(max_size=200), _ARRAYS, max_size=4),
)
def test_the_frame_around_arrays_is_what_the_generated_classes_write(
    tokens: list[int], inputs: dict[str, Any]
) -> None:
    request = schema.ForwardBackwardRequest()
    theirs = request.data.add()
    theirs.model_input.add().encoded_text.tokens = np.array(tokens, "<i4").tobytes()
    for name, array in inputs.items():
        integral = array.dtype.kind in "iu"
        tensor = theirs.loss_fn_inputs[name]
        tensor.dense = array.astype("<i8" if integral else "<f4").tobytes()
        tensor.dtype = protobuf.INT64 if integral else protobuf.FLOAT32  # type: ignore[assignment]
        tensor.shape.extend(array.shape)
    ours = protobuf.encode_datum(tokens, inputs, 0)
    body = protobuf.join([ours])
    assert len(body) == ours.size
    assert schema.ForwardBackwardRequest.FromString(body) == request


def test_an_array_that_is_no_one_piece_of_memory_goes_in_its_own_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    body = protobuf.join([protobuf.encode_datum([1, 2, 3, 4], {"weights": array}, 0)])
    (only,) = protobuf.decode_request(body).data
    np.testing.assert_array_equal(only.inputs["weights"], array)


@given(st.binary(max_size=200))
def test_noise_is_a_protocol_error_or_a_request(noise: bytes) -> None:
    try:
        protobuf.decode_request(noise)
        protobuf.decode_result(noise)
    except (ProtocolError, NotSupported):
        pass


def _broken(name: str) -> schema.Tensor:
    good = schema.Tensor(dtype=protobuf.FLOAT32, shape=[2, 3])  # type: ignore[arg-type]
    csr = good.sparse_csr
    csr.values = np.ones(2, np.float32).tobytes()
    csr.crow_indices = np.array([0, 1, 2]).tobytes()
    csr.col_indices = np.array([0, 2]).tobytes()
    if name == "column":
        csr.col_indices = np.array([0, 3]).tobytes()
    elif name == "negative column":
        csr.col_indices = np.array([0, -1]).tobytes()
    elif name == "rows":
        csr.crow_indices = np.array([0, 2]).tobytes()
    elif name == "falling":
        csr.crow_indices = np.array([0, 3, 2]).tobytes()
    elif name == "huge":
        del good.shape[:]
        good.shape.extend([2, 2**40])
    elif name == "dtype":
        good.dtype = 0  # type: ignore[assignment]
    elif name == "odd bytes":
        csr.values = b"12345"
    elif name == "dense shape":
        good.dense = np.ones(5, np.float32).tobytes()
    return good


def test_sparse_tensors_of_a_request_are_bounded_all_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = schema.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    for _ in range(3):
        datum = request.data.add()
        datum.model_input.add().encoded_text.tokens = np.ones(2, np.int32).tobytes()
        datum.loss_fn_inputs["weights"].CopyFrom(_broken("not"))
    monkeypatch.setattr(protobuf, "MAX_DENSE", 18)
    assert len(protobuf.decode_request(request.SerializeToString()).data) == 3
    monkeypatch.setattr(protobuf, "MAX_DENSE", 17)
    with pytest.raises(ProtocolError, match=r"datum 2: 'weights'.*at most 5 elements"):
        protobuf.decode_request(request.SerializeToString())


def test_the_sparse_tensor_that_is_broken_below_is_good() -> None:
    assert protobuf.decode_tensor(_broken("not"), "x").tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    "how",
    ["column", "negative column", "rows", "falling", "huge", "dtype", "odd bytes", "dense shape"],
)
def test_a_tensor_that_contradicts_itself(how: str) -> None:
    with pytest.raises(ProtocolError, match="weights"):
        protobuf.decode_tensor(_broken(how), "weights")


def test_images_are_refused() -> None:
    message = schema.ForwardBackwardRequest()
    message.data.add().model_input.add().image.data = b"png"
    with pytest.raises(NotSupported, match="datum 0"):
        protobuf.decode_request(message.SerializeToString())


# -- results ---------------------------------------------------------------------------------------

arrays = st.builds(
    lambda rows, columns, seed, integral: (
        np.random.default_rng(seed).integers(-5, 5, (rows, *columns))
        if integral
        else np.random.default_rng(seed).normal(size=(rows, *columns)).astype(np.float32)
    ),
    st.integers(0, 4),
    st.sampled_from([(), (1,), (3,), (2, 2)]),
    st.integers(0, 99),
    st.booleans(),
)


@given(st.lists(arrays, max_size=6), st.floats(allow_nan=False, width=32))
def test_results_survive_the_wire_and_the_official_client_reads_them(
    outputs: list[Any], loss: float
) -> None:
    result = PassResult("ArrayRecord", [{"logprobs": a} for a in outputs], {"loss:sum": loss})
    body = protobuf.encode_result(result)
    back = protobuf.decode_result(body)
    theirs: ForwardBackwardOutput = deserialize_forward_backward_output(body)
    assert back.metrics == theirs.metrics == {"loss:sum": loss}
    for sent, got, read in zip(outputs, back.outputs, theirs.loss_fn_outputs, strict=True):
        assert got["logprobs"].dtype == sent.dtype
        assert got["logprobs"].flags.writeable
        np.testing.assert_array_equal(got["logprobs"], sent)
        np.testing.assert_array_equal(read["logprobs"].to_numpy(), sent)


def test_outputs_without_fields_are_counted() -> None:
    body = protobuf.encode_result(PassResult("ArrayRecord", [{}, {}], {}))
    assert protobuf.decode_result(body).outputs == [{}, {}]
    assert deserialize_forward_backward_output(body).loss_fn_outputs == [{}, {}]


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        (protobuf.BFLOAT16, np.array([0x3F80, 0xC000], "<u2").tobytes()),
        (protobuf.INT32, np.array([1, -2], "<i4").tobytes()),
    ],
)
def test_narrow_answers_are_widened(dtype: int, data: bytes) -> None:
    message = schema.ForwardBackwardOutput(loss_fn_output_type="x:Named")
    field = message.loss_fn_outputs.add(num_datums=2).fields["logprobs"]
    field.data, field.dtype = data, dtype  # type: ignore[assignment]
    size = len(data) // 2
    field.offsets = np.array([0, size, 2 * size]).tobytes()
    result = protobuf.decode_result(message.SerializeToString())
    assert result.output_type == "Named"
    assert [output["logprobs"].tolist() for output in result.outputs] == [[1], [-2]]


@pytest.mark.parametrize("offsets", [[0, 8], [0, 8, 4], [4, 8], [0, 2, 8], [0, 4, 4, 8], []])
def test_offsets_that_do_not_fit(offsets: list[int]) -> None:
    message = schema.ForwardBackwardOutput()
    field = message.loss_fn_outputs.add(num_datums=2).fields["logprobs"]
    field.data, field.dtype = np.ones(2, np.float32).tobytes(), protobuf.FLOAT32  # type: ignore[assignment]
    field.offsets = np.array(offsets, np.int64).tobytes()
    with pytest.raises(ProtocolError):
        protobuf.decode_result(message.SerializeToString())


# -- zstd ------------------------------------------------------------------------------------------


@given(st.binary(max_size=2000))
def test_compression_is_undone(body: bytes) -> None:
    assert decompress(compress(body), limit=len(body) + 1) == body


def test_decompression_is_bounded_and_whole() -> None:
    body = compress(bytes(100_000))
    with pytest.raises(ProtocolError, match="more than 99999 bytes"):
        decompress(body, limit=99_999)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100_000))
    assert decompress(unsized, limit=100_000) == bytes(100_000)
    for broken in (unsized[:-3], body[:-3], body + b"x", b"", b"no zstd"):
        with pytest.raises(ProtocolError):
            decompress(broken, limit=100_000)
    with pytest.raises(ProtocolError):
        decompress(unsized, limit=99_999)
