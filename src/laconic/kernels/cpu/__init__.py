"""Kernels in C++ for the processor, one file an instruction set; `kernels.native` says what there is, the kernels' own modules call them."""
