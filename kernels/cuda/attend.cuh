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

// positions: of the lane's rows.
template <int kTokens>
__device__ __forceinline__ void attend_tile(RowSums& sums, const TileMath::Queries& queries, const Tile& tile,
                                            const AttentionArgs& args, const int (&positions)[kLaneRows]) {
  Fragment<kTokens> scores;
  TileMath::multiply_keys<kTokens>(scores, queries, tile.keys);
  if constexpr (kIsScaled) scale_products<kTokens>(scores, tile.scales);
  score<kTokens>(scores, args, tile.first_token, positions);
  sums.weigh<kTokens>(scores);
  if constexpr (kIsScaled) scale_weights<kTokens>(scores, tile.scales + kTokens, args, tile.first_token, positions);
  TileMath::add_values<kTokens>(sums.sums, scores, tile.values);
}
