import pytest
import torch

from callbacks.token_reduction.score import class_attention, dispersion, significance


def test_class_attention_is_the_first_row_of_the_whole_matrix():
    queries, keys = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    bias = torch.randn(2, 1, 1, 9)
    whole = (0.5 * queries @ keys.transpose(-1, -2) + bias).softmax(dim=-1)
    torch.testing.assert_close(class_attention(queries, keys, 0.5, bias), whole[:, :, 0].sum(dim=1))


def test_half_precision_is_scored_in_float32():
    queries = torch.randn(1, 2, 9, 4, dtype=torch.bfloat16)
    scores = significance(class_attention(queries, queries, 0.5), queries, prefix=1)
    assert scores.dtype == torch.float32
    assert scores.sum().item() == pytest.approx(1)


def test_all_prefix_tokens_are_left_out_of_the_scores():
    attention, values = torch.rand(2, 10), torch.randn(2, 3, 10, 4)
    scores = significance(attention, values, prefix=3)
    norms = values.transpose(1, 2).flatten(2).norm(dim=-1)
    raw = (attention * norms)[:, 3:]
    torch.testing.assert_close(scores, raw / raw.sum(dim=1, keepdim=True))
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2))


def test_without_value_norm():
    attention = torch.rand(2, 10)
    scores = significance(attention, None, prefix=1)
    torch.testing.assert_close(scores, attention[:, 1:] / attention[:, 1:].sum(dim=1, keepdim=True))


def test_dispersion_of_uniform_and_of_single_scores():
    uniform, single = torch.full((1, 16), 1 / 16), torch.eye(16)[:1]
    assert dispersion(uniform).item() == 0
    assert dispersion(single).item() == pytest.approx(1 / 16)
    assert dispersion(single, "cv2").item() == pytest.approx(16)
