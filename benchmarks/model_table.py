"""Which families of the installed transformers can be quantized, calibrated and exported: `docs/models.md`.

A tiny random model of every type of `MODEL_FOR_CAUSAL_LM_MAPPING`, each in a process of its own:

    python benchmarks/model_table.py docs/models.md
    python benchmarks/model_table.py some.md --types llama gpt2
"""

import argparse
import json
import os
import resource
import select
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from callbacks.deploy.compressed_tensors import compression_config, export_model
from callbacks.quantization import Scheme, resolve_schemes
from callbacks.quantization.blocks import BlockStack, find_blocks, linear_layers
from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.report import describe
from callbacks.quantization.sequential import nearest_matrix
from lightning_modules.language_model import refuse_if_not_causal

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "emb_dim", "lru_width", "q_lora_rank"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "n_inner"), 64),
    **dict.fromkeys(
        ("encoder_ffn_dim", "decoder_ffn_dim", "shared_intermediate_size", "mlp_hidden_size"), 64
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "linear_key_head_dim"), 8),
    **dict.fromkeys(("linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("kv_lora_rank", "state_size", "mamba_d_state", "d_state", "mamba_d_head"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_vocab"), 260),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    "pad_token_id": 0,
    "rotary_dim": 4,
    "attention_types": [[["global", "local"], 1]],
    "mamba_n_heads": 8,
    "num_kv_shared_layers": 0,
    "sliding_window": 8,
}
LARGEST = 30_000_000
LENGTH = 12


def small(kind: type, left_out: Sequence[str] = ()) -> Any:
    """A small network of a configuration class."""
    config = tiny(kind, left_out)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"the smallest configuration found has {count / 1e6:.0f} M weights")
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny(kind: type, left_out: Sequence[str] = ()) -> Any:
    """A small configuration of a class, those of its parts among them.

    Args:
        kind: configuration class of transformers.
        left_out: options that stay as they are.
    """
    default = kind()
    options = {name: value for name, value in _tiny_options(default).items() if name not in left_out}
    for name, part in getattr(kind, "sub_configs", {}).items():
        given = getattr(default, name, None)
        if given is not None and hasattr(given, "to_dict"):
            options[name] = _tiny_options(given) | _pictures(given)
        elif isinstance(part, type):
            options[name] = _tiny_options(part()) | _pictures(part())
    return kind(**options)


def _tiny_options(default: Any) -> dict[str, Any]:
    known = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    options = {name: value for name, value in SIZES.items() if name in known}
    attributes = getattr(default, "attribute_map", {})
    options = {
        name: value
        for name, value in options.items()
        if attributes.get(name, name) not in options or name not in attributes
    }
    if "kv_lora_rank" in options:  # latent attention has as many key heads
        options["num_key_value_heads"] = options["num_attention_heads"]
    types = getattr(default, "layer_types", None)
    if isinstance(types, (list, tuple)) and types:
        kinds = list(dict.fromkeys(types))
        options["layer_types"] = (kinds * 2)[:2]
    return options


def _pictures(default: Any) -> dict[str, Any]:
    return {key: value for key, value in (("image_size", 16), ("patch_size", 8)) if hasattr(default, key)}


