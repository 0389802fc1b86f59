"""Tensors to bytes and back, exactly, in every dtype that flexctl stores."""

from __future__ import annotations

import pytest
import torch

from flexctl.bundle import RawTensor
from flexctl.bundle.tensors import size_of
from flexctl.model.tensors import DTYPES, tensors_digest, to_bytes, to_torch


@pytest.mark.parametrize("name", list(DTYPES))
@pytest.mark.parametrize("shape", [(3, 4), (5,), ()])
def test_bytes_are_the_tensor(name: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 50).to(DTYPES[name])
    raw = RawTensor(*to_bytes(tensor))
    assert (raw.dtype, raw.shape) == (name, shape)
    assert raw.data.shape == (size_of(raw),)
    again = to_torch(raw)
    assert again.dtype == tensor.dtype
    assert torch.equal(again, tensor)


def test_order_is_row_major_whatever_the_strides() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert to_bytes(tensor.T)[2].tobytes() == to_bytes(tensor.T.contiguous())[2].tobytes()
    assert to_bytes(tensor.T)[2].tobytes() != to_bytes(tensor)[2].tobytes()


def test_nothing_is_shared_with_the_buffer() -> None:
    raw = RawTensor(*to_bytes(torch.ones(4)))
    tensor = to_torch(raw)
    tensor.zero_()
    assert torch.equal(to_torch(raw), torch.ones(4))


def test_gradients_stay_behind() -> None:
    assert not to_torch(RawTensor(*to_bytes(torch.ones(2, requires_grad=True)))).requires_grad


def test_digest_is_of_names_and_bytes_of_any_dtype_and_not_of_their_order() -> None:
    tensors = {"a": torch.ones(2), "b": torch.tensor([True, False])}
    assert tensors_digest(dict(reversed(tensors.items()))) == tensors_digest(tensors)
    others = [{**tensors, "b": torch.tensor([True, True])}, {"a": tensors["a"], "c": tensors["b"]}, {"a": tensors["a"]}]
    assert tensors_digest(tensors) not in [tensors_digest(other) for other in others]
