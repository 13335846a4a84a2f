// One tile of tokens, attended to by one warp's query rows.
#pragma once

#include <type_traits>

#include "fma.cuh"
#include "mma_8bit.cuh"
#include "tiles.cuh"

using TensorMath = std::conditional_t<kIsScaled, EightBitMmaMath<Element, KV>, MmaMath<Element>>;
using TileMath = std::conditional_t<kIsFloat32, FmaMath<Element, KV>, TensorMath>;

// A stage of a ring, whose first token is first_token.
struct Tile {
  const KV* keys;
  const KV* values;
  const float* scales;  // of keys, then of values
  int first_token;
};

template <int kTokens>
__device__ __forceinline__ void attend_tile(RowSums& sums, const TileMath::Queries& queries, const Tile& tile,
                                            const AttentionArgs& args, const Sight& sight) {
  const bool hides = !sight.is_of_all(tile.first_token, kTokens);
  Fragment<kTokens> scores;
  TileMath::multiply_keys<kTokens>(scores, queries, tile.keys);
  if constexpr (kIsScaled) apply_scales<kTokens>(scores, tile.scales);
  if constexpr (kHasSoftCap) cap_scores<kTokens>(scores, args);
  if (hides) sight.hide<kTokens>(scores, tile.first_token, -INFINITY);
  sums.weigh<kTokens>(scores, weight_factor(args));
  if constexpr (kIsScaled) {
    apply_scales<kTokens>(scores, tile.scales + kTokens);
    if (hides) sight.hide<kTokens>(scores, tile.first_token, 0.0f);
  }
  TileMath::add_values<kTokens>(sums.sums, scores, tile.values);
}
