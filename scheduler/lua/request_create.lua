-- request_create: the record of a new request.
-- KEYS  1 the record (hash)
-- ARGV  1 digest, 2 body, 3 worker, 4 epoch, 5 seq_id of choice 0, 6 seconds that a request may live at most,
--       7 output index of each choice from which the worker logs: zeros with commas between
-- returns {created (1 or 0), digest, seq_id}. Invariant: one body per request_id.
local held = redis.call('HMGET', KEYS[1], 'digest', 'seq_id')
if held[1] then return {0, held[1], held[2]} end
redis.call('HSET', KEYS[1], 'digest', ARGV[1], 'body', ARGV[2], 'worker', ARGV[3], 'epoch', ARGV[4],
           'seq_id', ARGV[5], 'placements', ARGV[3] .. ' ' .. ARGV[7])
redis.call('EXPIRE', KEYS[1], ARGV[6])
return {1, ARGV[1], ARGV[5]}
