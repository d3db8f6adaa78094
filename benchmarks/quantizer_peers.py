"""Our quantizers beside AutoRound and llm-compressor: same tokens, one evaluator, each in its own process.

`speed.py cbq --peers` runs `main`. Each quantizer gets the folder of the model and a file of token ids, runs
alone in a process (the peers with the Python of their own environment), and writes the weights that it ends
with; CPU seconds are those of the quantization, the peak is that of its process, the loading included.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

PEERS = ("llm-compressor GPTQ", "AutoRound")
sys.path.append(str(Path(__file__).parent / "effects"))


# One quantizer, in its own process


def quantize_with_llm_compressor(network: nn.Module, tokens: np.ndarray, options: Any) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {"num_bits": options.bits, "symmetric": False, "strategy": "group", "group_size": options.group}
    left = [f"re:.*layers[.]{index}[.].*" for index in range(options.blocks, block_count(network))]
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head", *left]
    )
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
    oneshot(
        model=network,
        dataset=data,
        recipe=[recipe],
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )


def quantize_with_auto_round(network: nn.Module, tokens: np.ndarray, options: Any) -> None:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    blocks = range(options.blocks, block_count(network))
    left = tuple(f"model.layers.{index}." for index in blocks)
    names = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    AutoRound(
        network,
        AutoTokenizer.from_pretrained(options.model),
        scheme="W4A16",
        bits=options.bits,
        group_size=options.group,
        sym=False,
        iters=options.iterations,
        batch_size=2,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=list(torch.from_numpy(tokens).split(1)),
        layer_config={name: {"bits": 16} for name in names if name.startswith(left)},
        device_map="cpu",
        seed=options.seed,
    ).quantize()


def our_layers(network: nn.Module, options: Any) -> tuple[str, dict[str, Any]]:
    from callbacks.quantization import Scheme, resolve_schemes
    from callbacks.quantization.blocks import find_blocks, linear_layers

    path, _ = find_blocks(network)
    targets = [f"{path}.{index}.*" for index in range(options.blocks)]
    return path, resolve_schemes(linear_layers(network, path), Scheme(options.bits, options.group), targets)


def quantize_with_our_gptq(network: nn.Module, tokens: np.ndarray, options: Any) -> None:
    from callbacks.quantization import SequentialGPTQ

    path, schemes = our_layers(network, options)
    SequentialGPTQ(network, path, schemes, torch.from_numpy(tokens), batch_size=2, act_order=True).run()


def quantize_with_our_cbq(network: nn.Module, tokens: np.ndarray, options: Any) -> None:
    from cbq import RECIPE

    from callbacks.quantization import CrossBlock, CrossBlockSettings
    from callbacks.quantization.windows import sliding_windows

    settings = CrossBlockSettings(**RECIPE, seed=options.seed)
    path, schemes = our_layers(network, options)
    windows = sliding_windows(options.blocks, settings.window, settings.overlap)
    segments = torch.from_numpy(tokens)
    CrossBlock(network, path, windows, schemes, segments, settings, autocast=torch.bfloat16).run()


QUANTIZERS: dict[str, Callable[[nn.Module, np.ndarray, Any], None]] = {
    "llm-compressor GPTQ": quantize_with_llm_compressor,
    "AutoRound": quantize_with_auto_round,
    "our GPTQ": quantize_with_our_gptq,
    "our CBQ": quantize_with_our_cbq,
}


def block_count(network: nn.Module) -> int:
    return int(network.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]


def work(options: argparse.Namespace) -> dict[str, float]:
    """Quantize with one of `QUANTIZERS`; the weights go to `options.result`."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    network = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokens = np.load(options.tokens)
    began = time.process_time()
    QUANTIZERS[options.only](network, tokens, options)
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    weights = {
        name: value.detach().float().contiguous()
        for name, value in network.state_dict().items()
        if ".layers." in name and name.endswith("proj.weight")
    }
    save_file(weights, options.result)
    return {"cpu_seconds": seconds, "peak_gib": peak}


# All of them, and the evaluation


def compare(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Perplexity on each text, seconds and memory of every quantizer."""
    from cbq import TestBed, packed_segments, perplexity
    from common import in_own_process
    from safetensors.torch import load_file

    bed = TestBed(options.model, options.text, options.wikitext)
    if not Path(options.model).is_dir():  # the peers read folders
        bed.network.save_pretrained(folder / "model")
        bed.tokenizer.save_pretrained(folder / "model")
    model = options.model if Path(options.model).is_dir() else folder / "model"
    np.save(folder / "tokens.npy", packed_segments(bed.calibration, options.length, options.segments).numpy())
    blocks = min(options.blocks or 10**9, block_count(bed.network))

    def perplexities() -> dict[str, float]:
        return {
            name: perplexity(bed.network, packed_segments(ids, 512, options.eval_segments))
            for name, ids in bed.evaluation.items()
        }

    rows = {"full precision": perplexities()}
    result = folder / "weights.safetensors"
    for name in options.quantizers:
        arguments = {"only": name, "model": model, "tokens": folder / "tokens.npy", "result": result}
        arguments |= {"blocks": blocks} | {
            key: getattr(options, key) for key in ("bits", "group", "iterations", "threads", "seed")
        }
        flags = [str(word) for key, value in arguments.items() for word in (f"--{key}", value)]
        python = options.peers_python if name in PEERS else sys.executable
        found = json.loads(in_own_process(__file__, *flags, python=python))
        bed.network.load_state_dict(bed.state)
        bed.network.load_state_dict(load_file(result), strict=False)
        rows[name] = perplexities() | found
        print(f"  {name}: {rows[name]}", flush=True)
    return rows


def report(rows: dict[str, dict[str, float]]) -> str:
    """The table."""
    from common import markdown

    texts = list(rows["full precision"])
    heads = ["", *(f"{text} ppl" for text in texts), "CPU s", "peak GiB"]
    lines = []
    for name, row in rows.items():
        cost = [f"{row['cpu_seconds']:.0f}", f"{row['peak_gib']:.2f}"] if "peak_gib" in row else ["", ""]
        lines.append([name, *(f"{row[text]:.2f}" for text in texts), *cost])
    return markdown(heads, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="speed.py cbq --peers")
    parser.add_argument("--model", required=True, help="GGUF file or Hugging Face folder")
    parser.add_argument(
        "--text", type=Path, required=True, help="folder of the addresses, see effects/cbq.py"
    )
    parser.add_argument("--wikitext", type=Path, help="folder with WikiText-2's test text")
    parser.add_argument(
        "--peers-python",
        default=sys.executable,
        help="Python of an environment with the peers: pip install auto-round llmcompressor",
    )
    parser.add_argument("--quantizers", nargs="+", choices=list(QUANTIZERS), default=list(QUANTIZERS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--blocks", type=int, help="the first so many are quantized, the others left alone")
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--eval-segments", type=int, default=16, help="of 512 tokens, of each text")
    parser.add_argument("--iterations", type=int, default=50, help="of AutoRound; its own default is 200")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(options, Path(folder))
    print(report(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def worker() -> int:
    parser = argparse.ArgumentParser()
    for name in ("only", "model", "tokens", "result"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("bits", "group", "blocks", "iterations", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(work(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(worker())
