-- reclaim: the old incarnation is dead: its pool, index, tables and copies go; sequences and their logs stay.
-- KEYS  1 meta, 2 pool, 3 index, 4 tables, 5 computed, 6 copies
-- ARGV  1 epoch, 2 n, 3 the new incarnation (empty: none), 4 its number of blocks
-- returns "ok", and what the fence answers. Invariant: no entry of a dead incarnation stays reachable.
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6])
local num_blocks = tonumber(ARGV[4])
if num_blocks > 0 then
  redis.call('SETRANGE', KEYS[2], 20 * (num_blocks + 1) - 1, '\0')
end
redis.call('HSET', KEYS[1], 'n', ARGV[2], 'committed_step_id', 0, 'incarnation', ARGV[3], 'num_blocks', ARGV[4])
return 'ok'
