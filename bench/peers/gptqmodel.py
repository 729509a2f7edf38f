"""GPTQModel: GPTQ, one column after the other, the rest of the row absorbing each error."""

import os

from common import arguments, check_levels, clock, finish, gptq_weight, read_checkpoint, read_tokens, refuse, scratch


def main() -> None:
    args = arguments(__doc__)
    if args.best:
        refuse("GPTQModel has no separate best recipe.")
    tokens = read_tokens(args.calibration)
    # read when the package is imported; more workers than cores stall it
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=args.bits, group_size=args.group, sym=not args.asymmetric, offload_to_disk=False)
    model = GPTQModel.load(str(args.model), config, device="cpu")
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    with scratch(args.out) as folder:
        with clock() as spent:
            model.quantize(rows, batch_size=8)
        model.save(str(folder))
        bytes_file = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        stored = read_checkpoint(folder)

    weights, bytes_linears = {}, 0
    for name in sorted({key.rpartition(".")[0] for key in stored if key.endswith(".qweight")}):
        packed = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
        weights[f"{name}.weight"] = weight = gptq_weight(packed, args.bits)
        # columns that share a scale lie together once sorted by their group
        check_levels(name, weight[:, packed["g_idx"].argsort(stable=True)], 2**args.bits, args.group)
        bytes_linears += sum(tensor.nbytes for tensor in packed.values())
    finish(
        args,
        weights,
        spent,
        tool="gptqmodel",
        setting=f"defaults: group-aware activation order, damping {config.damp_percent}, {len(tokens)} samples of {tokens.shape[1]}"
        + ("; splits a tied embedding into two 8-bit copies, no smaller, so the whole file keeps it in 16 bits" if args.whole_file else ""),
        bits_nominal=args.bits,
        group=args.group,
        symmetric=not args.asymmetric,
        bytes_linears=bytes_linears,
        bytes_file=bytes_file,
    )


if __name__ == "__main__":
    main()
