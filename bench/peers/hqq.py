"""HQQ: half-quadratic quantization with a zero point, no calibration."""

import torch
from common import arguments, check_levels, clock, finish, load_model, refuse, scratch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hqq.models.hf.base import AutoHQQHFModel


def main() -> None:
    args = arguments(__doc__)
    if not args.asymmetric:
        refuse("HQQ always stores a zero point; it has no symmetric mode.")
    if args.best:
        refuse("HQQ has no separate best recipe.")
    model = load_model(args.model)
    with clock() as spent:
        config = BaseQuantizeConfig(nbits=args.bits, group_size=args.group, axis=1)
        AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float16, device="cpu")
    with scratch(args.out) as folder:
        AutoHQQHFModel.save_quantized(model, str(folder))
        bytes_file = (folder / "qmodel.pt").stat().st_size

    weights, stored, ideal = {}, 0, 0
    for name, layer in model.named_modules():
        if not isinstance(layer, HQQLinear):
            continue
        # the stored half-precision scales and zeros, multiplied out in fp32
        weight = Quantizer.dequantize(layer.W_q.data, {**layer.meta, "compute_dtype": torch.float32}).float()
        check_levels(name, weight, 2**args.bits, args.group)
        weights[f"{name}.weight"] = weight
        side = sum(layer.meta[key].numel() * layer.meta[key].element_size() for key in ("scale", "zero"))
        stored += layer.W_q.numel() * layer.W_q.element_size() + side
        ideal += (weight.numel() * args.bits + 7) // 8 + side
    finish(
        args,
        weights,
        spent,
        tool="hqq",
        setting="defaults: groups along the input, proximal solver, fp16 scale and zero, no calibration"
        + ("; cannot quantize an embedding, so the whole file keeps it in 16 bits" if args.whole_file else ""),
        bits_nominal=args.bits,
        group=args.group,
        symmetric=False,
        bytes_linears=stored,
        bytes_linears_ideal=ideal,
        bytes_file=bytes_file,
    )


if __name__ == "__main__":
    main()
