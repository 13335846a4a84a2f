// What is fixed when a library is compiled: one variant per model, given by defines.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "eight_bit.cuh"

#if !defined(PAGODA_ELEMENT) || !defined(PAGODA_HEAD_DIM) || !defined(PAGODA_BLOCK_SIZE)
#error "needs -DPAGODA_ELEMENT=(BFloat16|Float16|float) -DPAGODA_HEAD_DIM=... -DPAGODA_BLOCK_SIZE=..."
#endif

using Element = PAGODA_ELEMENT;  // of queries, and of all activations
// Of the pool: the same, or Int8 or Float8, with a scale for each token.
#if defined(PAGODA_KV)
using KV = PAGODA_KV;
#else
using KV = Element;
#endif
constexpr int kHeadDim = PAGODA_HEAD_DIM;
constexpr int kBlockSize = PAGODA_BLOCK_SIZE;  // tokens

#if defined(PAGODA_SLIDING_WINDOW)
constexpr bool kHasWindow = true;
#else
constexpr bool kHasWindow = false;
#endif

#if defined(PAGODA_SOFT_CAP)
constexpr bool kHasSoftCap = true;
#else
constexpr bool kHasSoftCap = false;
#endif

constexpr bool kIsFloat32 = sizeof(Element) == 4;
constexpr bool kIsScaled = !std::is_same_v<KV, Element>;
constexpr float kUnit = kIsFloat32 ? 1.0f : kPackedUnit<KV>;  // what scales are to be multiplied by
// Shared memory is filled and swizzled by chunks of 16 bytes.
template <typename E>
constexpr int kChunkOf = 16 / sizeof(E);
template <typename E>
constexpr int kRowChunksOf = kHeadDim / kChunkOf<E>;
constexpr int kChunkElements = kChunkOf<Element>;
constexpr int kRowChunks = kRowChunksOf<Element>;
constexpr int kKVRowChunks = kRowChunksOf<KV>;
constexpr int kRowBytes = kHeadDim * sizeof(Element);
constexpr int kKVRowBytes = kHeadDim * sizeof(KV);
// One KV head in a block: elements [kBlockSize, kHeadDim]; where they are scaled, then scales, [kBlockSize] float.
constexpr int kElementBytes = kBlockSize * kKVRowBytes;
constexpr int kScaleBytes = kIsScaled ? sizeof(float) : 0;
constexpr int kHeadBytes = kElementBytes + kBlockSize * kScaleBytes;
constexpr int kTileRows = 16;    // query rows of a warp, as many as an MMA has; a row is one head of one token
constexpr int kTileTokens = 16;  // tokens are loaded 16 at a time: all of one block
constexpr int kWarpThreads = 32;

static_assert(kHeadDim % (kIsFloat32 && !kIsScaled ? 8 : 16) == 0,
              "head_dim must be a multiple of 16, of 8 where all is float32");
static_assert(kBlockSize % kTileTokens == 0, "block_size must be a multiple of 16");

// Shared memory of a block: what every device from sm_80 on gives (99 KiB), or what lets a larger one run two blocks.
#if defined(PAGODA_SHARED_KIB)
constexpr int kMaxSharedBytes = PAGODA_SHARED_KIB * 1024;
#else
constexpr int kMaxSharedBytes = 99 * 1024;
#endif

// The largest power of two that divides n, at most `most`.
constexpr int power_of_two_in(int n, int most) { return n % 2 || most == 1 ? 1 : 2 * power_of_two_in(n / 2, most / 2); }
