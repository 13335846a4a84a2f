-- request_own: a new owner, or a new worker, of a live request.
-- KEYS  1 the record (hash)
-- ARGV  1 worker and 2 epoch of the new owner, 3 worker of the old one, 4 output index of each choice from
--       which the new worker logs, with commas between,
--       5 seconds that a request may live at most
-- returns 1, or 0 where the record is gone or has ended; error STALE where another owner is newer.
-- Invariant: of one worker the epoch only grows; a worker follows only the one that held the request.
local held = redis.call('HMGET', KEYS[1], 'worker', 'epoch', 'placements', 'end')
if not held[1] or held[4] then return 0 end
local same = held[1] == ARGV[1]
if same and tonumber(held[2]) > tonumber(ARGV[2]) then
  return redis.error_reply('STALE epoch ' .. ARGV[2] .. ', the request has ' .. held[2])
end
if not same then
  if held[1] ~= ARGV[3] then return redis.error_reply('STALE the request is with ' .. held[1]) end
  redis.call('HSET', KEYS[1], 'placements', held[3] .. '\n' .. ARGV[1] .. ' ' .. ARGV[4])
end
redis.call('HSET', KEYS[1], 'worker', ARGV[1], 'epoch', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[5])
return 1
