// One tile of tokens, attended to by one warp's query rows, in one tile or in several.
#pragma once

#include <type_traits>

#include "fma.cuh"
#include "mma_8bit.cuh"
#include "tiles.cuh"

// Products of tiles of rows with a tile of tokens; in float32 of one tile of rows.
template <int kRowTiles>
using TensorMath =
    std::conditional_t<kIsScaled, EightBitMmaMath<Element, KV, kRowTiles>, MmaMath<Element, kRowTiles>>;
template <int kRowTiles>
using TileMath = std::conditional_t<kIsFloat32, FmaMath<Element, KV>, TensorMath<kRowTiles>>;

// A stage of a ring, whose first token is first_token.
struct Tile {
  const KV* keys;
  const KV* values;
  const float* scales;  // of keys, then of values
  int first_token;
};

template <int kTokens, int kRowTiles>
__device__ __forceinline__ void attend_tile(RowSums (&sums)[kRowTiles],
                                            const typename TileMath<kRowTiles>::Queries (&queries)[kRowTiles],
                                            const Tile& tile, const AttentionArgs& args,
                                            const Sight (&sights)[kRowTiles]) {
  Fragment<kTokens> scores[kRowTiles];
  TileMath<kRowTiles>::template multiply_keys<kTokens>(scores, queries, tile.keys);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const bool hides = !sights[i].is_of_all(tile.first_token, kTokens);
    if constexpr (kIsScaled) apply_scales<kTokens>(scores[i], tile.scales);
    if constexpr (kHasSoftCap) cap_scores<kTokens>(scores[i], args);
    if (hides) sights[i].template hide<kTokens>(scores[i], tile.first_token, -INFINITY);
    sums[i].template weigh<kTokens>(scores[i], weight_factor(args));
    if constexpr (kIsScaled) {
      apply_scales<kTokens>(scores[i], tile.scales + kTokens);
      if (hides) sights[i].template hide<kTokens>(scores[i], tile.first_token, 0.0f);
    }
  }
  TileMath<kRowTiles>::template add_values<kTokens>(sums, scores, tile.values);
}
