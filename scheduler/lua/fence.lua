-- fence: stands before every script that is numbered (epoch, n), and lets only the next one of the owner pass.
-- KEYS  1 meta (hash)
-- ARGV  1 epoch, 2 n
-- returns "done" where n was applied before; errors: STALE (another owner), GAP (n-1 is not here)
-- Invariant: a script numbered (epoch, n) is applied once, whole, and only on top of n-1.
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'n')
if meta[1] ~= ARGV[1] then
  return redis.error_reply('STALE epoch ' .. ARGV[1] .. ', the owner has ' .. tostring(meta[1]))
end
local held, number = tonumber(meta[2] or '0'), tonumber(ARGV[2])
if number <= held then return 'done' end
if number ~= held + 1 then
  return redis.error_reply('GAP script ' .. ARGV[2] .. ' on top of ' .. held)
end

