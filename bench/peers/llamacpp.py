"""llama.cpp: its quantizer over a GGUF made here, with an importance matrix from the calibration tokens."""

import ctypes
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from common import arguments, check_levels, clock, finish, is_block_linear, load_model, read_checkpoint, read_tokens, refuse, scratch

# a type's smallest block with a scale of its own, and the values that a weight can take in it
LEVELS = {
    "Q4_0": (32, 16), "Q4_1": (32, 16), "IQ4_NL": (32, 16), "IQ4_XS": (32, 16), "Q4_K": (32, 16),
    "Q3_K": (16, 8), "IQ3_S": (32, 16), "IQ3_XXS": (32, 16),
    "Q2_K": (16, 4), "IQ2_S": (16, 6), "IQ2_XS": (16, 6), "IQ2_XXS": (32, 6),
    "Q5_0": (32, 32), "Q5_1": (32, 32), "Q5_K": (32, 32), "Q6_K": (16, 64), "Q8_0": (32, 256),
}  # fmt: skip
WITH_OFFSET = {"Q4_1", "Q4_K", "Q2_K", "Q5_1", "Q5_K"}
# the recipe whose plain form stores every matrix in the type, where the two differ in name
RECIPE_OF = {"Q4_K": "Q4_K_S", "Q3_K": "Q3_K_S", "Q5_K": "Q5_K_S", "IQ2_S": "IQ2_M"}
MIXTURES = ("Q4_K_S", "Q4_K_M", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q2_K_S", "IQ3_XS", "IQ3_M", "IQ2_M")

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight",
}  # fmt: skip


def gguf_name(name: str) -> str:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def rotary_heads(name: str, config: dict) -> int:
    """Heads of a matrix whose rows the rotary embedding pairs up, else 0."""
    if name.endswith("q_proj.weight"):
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if name.endswith("k_proj.weight") else 0


def pair_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """(h d, m): rows i and i + d/2 of a head, which rotate together, become neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def unpair_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def write_gguf(folder: Path, tensors: dict[str, torch.Tensor], config: dict, path: Path) -> None:
    """The model of `folder` as a GGUF in fp32."""
    writer = gguf.GGUFWriter(path, "llama")
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, folder / "tokenizer.json", config)
    for name, tensor in tensors.items():
        paired = rotary_heads(name, config)
        writer.add_tensor(gguf_name(name), (pair_rows(tensor, paired) if paired else tensor).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, path: Path, config: dict) -> None:
    """Byte-level BPE, enough for the loader: the quantizer never tokenizes."""
    stored = json.loads(path.read_text()) if path.exists() else {"model": {"vocab": {}, "merges": []}, "added_tokens": []}
    names = {index: text for text, index in stored["model"]["vocab"].items()}
    added = {token["id"]: token["content"] for token in stored["added_tokens"]}
    names.update(added)
    kinds = [gguf.TokenType.CONTROL if i in added else gguf.TokenType.NORMAL for i in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"<unused {i}>") for i in range(config["vocab_size"])])
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"]])
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        if isinstance(config.get(key), int):
            add(config[key])


@torch.inference_mode()
def importance(folder: Path, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean square of each input of each block linear over the calibration tokens, by GGUF name."""
    model, sums = load_model(folder, torch.float32), {}

    def listen(name: str):
        def hook(_, inputs):
            sums[name] = sums.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

        return hook

    for name, layer in model.named_modules():
        if is_block_linear(f"{name}.weight", getattr(layer, "weight", torch.empty(0))):
            layer.register_forward_pre_hook(listen(gguf_name(f"{name}.weight")))
    for batch in tokens.split(8):
        model.model(batch, use_cache=False)
    return {name: (total / tokens.numel()).float().numpy() for name, total in sums.items()}


def quantize(source: Path, target: Path, recipe: str, plain: bool, matrix: dict[str, np.ndarray]) -> None:
    """llama.cpp's own quantizer; plain: every block matrix in the recipe's base type, the embedding in bf16."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()
    for entry, (name, values) in zip(entries, matrix.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread = torch.get_num_threads()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{recipe}")
    settings.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    settings.pure = plain
    if plain:
        settings.token_embedding_type = settings.output_tensor_type = int(gguf.GGMLQuantizationType.BF16)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantize to {recipe}; its message stands above.")


def main() -> None:
    args = arguments(__doc__, types=tuple(dict.fromkeys((*LEVELS, *MIXTURES))))
    if args.best:
        refuse("llama.cpp has no separate best recipe.")
    if args.type in MIXTURES and not args.whole_file:
        refuse(f"{args.type} is a mixture of types for --whole-file; without it take one of {', '.join(LEVELS)}.")
    tokens, original = read_tokens(args.calibration), read_checkpoint(args.model)
    config = json.loads((args.model / "config.json").read_text())
    if config["model_type"] != "llama":
        refuse(f"This conversion knows the llama architecture, not {config['model_type']}.")
    recipe = RECIPE_OF.get(args.type, args.type)
    with scratch(args.out) as folder:
        write_gguf(args.model, original, config, folder / "original.gguf")
        with clock() as spent:
            matrix = importance(args.model, tokens)
            quantize(folder / "original.gguf", folder / "quantized.gguf", recipe, not args.whole_file, matrix)
        bytes_file = (folder / "quantized.gguf").stat().st_size
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "quantized.gguf").tensors}

        weights, bytes_linears, kinds = {}, 0, {}
        for name, like in original.items():
            tensor, linear = stored[gguf_name(name)], is_block_linear(name, like)
            kind = tensor.tensor_type.name
            if like.ndim != 2 or not (linear or args.whole_file):
                continue
            weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            check_levels(name, weight, LEVELS[kind][1], LEVELS[kind][0])
            paired = rotary_heads(name, config)
            weights[name] = unpair_rows(weight, paired) if paired else weight
            if linear:
                bytes_linears += int(tensor.n_bytes)
                kinds[kind] = kinds.get(kind, 0) + 1
    if not args.whole_file and set(kinds) != {args.type}:
        raise ValueError(f"asked for {args.type}, llama.cpp stored {kinds}.")
    linears = sum(tensor.numel() for name, tensor in original.items() if is_block_linear(name, tensor))
    main_type = max(kinds, key=kinds.get)
    finish(
        args,
        weights,
        spent,
        tool="llama-cpp-python",
        setting=f"{args.type}, importance matrix of {len(tokens)} samples of {tokens.shape[1]}, block linears as {kinds}",
        bits_nominal=round(8 * bytes_linears / linears, 4),
        group=LEVELS[main_type][0],
        symmetric=main_type not in WITH_OFFSET,
        bytes_linears=bytes_linears,
        bytes_file=bytes_file,
    )


if __name__ == "__main__":
    main()
