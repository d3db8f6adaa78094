import pytest
import torch

from lightning_modules import CausalLanguageModel, ImageClassifier
from lightning_modules.parts.finite import NotFiniteError, verify_outputs

NAN, INF = float("nan"), float("inf")


def test_nan_is_named_with_metric_batch_and_source():
    outputs = {"score": torch.tensor([0.1, NAN]), "label": torch.tensor([1, 0]), "path": ["a", "b"]}
    with pytest.raises(
        NotFiniteError, match=r"test: NaN in score \(1 of 2 values\) at batch 3 of Data"
    ) as raised:
        verify_outputs(outputs, "test", 3, "Data (root)", ("ap",))
    assert "test/ap" in str(raised.value)


@pytest.mark.parametrize(
    "outputs", [None, torch.tensor(NAN), {}, {"a": torch.tensor([-INF, INF])}, {"a": torch.empty(0)}]
)
def test_what_is_no_fault_passes(outputs):
    verify_outputs(outputs, "val", 0, "Data")


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_classifier_with_nan_is_not_evaluated(trainer, blob_data, command):
    module = ImageClassifier("test_resnet", num_classes=4)
    with torch.no_grad():
        module.network.fc.bias.fill_(NAN)
    with pytest.raises(NotFiniteError, match=r"NaN in probabilities .* at batch 0 of BlobData"):
        getattr(trainer(), command)(module, blob_data())


def test_logits_that_overflow_are_no_numbers_and_masked_classes_are(trainer, blob_data):
    module = ImageClassifier("test_resnet", num_classes=4)
    with torch.no_grad():
        module.network.fc.bias[0] = -INF
    assert 0 <= trainer().test(module, blob_data(), verbose=False)[0]["test/top1"] <= 1
    with torch.no_grad():
        module.network.fc.bias[0] = INF
    with pytest.raises(NotFiniteError, match=r"test/top1, test/top5"):
        trainer().test(module, blob_data(), verbose=False)


def test_validation_inside_a_fit_stops_too(trainer, blob_data):
    module = ImageClassifier("test_resnet", num_classes=4)
    with torch.no_grad():
        module.network.fc.bias.fill_(NAN)
    with pytest.raises(NotFiniteError, match="val: NaN in probabilities"):
        trainer().fit(module, blob_data())


def test_a_language_model_with_nan_has_no_perplexity(trainer, blob_data):
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = CausalLanguageModel("llama", model_args={**tiny, "num_key_value_heads": 1}, tokenizer="bytes")
    with torch.no_grad():
        module.network.lm_head.weight.fill_(NAN)
    batch = {"input_ids": torch.full((2, 5), 7), "index": torch.arange(2)}
    with pytest.raises(NotFiniteError, match="test/perplexity"):
        trainer().test(module, torch.utils.data.DataLoader([batch], batch_size=None), verbose=False)
