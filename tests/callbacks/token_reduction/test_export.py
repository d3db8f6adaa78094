import pytest
import torch

from callbacks.token_reduction import KeepAttentive, PruneOrPool, attach_reducers, record_tokens


@pytest.fixture
def network(make_vit):
    network = make_vit(depth=2)
    attach_reducers(network, {0: PruneOrPool(4, 0.025), 1: KeepAttentive(r=2)})
    return network


def choices(network, images):
    with torch.no_grad(), record_tokens(network) as records:
        logits = network(images)
    return logits, records.passes[0][0].pooled


def test_compiles_as_one_graph(network, images):
    logits, pooled = choices(network, images)
    assert 0 < pooled.sum() < len(images)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad(), record_tokens(network) as records:
        torch.testing.assert_close(compiled(images), logits, rtol=0, atol=1e-6)
    assert records.passes == []  # nothing is written down from compiled code


def test_split_compiles_too(make_vit, images):
    network = make_vit(depth=2)
    attach_reducers(network, {1: PruneOrPool(4, 0.022, dispatch="split")})
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), network(images), rtol=0, atol=1e-6)


def test_onnx_gives_equal_logits_at_any_batch_size(network, images, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    logits, pooled = choices(network, images)
    assert 0 < pooled.sum() < len(images)
    batch = torch.export.Dim("batch", min=1, max=64)
    path = tmp_path / "ppt.onnx"
    torch.onnx.export(
        network,
        (images[:2],),
        path,
        dynamo=True,
        dynamic_shapes={"x": {0: batch}},
        optimize=False,
        verbose=False,
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for part in (slice(0, 6), slice(3, 4)):
        (found,) = session.run(None, {name: images[part].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits[part], rtol=0, atol=1e-5)
