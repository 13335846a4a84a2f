// CUDA for nvcc, its emulation for a host compiler: the kernels are the same source.
#pragma once

#if defined(__CUDACC__)
#include "intrinsics.cuh"
#else
#include "emulation/cuda.h"
#endif
