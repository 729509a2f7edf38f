"""AutoRound: rounding and clipping learned block by block with signed gradients."""

import json
import logging

import common
import torch

# the order in which an AWQ word holds its eight 4-bit outputs
AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


def awq_weight(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    """The (n, m) fp32 weight of one AWQ layer: 4-bit codes and zeros packed along the output in AWQ's order."""
    codes, zeros = (common.unpack_bits(packed[key], 4).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2) for key in ("qweight", "qzeros"))
    length, groups = codes.shape[0], zeros.shape[0]
    owner = torch.arange(length) // (length // groups)
    return ((codes - zeros[owner]).float() * packed["scales"].float()[owner]).T.contiguous()


def main() -> None:
    args = common.arguments(__doc__)
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    if args.bits == 8 and args.asymmetric:
        common.refuse("AutoRound's packed formats hold no 8-bit zero point.")
    tokens = common.read_tokens(args.calibration)
    model, tokenizer = common.load_model(args.model), AutoTokenizer.from_pretrained(args.model)
    # rows are packed: no token is padding, whatever the tokenizer says
    tokenizer.pad_token = None
    logging.getLogger("autoround").setLevel(logging.WARNING)
    iterations, samples = (1000, 512) if args.best else (200, 128)
    samples = min(samples, len(tokens))
    rounder = AutoRound(
        model,
        tokenizer=tokenizer,
        bits=args.bits,
        group_size=args.group,
        sym=not args.asymmetric,
        dataset=list(tokens[:samples].split(8)),
        seqlen=tokens.shape[1],
        nsamples=samples,
        iters=iterations,
        batch_size=8,
        enable_torch_compile=False,
        device_map="cpu",
    )
    with common.scratch(args.out) as folder:
        with common.clock() as spent:
            rounder.quantize_and_save(str(folder), format="auto_round")
        files = list(folder.rglob("*.safetensors"))
        bytes_file = sum(file.stat().st_size for file in files)
        stored = common.read_checkpoint(files[0].parent)
        layout = json.loads((files[0].parent / "config.json").read_text())["quantization_config"]["packing_format"]

    weights, bytes_linears = {}, 0
    for name in sorted({key.rpartition(".")[0] for key in stored if key.endswith(".qweight")}):
        packed = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
        # symmetric goes to GPTQ's layout, 4 bits with a zero point to AWQ's, the rest to AutoRound's own
        if "awq" in layout:
            weight = awq_weight(packed)
        else:
            weight = common.gptq_weight(packed, args.bits, zero_shift=1 if "gptq" in layout else 0)
        weights[f"{name}.weight"] = weight
        common.check_levels(name, weight, 2**args.bits, args.group)
        bytes_linears += sum(tensor.nbytes for tensor in packed.values())
    common.finish(
        args,
        weights,
        spent,
        tool="auto-round",
        setting=f"{'auto-round-best' if args.best else 'default'}: {iterations} iterations, {samples} samples of {tokens.shape[1]}, batch 8"
        + ("; cannot quantize a tied head, so the whole file keeps it in 16 bits" if args.whole_file else ""),
        bits_nominal=args.bits,
        group=args.group,
        symmetric=not args.asymmetric,
        bytes_linears=bytes_linears,
        bytes_file=bytes_file,
    )


if __name__ == "__main__":
    main()
