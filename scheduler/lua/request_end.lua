-- request_end: how a request ended; the record expires from now on.
-- KEYS  1 the record (hash)
-- ARGV  1 worker, 2 epoch, 3 end state (packed by the owner), 4 seconds that the record is kept
-- returns the end state that holds. Invariant: written once, by the owner.
local held = redis.call('HMGET', KEYS[1], 'worker', 'epoch', 'end')
if held[3] then return held[3] end
if held[1] ~= ARGV[1] or held[2] ~= ARGV[2] then
  return redis.error_reply('STALE the request is with ' .. tostring(held[1]) .. ' ' .. tostring(held[2]))
end
redis.call('HSET', KEYS[1], 'end', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return ARGV[3]
