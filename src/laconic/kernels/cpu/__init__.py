"""Kernels in C++ for the processor, a file for each instruction set; `kernels.native` says what there is."""
