-- reclaim: the old incarnation is dead: its pools, index, tables, copies and pins go; sequences and their logs stay.
-- KEYS  1 meta, 2 pool, 3 host, 4 index, 5 tables, 6 computed, 7 copies, 8 swap_outs, 9 swap_ins, 10 pins
-- ARGV  1 epoch, 2 n, 3 the new incarnation (empty: none), 4 its number of blocks, 5 of host blocks
-- returns "ok", and what the fence answers. Invariant: no entry of a dead incarnation stays reachable.
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10])
for i = 4, 5 do
  local num_blocks = tonumber(ARGV[i])
  if num_blocks > 0 then redis.call('SETRANGE', KEYS[i - 2], 20 * (num_blocks + 1) - 1, '\0') end
end
redis.call('HSET', KEYS[1], 'n', ARGV[2], 'committed_step_id', 0, 'incarnation', ARGV[3])
return 'ok'