def row_of(model_type: str, kind: type) -> dict[str, str]:
    """What holds for a family, as the cells of its row."""
    torch.manual_seed(0)
    ids = torch.randint(3, 259, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    reasons = []
    for left_out in ((), ("layer_types",), ("head_dim", "layer_types"), ("n_group", "topk_group")):
        try:
            network = small(kind, left_out)
            with torch.no_grad():
                network(ids, use_cache=False)
            break
        except Exception as error:
            reasons.append(_line(error))
    else:
        return {"share": f"not tried: no small model of it runs ({reasons[0]})"}
    row: dict[str, str] = {}
    try:
        refuse_if_not_causal(network, model_type)
        path, _ = find_blocks(network)
        layers = linear_layers(network, path)
        schemes = resolve_schemes(layers, Scheme(4, symmetric=True))
    except Exception as error:
        return {"share": f"refused: {_line(error)}"}
    row["second"] = _tried(lambda: BlockStack(network, path, ids, torch.device("cpu")) and "exact")
    matrices = {name: nearest_matrix(layers[name], scheme) for name, scheme in schemes.items()}
    share = describe(network, matrices, Scheme(4, symmetric=True), path)["quantized_block_share"]
    row["share"] = f"{100 * share:.1f} %"
    for name, matrix in matrices.items():
        matrix.install(layers[name])
    row["export"] = _tried(lambda: _exported(network, ids, matrices))
    return row


def _exported(network: Any, ids: torch.Tensor, matrices: dict[str, QuantizedMatrix]) -> str:
    compression_config(network, matrices)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export_model(Path(folder) / "model", network, None, matrices, "compressed-tensors")
        loaded = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
        found, wanted = (each(ids, use_cache=False).logits for each in (loaded, network))
    if torch.equal(found, wanted):
        return "equal"
    return f"differs by {(found - wanted).abs().amax() / wanted.abs().amax():.0e}"


def _tried(what: Callable[[], str]) -> str:
    try:
        return what()
    except Exception as error:
        return f"refused: {_line(error)}"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) < 180 else f"{text[:177]}...").replace("|", "/")


def alone(function: Callable[[], dict[str, str]], seconds: int) -> dict[str, str]:
    """The result of a function in a process of its own, with limits of time and memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        with open(os.devnull, "w") as quiet:
            os.dup2(quiet.fileno(), 1)
            os.dup2(quiet.fileno(), 2)
        try:
            answer = function()
        except BaseException as error:
            answer = {"share": f"failed: {type(error).__name__}"}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    answer = b""
    while select.select([reader], [], [], 10 * seconds)[0]:
        part = os.read(reader, 65536)
        if not part:
            break
        answer += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    os.waitpid(child, 0)
    return json.loads(answer) if answer else {"share": f"not tried: more than {seconds} s of a CPU"}


def table(rows: dict[str, dict[str, str]], command: str) -> str:
    """The document."""
    tried = [row for row in rows.values() if not row["share"].startswith("not tried")]
    whole = sum(row["share"].endswith("%") and float(row["share"][:-2]) >= 90 for row in tried)
    exact = sum(row.get("second") == "exact" for row in tried)
    equal = sum(row.get("export") == "equal" for row in tried)
    lines = [
        "# Families of language models",
        "",
        f"All {len(rows)} types of transformers {transformers.__version__} with a causal language model, as "
        f"tiny random models, with torch {torch.__version__.partition('+')[0]}, {date.today():%d %B %Y}:",
        "",
        "```bash",
        command,
        "```",
        "",
        f"Of {len(tried)} that could be tried, {whole} have at least 90 % of their blocks' weights quantized "
        f"by RTN; GPTQ and CBQ calibrate {exact}, whose second segment comes out of the blocks as it does of "
        f"the model; {equal} exports as compressed-tensors load in transformers with equal logits. The "
        "others have the sentence with which they are refused, or what transformers says when it loads them.",
        "",
        "| type | blocks' weights in RTN | a second segment (GPTQ, CBQ) | compressed-tensors, W4 symmetric |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['share']} | {row.get('second', '')} | {row.get('export', '')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--types", nargs="*", default=[])
    parser.add_argument("--seconds", type=int, default=60, help="of a CPU, for each")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: dict[str, dict[str, str]] = {}
    kinds = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
    for model_type in sorted(options.types or kinds):
        rows[model_type] = alone(lambda name=model_type: row_of(name, kinds[name]), options.seconds)  # type: ignore[misc]
        print(model_type, rows[model_type], flush=True)
    options.file.write_text(table(rows, f"python {' '.join(sys.argv[:2])}"))


if __name__ == "__main__":
    main()
